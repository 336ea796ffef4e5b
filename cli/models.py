"""What is on this machine: `list rm prune verify add alias lock`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glmchat.cli import output
from glmchat.cli.asking import carry_out
from glmchat.cli.completion import complete_here, complete_installed, complete_models
from glmchat.core.errors import GlmchatError, NotInstalled, Usage
from glmchat.core.language import tr
from glmchat.core.locations import user_path
from glmchat.core.shell import shell_word
from glmchat.core.text import human_bytes, one_line

if TYPE_CHECKING:
    from glmchat.hub.installed import Installed
    from glmchat.hub.verify import Report

Name = Annotated[str, typer.Argument(metavar="NAME", help="A model.", autocompletion=complete_models)]
Names = Annotated[list[str], typer.Argument(metavar="NAME…", help="Models.", autocompletion=complete_installed)]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan, change nothing.")]


def register(app: typer.Typer) -> None:
    app.command("list")(list_models)
    app.command("ls", hidden=True)(list_models)
    app.command("rm")(rm)
    app.command("prune")(prune)
    app.command("verify")(verify)
    app.command("add")(add)
    app.command("alias")(alias)
    app.command("lock")(lock)


def list_models(
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Names only.")] = False,
    known: Annotated[bool, typer.Option("--known", help="Everything in the catalogue, pulled or not.")] = False,
) -> None:
    """List the models on this machine."""
    from glmchat.hub.lookup import list_installed, told_apart

    if known:
        _list_known(as_json)
        return
    rows = told_apart(list_installed())
    if as_json:
        output.json_line([r.to_json() for r in rows])
    elif quiet:
        for row in rows:
            output.data(row.name)
    elif not rows:
        output.say(tr("there are no models yet; `glmchat pull smollm2` downloads a small one to start with"))
    else:
        output.table(
            (tr("name"), tr("kind"), tr("family"), tr("quant"), tr("size"), tr("revision"), ""),
            [
                (
                    r.name,
                    r.kind,
                    r.family or ("" if r.kind == "adapter" else "?"),
                    "" if r.kind == "adapter" else r.quant,
                    human_bytes(r.size_bytes),
                    (r.revision or "")[:12],
                    "" if r.complete else tr("incomplete"),
                )
                for r in rows
            ],
            right=(4,),
        )
    if not (as_json or quiet):
        _say_damaged()
        _say_unreadable()


def _say_unreadable() -> None:
    """What is wrong with the config: a list needs none, but no conversation begins with it."""
    from glmchat.core.settings import load_settings

    try:
        load_settings()
    except GlmchatError as error:
        output.error(error)


def _say_damaged() -> None:
    """Records that cannot be read, as what they tell of is missing from the list."""
    from glmchat.hub import installed, manifests

    for path in manifests.broken():
        where = one_line(str(path))
        output.say(
            tr("{path} is damaged, so what it describes is not listed; `glmchat prune` offers to remove it", path=where)
        )
    for path in installed.damaged_notes():
        where = one_line(str(path))
        output.say(
            tr("{path} is damaged, so the model in its folder is not listed; `glmchat add` lists it again", path=where)
        )


def rm(names: Names, yes: Yes = False, dry_run: DryRun = False, as_json: AsJson = False) -> None:
    """Remove models. Other revisions, and everything they share, stay."""
    from glmchat.chat.launch import installed_row
    from glmchat.chat.shared_engine import end_idle_of
    from glmchat.hub.removal import plan_removal

    rows = [installed_row(name, incomplete=True) for name in names]
    for name, row in zip(names, rows, strict=True):
        _refuse_one_of_several(name, row)
        if row.source == "path" and row.manifest is None:
            raise Usage(
                tr("{path} is your own folder; glmchat does not delete it", path=row.path),
                hint=tr("delete it yourself"),
                code="rm.folder",
            )
    carry_out(plan_removal(rows), yes=yes, dry_run=dry_run, as_json=as_json)
    if not dry_run:
        end_idle_of([row.path for row in rows])


def _refuse_one_of_several(name: str, row: Installed) -> None:
    """A repository's folder is removed as a whole, so not in the name of one of its files."""
    from glmchat.hub import references
    from glmchat.hub.gguf_choice import choices

    every = [file.path for file in row.manifest.files] if row.manifest is not None else []
    if references.parse(name).file is not None and len(choices(every)) > 1:
        raise Usage(
            tr("{name} lies in one folder with other models", name=one_line(name)),
            hint=tr("glmchat rm {name} removes all of them", name=shell_word(row.repo or row.name)),
            code="rm.shared_folder",
        )


