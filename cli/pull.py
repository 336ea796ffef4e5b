"""`glmchat pull`: plan, show, fetch. With --quant a job quantises what arrives; with --into pointers become files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glmchat.cli import output
from glmchat.cli.completion import complete_models
from glmchat.cli.output import cancelled_by_interrupt, follow_job, printed_events
from glmchat.core.engine_options import parse_quant
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.shell import shell_word
from glmchat.core.text import human_bytes

if TYPE_CHECKING:
    from glmchat.hub.plan import PullOptions, PullPlan
    from glmchat.hub.references import Reference


def register(app: typer.Typer) -> None:
    app.command("pull")(pull)
    app.command("download", hidden=True)(pull)
    app.command("get", hidden=True)(pull)


def pull(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME[@REVISION]…",
            help="A name, owner/repo, or the address of a model page.",
            autocompletion=complete_models,
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag.")] = None,
    endpoint: Annotated[
        list[str] | None, typer.Option(help="Hub address, mirror folder, or `modelscope`; may be repeated, in order.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="Only files that match this pattern.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Skip files that match this pattern.")] = None,
    all_files: Annotated[bool, typer.Option("--all", help="Every file of the revision, including code.")] = False,
    trust_host: Annotated[bool, typer.Option("--trust-host", help="Accept files without a known hash.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Hash the files on this machine, and fetch the damaged ones again.")
    ] = False,
    locked: Annotated[Path | None, typer.Option(metavar="FILE", help="Pull exactly what a lock file lists.")] = None,
    into: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Replace the git-lfs pointers in this folder with the real files."),
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option("--quant", metavar="4|8", help="Quantise each file as it arrives and keep only the result."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="With --quant: keep the original too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, fetch nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Download a model: resumable, verified, into the cache that all Hugging Face tools share."""
    from glmchat.hub.plan import PullOptions
    from glmchat.hub.store import stopped

    bits = parse_quant(quant)
    names, places = names or [], tuple(endpoint or ())
    _refuse_contradictions(names, locked, into, revision, quantised=quant is not None, keep=keep)
    options = PullOptions(places, tuple(include or ()), tuple(exclude or ()), all_files, trust_host)
    try:
        if into is not None:
            name = names[0] if names else None
            _pull_into(into, name, revision, places, dry_run=dry_run, as_json=as_json, quiet=quiet)
        elif bits is not None:
            flags = {"bits": bits, "options": asdict(options), "keep": keep, "check": check, "dry_run": dry_run}
            for source in _sources(names, revision, locked):
                _pull_quantised({**source, **flags}, as_json=as_json, quiet=quiet)
        else:
            for plan_one in _planners(names, revision, locked, options):
                plan = plan_one()
                if dry_run:
                    _show(plan.to_json(), plan.lines(), as_json=as_json)
                else:
                    _fetch(plan, as_json=as_json, quiet=quiet, check=check)
        if locked is not None:
            _locked_adapters(locked, options, dry_run=dry_run, as_json=as_json)
    except KeyboardInterrupt:
        raise stopped() from None


def fetch(reference: Reference) -> None:
    """Plan and pull one model with the usual words on stderr; for other commands that found a model missing."""
    from glmchat.hub.plan import plan_pull

    _fetch(plan_pull(reference, wait=output.wait))


def _refuse_contradictions(
    names: list[str], locked: Path | None, into: Path | None, revision: str | None, *, quantised: bool, keep: bool
) -> None:
    def wrong(message: str, hint: str) -> Usage:
        return Usage(message, hint=hint, code="pull.arguments")

    if into is not None:
        if locked is not None or len(names) > 1:
            raise wrong(
                tr("--into works with at most one name"),
                tr("glmchat pull NAME --into {path}", path=shell_word(str(into))),
            )
        if quantised or keep:
            raise wrong(
                tr("--into puts files where their pointers are and does not quantise"),
                tr("glmchat pull --into {path}, then glmchat quantize {path}", path=shell_word(str(into.absolute()))),
            )
        return
    if keep and not quantised:
        raise wrong(tr("--keep only works with --quant"), tr("glmchat pull NAME --quant 4 --keep"))
    if bool(names) == (locked is not None):
        raise wrong(
            tr("names and --locked cannot be used together") if names else tr("no model to pull was named"),
            tr("glmchat pull NAME, for example glmchat pull smollm2"),
        )
    if locked is None and revision is not None and len(names) > 1:
        raise wrong(tr("--revision works with one name only"), tr("write NAME@REVISION for each"))


def _planners(
    names: list[str], revision: str | None, locked: Path | None, options: PullOptions
) -> list[Callable[[], PullPlan]]:
    """One planner per model; each is called just before its pull, when the one before is on the disk."""
    from glmchat.hub.plan import plan_pull
    from glmchat.hub.references import parse

    if locked is not None:
        from glmchat.hub.lockfile import plan_locked, read_lock

        return [lambda model=model: plan_locked(model, options) for model in read_lock(locked).models]  # type: ignore[misc]
    references = [parse(name, revision=revision) for name in names]
    return [lambda reference=reference: plan_pull(reference, options, output.wait) for reference in references]  # type: ignore[misc]


