"""`glmchat pull --into PATH`: git-lfs pointers become the files they stand for."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glmchat.cli import output
from glmchat.cli.completion import complete_models
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.quant import parse_quant
from glmchat.core.text import human_bytes

if TYPE_CHECKING:
    from glmchat.hub.download import Progress
    from glmchat.hub.plan import PullOptions, PullPlan
    from glmchat.hub.references import Reference


def pull_into(
    folder: Path,
    name: str | None,
    *,
    revision: str | None,
    endpoints: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Plan, show, fetch, replace in place."""
    pass  # FIXME-empty-import
    from glmchat.hub import store
    from glmchat.hub.pull_into import describe_into, execute_into, plan_into
    from glmchat.hub.references import parse

    plan = plan_into(folder, parse(name, revision=revision) if name else None, endpoints)
    if as_json:
        output.json_line(plan.to_json() if dry_run else {"event": "plan", **plan.to_json()})
    elif dry_run and plan.files:
        rows = [(file.path, human_bytes(file.pointer.size), file.pointer.oid[:12]) for file in plan.files]
        output.table((tr("file"), tr("size"), tr("hash")), rows, right=(1,))
    output.say(describe_into(plan))
    for problem in plan.problems:
        output.say(problem)
    if dry_run or not plan.files:
        return
    try:
        with nullcontext() if quiet or as_json else output.progress() as meter:
            got = execute_into(plan, _reporter(meter, as_json), lambda: False)
    except KeyboardInterrupt:
        raise store.stopped() from None
    if as_json:
        files = [{"path": one.path, "size": one.size, "sha256": one.sha256, "host": one.host} for one in got]
        output.json_line({"event": "done", "into": str(plan.folder), "files": files})
    else:
        output.say(tr("{count} files are in their place, every one verified", count=len(got)))


_EVENT_SECONDS = 0.5  # between two progress lines of --json
_SMALL = 5_000_000  # bytes; smaller files get no bar of their own


def register(app: typer.Typer) -> None:
    app.command("pull")(pull)
    app.command("download", hidden=True)(pull)
    app.command("get", hidden=True)(pull)