def prune(
    evaluations: Annotated[
        bool, typer.Option("--evaluations", help="Evaluations too: their tables and all answers.")
    ] = False,
    runs: Annotated[
        bool, typer.Option("--runs", help="Runs of tuning that are done too; what they learned stays in the store.")
    ] = False,
    yes: Yes = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Remove conversations' caches, and what nothing refers to: partial downloads, blobs without a link, manifests."""
    from glmchat.hub.removal import plan_prune

    plan = plan_prune(evaluations=evaluations, runs=runs)
    carry_out(plan, yes=yes, dry_run=dry_run, as_json=as_json)


def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME…]",
            help="Models, adapters or folders; without one, all of them.",
            autocompletion=complete_here,
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Hash every file of a model or an adapter and compare with what it should be. Needs no network."""
    from glmchat.hub.lookup import list_installed
    from glmchat.hub.store import stopped
    from glmchat.hub.verify import verify as check

    kinds = ("model", "adapter")
    rows = [_any(n) for n in names] if names else [r for r in list_installed() if r.kind in kinds]
    reports: list[Report] = []
    try:
        with nullcontext() if quiet or as_json else output.progress() as meter:
            for row in rows:
                report = check(row, _to(meter))
                reports.append(report)
    except KeyboardInterrupt:
        raise stopped() from None
    for report in reports:
        if as_json:
            output.json_line(report.to_json())
        else:
            _tell(report)
    if not reports:
        output.say(tr("there are no models yet; `glmchat pull smollm2` downloads a small one to start with"))
    for report in reports:
        report.require_good()


def add(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A model folder or a .gguf file.")],
    name: Annotated[str | None, typer.Option(help="The name to give it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Give a model folder a name, without copying it."""
    from glmchat.chat.launch import problem_at
    from glmchat.core.errors import Hostile
    from glmchat.hub.references import parse
    from glmchat.hub.registration import register as register_folder
    from glmchat.hub.store import stopped

    if name is not None and (parse(name).name != name):
        raise Usage(
            tr("{name} cannot be a name", name=repr(name)),
            hint=tr("use a plain name without /, @ or : that is not a folder here"),
            code="add.name",
        )
    problem = problem_at(user_path(path))
    if isinstance(problem, Hostile):  # what wants to run code gets no name either
        raise problem
    try:
        with nullcontext() if as_json else output.progress() as meter:
            row = register_folder(user_path(path), name, _to(meter), lambda: False)
    except KeyboardInterrupt:
        raise stopped() from None
    if as_json:
        output.json_line(row.to_json())
    else:
        output.say(tr("{name} is {path}", name=row.name, path=row.path))
        if row.repo:
            output.say(tr("its files are those of {repo} at {revision}", repo=row.repo, revision=row.revision))
    if problem is not None:
        output.say(f"{tr('does not run')}: {problem.message}")
        output.say(f"{tr('what helps')}: {problem.hint}")