def _sources(names: list[str], revision: str | None, locked: Path | None) -> list[dict[str, Any]]:
    """What jobs/pull_quantised.py is told of each model."""
    from glmchat.hub.lockfile import read_lock
    from glmchat.hub.references import parse

    if locked is not None:
        count = len(read_lock(locked).models)
        return [{"locked": {"file": str(locked.absolute()), "number": number}} for number in range(count)]
    for name in names:  # before a child is started: what is no name at all
        parse(name, revision=revision)
    return [{"name": name, "revision": revision} for name in names]


def _fetch(plan: PullPlan, *, as_json: bool = False, quiet: bool = False, check: bool = False) -> None:
    from glmchat.chat.launch import problem_of
    from glmchat.hub.file_request import ProgressEvents
    from glmchat.hub.plan import require_fit
    from glmchat.hub.pull import execute
    from glmchat.hub.store import stopped

    require_fit(plan)
    for line in plan.lines():
        output.say(line)
    if as_json:
        output.json_line({"event": "plan", **plan.to_json()})
    try:
        with printed_events(as_json=as_json, quiet=quiet) as show:
            row = execute(plan, ProgressEvents(show), lambda: False, check=check, waiting=_say_waiting)
    except KeyboardInterrupt:
        raise stopped() from None
    if as_json:
        output.json_line({"event": "done", **row.to_json()})
    elif (problem := problem_of(row)) is None:
        output.say(tr("{name} is ready: {path}", name=row.name, path=row.path))
    else:
        output.say(tr("{name} is here: {path}", name=row.name, path=row.path))
        output.say(f"{tr('does not run')}: {problem.message}")
        output.say(f"{tr('what helps')}: {problem.hint}")


def _say_waiting() -> None:
    output.say(tr("another process is pulling the same files; waiting for it"))


def _show(plan: Mapping[str, Any], lines: list[str], *, as_json: bool) -> None:
    """A plan that is only shown. plan: its JSON, of a whole pull or of one that is quantised file by file."""
    if as_json:
        output.json_line(plan)
    elif "repo" in plan:
        words = {
            "here": tr("here"),
            "linked": tr("here"),
            "copy": tr("on this machine"),
            "partial": tr("incomplete"),
            "missing": tr("to fetch"),
        }
        rows = [
            (
                file["path"],
                human_bytes(file["size"]) if file["size"] is not None else "?",
                words[file["state"]],
                (file["sha256"] or file["git_blob"] or "?")[:12],
            )
            for file in plan["files"]
        ]
        output.table((tr("file"), tr("size"), tr("state"), tr("hash")), rows, right=(1,))
    for line in lines:
        output.say(line)
    if "repo" in plan:
        output.say(
            tr("{repo} at {revision}, into {path}", repo=plan["repo"], revision=plan["revision"], path=plan["path"])
        )


def _pull_quantised(request: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
    from glmchat.chat.jobs import run_job

    with cancelled_by_interrupt() as cancelled, printed_events(as_json=as_json, quiet=quiet) as show:

        def show_event(event: Mapping[str, Any]) -> None:
            if event["event"] == "plan" and request["dry_run"]:
                plan = {name: value for name, value in event.items() if name not in ("event", "words")}
                _show(plan, event["words"], as_json=as_json)
                return
            show(event)

        result = follow_job(run_job("pull_quantised", request, pulls=True, cancelled=cancelled), show_event)
    if "path" not in result:  # it was only planned
        return
    if as_json:
        output.json_line({"event": "done", **result})
    else:
        output.say(tr("{name} is ready: {path}", name=result["name"], path=result["path"]))


def _pull_into(
    folder: Path,
    name: str | None,
    revision: str | None,
    endpoints: tuple[str, ...],
    *,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    from glmchat.hub.file_request import ProgressEvents
    from glmchat.hub.pull_into import execute_into, plan_into
    from glmchat.hub.references import parse

    plan = plan_into(folder, parse(name, revision=revision) if name else None, endpoints)
    if as_json:
        output.json_line(plan.to_json() if dry_run else {"event": "plan", **plan.to_json()})
    elif dry_run and plan.files:
        rows = [(file.path, human_bytes(file.pointer.size), file.pointer.oid[:12]) for file in plan.files]
        output.table((tr("file"), tr("size"), tr("hash")), rows, right=(1,))
    for line in plan.lines():
        output.say(line)
    if dry_run or not plan.files:
        return
    with printed_events(as_json=as_json, quiet=quiet) as show:
        got = execute_into(plan, ProgressEvents(show), lambda: False)
    if as_json:
        files = [{"path": one.path, "size": one.size, "sha256": one.sha256, "host": one.host} for one in got]
        output.json_line({"event": "done", "into": str(plan.folder), "files": files})
    else:
        output.say(tr("{count} files are in place, all verified", count=len(got)))


def _locked_adapters(file: Path, options: PullOptions, *, dry_run: bool, as_json: bool) -> None:
    from glmchat.cli.adapters import pull_locked
    from glmchat.hub.lockfile import read_lock

    for adapter in read_lock(file).adapters:
        pull_locked(adapter, options, dry_run=dry_run, as_json=as_json)