def pull(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME[@REVISION]…", help="A name, owner/repo, or a page's address.", autocompletion=complete_models
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag.")] = None,
    endpoint: Annotated[
        list[str] | None, typer.Option(help="Hub address, mirror folder, or `modelscope`; may be repeated, in order.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="Only files that match this pattern.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="No files that match this pattern.")] = None,
    all_files: Annotated[bool, typer.Option("--all", help="Every file of the revision, code too.")] = False,
    trust_host: Annotated[bool, typer.Option("--trust-host", help="Take files whose hash nobody knows.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Hash what is here already, and fetch again what is wrong.")
    ] = False,
    locked: Annotated[Path | None, typer.Option(metavar="FILE", help="Pull exactly what a lock file says.")] = None,
    into: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Replace the git-lfs pointers of this folder by the real files.")
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
    """Fetch a model: resumable, verified, into the cache that all Hugging Face tools share."""
    from glmchat.hub.plan import PullOptions

    bits = parse_quant(quant)
    if into is not None:
        if locked is not None or len(names or []) > 1:
            raise Usage(
                tr("--into goes with one name at most"),
                hint=tr("glmchat pull NAME --into {path}", path=into),
                code="pull.arguments",
            )
        if quant is not None or keep:
            raise Usage(
                tr("--into puts files where their pointers are, and quantises none"),
                hint=tr("glmchat pull --into {path}, then glmchat quantize {path}", path=into.absolute()),
                code="pull.arguments",
            )
        pass  # FIXME-empty-import

        name, places = names[0] if names else None, tuple(endpoint or ())
        pull_into(into, name, revision=revision, endpoints=places, dry_run=dry_run, as_json=as_json, quiet=quiet)
        return
    if keep and quant is None:
        raise Usage(
            tr("--keep goes with --quant"), hint=tr("glmchat pull NAME --quant 4 --keep"), code="pull.arguments"
        )
    options = PullOptions(tuple(endpoint or ()), tuple(include or ()), tuple(exclude or ()), all_files, trust_host)
    if bool(names) == (locked is not None):
        raise Usage(
            tr("names and --locked exclude each other") if names else tr("nothing to pull was named"),
            hint=tr("glmchat pull NAME, for example glmchat pull smollm2"),
            code="pull.arguments",
        )
    try:
        for plan_one in _plans(names or [], locked, options, revision):
            plan = plan_one()
            if bits is not None:
                from glmchat.cli.pull_quant import pull_quantised

                pull_quantised(plan, bits, keep=keep, check=check, dry_run=dry_run, as_json=as_json, quiet=quiet)
            elif dry_run:
                _show(plan, as_json)
            else:
                _fetch(plan, as_json=as_json, quiet=quiet, check=check)
        if locked is not None:
            _locked_adapters(locked, options, dry_run=dry_run, as_json=as_json)
    except KeyboardInterrupt:  # while a hub was asked
        from glmchat.hub.store import stopped

        raise stopped() from None


def fetch(reference: Reference, *, quiet: bool = False) -> None:
    """Plan and pull one model with the usual words on stderr; for other commands that found a model missing."""
    from glmchat.hub.plan import plan_pull

    _fetch(plan_pull(reference), quiet=quiet)


def describe(plan: PullPlan) -> str:
    """The plan in one line: what, from where, how much, how much is here."""
    if plan.done:
        return tr("{name} is here, {size}", name=plan.name, size=human_bytes(plan.bytes_total))
    where = "pip" if plan.source == "pypi" else ", ".join(p.label for p in plan.places)
    line = tr("{name}: {size} to fetch from {where}", name=plan.name, size=human_bytes(plan.bytes_missing), where=where)
    kept = plan.bytes_here
    return line + tr(", {size} are here already", size=human_bytes(kept)) if kept > 0 else line


def _plans(
    names: list[str], locked: Path | None, options: PullOptions, revision: str | None
) -> list[Callable[[], PullPlan]]:
    """One planner per model; each is called just before its pull, when the one before is on the disk."""
    from glmchat.hub.plan import plan_pull
    from glmchat.hub.references import parse

    if locked is not None:
        from glmchat.hub.lockfile import plan_locked, read_lock

        return [lambda model=model: plan_locked(model, options) for model in read_lock(locked).models]  # type: ignore[misc]
    if revision is not None and len(names) > 1:
        raise Usage(tr("--revision goes with one name"), hint=tr("write NAME@REVISION for each"), code="pull.arguments")
    references = [parse(name, revision=revision) for name in names]
    return [lambda reference=reference: plan_pull(reference, options) for reference in references]  # type: ignore[misc]


def _locked_adapters(file: Path, options: PullOptions, *, dry_run: bool, as_json: bool) -> None:
    from glmchat.cli.adapters import pull_locked
    from glmchat.hub.lockfile import read_lock

    for adapter in read_lock(file).adapters:
        pull_locked(adapter, options, dry_run=dry_run, as_json=as_json)


def _fetch(plan: PullPlan, *, as_json: bool = False, quiet: bool = False, check: bool = False) -> None:
    from glmchat.hub import store
    from glmchat.hub.plan import require_fit
    from glmchat.hub.pull import execute

    require_fit(plan)
    output.say(describe(plan))
    if not plan.done and plan.entry and plan.entry.licence:
        output.say(f"{tr('licence')}: {plan.entry.licence.line()}")
    if as_json:
        output.json_line({"event": "plan", **plan.to_json()})

    try:
        with nullcontext() if quiet or as_json else output.progress() as meter:
            row = execute(plan, _reporter(meter, as_json), lambda: False, check=check, waiting=say_waiting)
    except KeyboardInterrupt:
        raise store.stopped() from None
    if as_json:
        output.json_line({"event": "done", **row.to_json()})
    else:
        output.say(tr("{name} is ready: {path}", name=row.name, path=row.path))


def say_waiting() -> None:
    output.say(tr("another pull of the same files is at work; waiting for it"))


def _reporter(meter: output.Meter | None, as_json: bool) -> Callable[[Progress], None]:
    """Progress to bars, plain lines or JSON lines."""
    last_time, told = 0.0, {""}

    def report(progress: Progress) -> None:
        nonlocal last_time
        if progress.note not in told:
            told.add(progress.note)
            output.say(progress.note)
        if as_json and time.monotonic() - last_time >= _EVENT_SECONDS:
            last_time = time.monotonic()
            output.json_line(
                {
                    "event": "progress",
                    "done": progress.done,
                    "total": progress.total,
                    "bytes_per_second": progress.bytes_per_second,
                    "seconds_left": progress.seconds_left,
                }
            )
        if meter is None:
            return
        for file in progress.files:
            if file.state != "waiting" and (file.total is None or file.total >= _SMALL or len(progress.files) == 1):
                meter.update(file.path, file.done, file.total)
        if len(progress.files) > 1:
            meter.update(tr("in all"), progress.done, progress.total)

    return report


def _show(plan: PullPlan, as_json: bool) -> None:
    if as_json:
        output.json_line(plan.to_json())
        return
    words = {
        "here": tr("here"),
        "linked": tr("here"),
        "copy": tr("on this machine"),
        "partial": tr("half here"),
        "missing": tr("to fetch"),
    }
    rows = [
        (
            f.path,
            human_bytes(f.size) if f.size is not None else "?",
            words[f.state],
            (f.sha256 or f.git_blob or "?")[:12],
        )
        for f in plan.files
    ]
    output.table((tr("file"), tr("size"), tr("state"), tr("hash")), rows, right=(1,))
    output.say(describe(plan))
    output.say(
        tr(
            "{repo} at {revision}, into {path}; {needed} of disk needed, {free} free",
            repo=plan.repo,
            revision=plan.revision,
            path=plan.root,
            needed=human_bytes(plan.disk_needed),
            free=human_bytes(plan.disk_free),
        )
    )
    if not plan.fits:
        output.say(tr("it does not fit"))