def alias(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The new name.")] = None,
    target: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="The model it stands for.", autocompletion=complete_models)
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the name.")] = False,
    as_json: AsJson = False,
) -> None:
    """Give a model a name of your own; without arguments list the names."""
    from glmchat.hub import aliases
    from glmchat.hub.lookup import by_name, find_installed
    from glmchat.hub.references import parse

    if name is None:
        names = aliases.load()
        if as_json:
            output.json_line(names)
        elif names:
            output.table((tr("name"), tr("stands for")), sorted(names.items()))
        else:
            output.say(tr("there are no aliases; `glmchat alias NAME MODEL` creates one"))
    elif remove:
        aliases.remove_alias(name)
        output.say(tr("{name} is no longer registered", name=name))
    elif target is None:
        raise Usage(
            tr("what should {name} stand for?", name=name), hint="glmchat alias NAME MODEL", code="alias.no_target"
        )
    else:
        find_installed(parse(target), incomplete=True)  # a name that nobody knows is refused, one not here is fine
        if taken := by_name(name):  # else `glmchat rm NAME` would take another model than the list shows
            raise Usage(
                tr("{name} is already {path}", name=name, path=taken[0].path),
                hint=tr("choose another name: {command}", command="glmchat alias NAME MODEL"),
                code="alias.taken",
            )
        meant = aliases.set_alias(name, target)
        output.say(tr("{name} now stands for {target}", name=name, target=str(meant)))


def lock(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME…]", help="Models or adapters; without one, all of them.", autocompletion=complete_here
        ),
    ] = None,
) -> None:
    """Print a lock file: exact commits and hashes, for `glmchat pull --locked FILE` elsewhere."""
    import json

    from glmchat.hub.lockfile import lock as lock_models
    from glmchat.hub.lookup import list_installed

    kinds = ("model", "adapter")
    rows = [_any(n, incomplete=False) for n in names] if names else [r for r in list_installed() if r.kind in kinds]
    content, left_out = lock_models(rows)
    for one in left_out:
        output.say(tr("left out: {name} has no source or no hashes", name=one))
    if names and left_out:
        raise Usage(
            tr("{name} cannot be locked", name=left_out[0]),
            hint=tr("a lock needs a source and hashes; pull the model with glmchat"),
            code="lock.impossible",
        )
    output.data(json.dumps(content, ensure_ascii=False, indent=1))


def _any(name: str, *, incomplete: bool = True) -> Installed:
    """The model of that name, else the adapter."""
    from glmchat.chat.launch import installed_row
    from glmchat.core.errors import UnknownModel
    from glmchat.hub.adapters import by_name

    try:
        return installed_row(name, incomplete=incomplete)
    except (UnknownModel, NotInstalled):
        row = by_name(name)
        if row is None:
            raise
        return row


def _list_known(as_json: bool) -> None:
    from glmchat.hub import catalogue

    entries = list(catalogue.load())
    if as_json:
        output.json_line(
            [
                {
                    "name": e.reference,
                    "label": e.label,
                    "repo": e.repo,
                    "revision": e.revision,
                    "family": e.family,
                    "quant": e.quant,
                    "size_bytes": sum(f.size or 0 for f in e.files),
                    "about": e.about,
                }
                for e in entries
            ]
        )
        return
    output.table(
        (tr("name"), tr("label"), tr("size"), tr("about")),
        [(e.reference, e.label, human_bytes(sum(f.size or 0 for f in e.files)), e.about) for e in entries],
        right=(2,),
    )


def _tell(report: Report) -> None:
    from glmchat.hub.verify import unknown_files

    for file in report.wrong:
        output.data(f"{report.name}: {file.sentence()}")
    unknown = unknown_files(report)
    if report.files and len(unknown) == len(report.files):
        output.say(
            tr(
                "{name}: its {count} files could not be checked: their hashes are not known",
                name=report.name,
                count=len(unknown),
            )
        )
        return
    right = sum(f.state == "ok" for f in report.files)
    against = {"manifest": tr("its manifest"), "cache": tr("the names of its blobs"), "nothing": tr("no reference")}
    output.say(
        tr(
            "{name}: {right} of {count} files are intact, compared with {against}",
            name=report.name,
            right=right,
            count=len(report.files),
            against=against.get(report.against, report.against),
        )
    )
    if unknown:
        output.say(tr("{count} files could not be checked: their hashes are not known", count=len(unknown)))


def _to(meter: output.Meter | None) -> Callable[[str, int, int | None], None]:
    return meter.update if meter is not None else lambda *_: None
