"""`glmchat adapters`: bring adapters into the store, look at them, take them away, merge them into a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glmchat.cli import output
from glmchat.cli.completion import complete_adapters, complete_installed
from glmchat.cli.output import cancelled_by_interrupt, follow_job, printed_events
from glmchat.core.engine_options import parse_quant
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.locations import user_path
from glmchat.core.text import human_bytes, one_line

if TYPE_CHECKING:
    from glmchat.hub.adapters import Origin
    from glmchat.hub.installed import Installed
    from glmchat.hub.lockfile import LockedAdapter
    from glmchat.hub.plan import PullOptions, PullPlan
    from glmchat.hub.references import Reference

# A LoRA saved as the guides do it has a name that its author chose; what else a training run saves is no adapter.
_SAVED = ("*.json", "*.pt", "*.pth", "*.ckpt", "*.bin", "*.safetensors")
_OF_TRAINING = ("optimizer*", "scheduler*", "scaler*", "rng_state*", "training_args*", "*_states.pt", "*/*")


_NEWEST = 3  # evaluations that are told of a model or an adapter

AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="An adapter.", autocompletion=complete_adapters)]
Alpha = Annotated[float | None, typer.Option(help="lora_alpha for a raw LoRA file that does not give it.")]
Force = Annotated[bool, typer.Option("--force", help="Use it even on a base it was not trained on; answers say so.")]


def register(app: typer.Typer) -> None:
    group = typer.Typer(help="LoRA and other adapters: add, list, show, rm, verify, merge.", no_args_is_help=True)
    group.command("add")(add)
    group.command("list")(list_all)
    group.command("ls", hidden=True)(list_all)
    group.command("show")(show)
    group.command("rm")(rm)
    group.command("verify")(verify)
    group.command("merge")(merge)
    app.add_typer(group, name="adapters")


def add(
    source: Annotated[str, typer.Argument(metavar="PATH|REPO[@REV]", help="A folder, a file, or owner/repo.")],
    name: Annotated[str | None, typer.Option(help="The name to give it.")] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Check it against this model.", autocompletion=complete_installed),
    ] = None,
    alpha: Alpha = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Bring an adapter into the store: checked, copied, hashed.

    LoRA, P-Tuning v2, prefixes, virtual tokens; LoHa, LoKr, IA3, VeRA, OFT … for models that go through transformers.
    """
    from glmchat.hub import adapters

    if name is not None:
        adapters.free_name(name)
    path, origin = _fetch(source)
    request = {"name": name, "alpha": alpha, "force": force, "base": None if base is None else _checked_base(base)}
    row, _ = _add(path, origin, request)
    if as_json:
        output.json_line(adapters.to_json(row))
        return
    facts = adapters.facts_of(row)
    output.say(tr("{name} is ready: {what}", name=row.name, what=adapters.kind_words(facts)))
    if facts["kind"] == "lora" and not facts["alpha_known"]:
        output.say(
            tr(
                "the file does not give lora_alpha; {alpha} is used, --alpha sets another value",
                alpha=f"{facts['alpha']:g}",
            )
        )
    output.say(tr("glmchat run MODEL --adapter {name}, or /adapter {name} in the chat", name=row.name))


def _checked_base(name: str) -> dict[str, Any]:
    """The model to compare every tensor with, and what is noted of it."""
    model = _model(name)
    note: dict[str, Any] = {"name": model.name, "repo": model.repo, "revision": model.revision}
    note["files"] = {f.path: f.sha256 for f in model.files if f.sha256}
    return {"path": str(model.path), "note": note}


def _add(path: Path, origin: Origin, request: dict[str, Any]) -> tuple[Installed, bool]:
    """The row in the store, and whether it was made now: jobs/add_adapter.py reads and copies."""
    from glmchat.chat.jobs import run_job
    from glmchat.checkpoints.adapter_check import check_adapter
    from glmchat.hub.adapters import find_adapter

    base = request.get("base")
    check_adapter(
        user_path(path),
        None if base is None else Path(base["path"]),
        alpha=request.get("alpha"),
        force=request.get("force", False),
    )
    told = {**asdict(origin), "served": [asdict(file) for file in origin.served.values()]}
    request = {**request, "path": str(user_path(path)), "origin": told}
    with cancelled_by_interrupt() as cancelled:
        result = follow_job(run_job("add_adapter", request, cancelled=cancelled), lambda event: None)
    return find_adapter(result["name"]), result["made"]


def bring_in(path: Path, model: Path | None, force: bool) -> tuple[str, bool]:
    """The store's name of the adapter at `path`, and whether it came into the store now, which only one does that fits
    `model`.

    model: the folder or GGUF file it is to be used with. Says what was done.
    """
    from glmchat.hub import adapters

    path = path.absolute()
    base = None if model is None else {"path": str(model), "note": None}
    row, made = _add(path, adapters.Origin(str(path)), {"force": force, "base": base, "reuse": True})
    if made:
        what = adapters.kind_words(adapters.facts_of(row))
        output.say(
            tr("{path} was added to the store as {name}: {what}", path=one_line(str(path)), name=row.name, what=what)
        )
    else:
        output.say(tr("{path} is in the store as {name}", path=one_line(str(path)), name=row.name))
    return row.name, made


def take_out(names: Sequence[str]) -> None:
    """Remove what `bring_in` has just added: what it was brought for is not to be."""
    from glmchat.hub.adapters import find_adapter
    from glmchat.hub.removal import execute, plan_removal

    if not names:
        return
    execute(plan_removal([find_adapter(name) for name in names]))
    output.say(tr("taken out of the store again: {names}", names=one_line(", ".join(names))))


def _fetch(source: str) -> tuple[Path, Origin]:
    """The adapter's place on this machine; one from a hub is pulled first."""
    from glmchat.hub import adapters, references

    reference = references.parse(source)
    if reference.path is not None:
        return reference.path, adapters.Origin(str(reference.path))
    if reference.repo is None:
        raise Usage(
            tr("{name} is not a folder, a file or a repository", name=repr(one_line(source, 80))),
            hint=tr("write ./folder, or owner/repo"),
            code="adapter.source",
        )
    return _pull(_planned(reference), source)


def _planned(reference: Reference) -> PullPlan:
    """What a pull of a model would take; weights under other names than a model's where there are none like that."""
    from glmchat.hub.plan import PullOptions, plan_pull
    from glmchat.hub.selection import is_weights

    try:
        plan = plan_pull(reference, PullOptions(adapter=True), output.wait)
        if any(is_weights(file.path) for file in plan.files):
            return plan
    except Usage as error:
        if error.code != "pull.nothing_chosen":
            raise
    return plan_pull(reference, PullOptions(include=_SAVED, exclude=_OF_TRAINING), output.wait)


def _pull(plan: PullPlan, asked: str) -> tuple[Path, Origin]:
    """Fetch the plan's files, resumable and hashed like a model's, and say who served them."""
    from glmchat.hub import adapters, manifests
    from glmchat.hub.plan import require_fit
    from glmchat.hub.pull import execute

    require_fit(plan)
    with output.progress() as meter:
        execute(
            plan, lambda progress: meter.update(plan.name, progress.done, progress.total), lambda: False, note=False
        )
    served = {f.path: f for m in manifests.read_all() if m.root == plan.root for f in m.files}
    adapters.forget_pull(plan.root)
    return plan.root, adapters.Origin(asked, plan.repo, plan.revision, served)


def pull_locked(locked: LockedAdapter, options: PullOptions, *, dry_run: bool, as_json: bool) -> None:
    """Bring one adapter of a lock file into the store, under the lock's name and with the lock's hashes.

    One that is there already with these hashes stays. Raises Usage if another one has its name.
    """
    from glmchat.hub import adapters
    from glmchat.hub.lockfile import plan_locked

    hashes = {f.path: f.sha256 for f in locked.entry.files}
    here = adapters.by_name(locked.entry.name)
    if here is not None and {f.path: f.sha256 for f in here.files} == hashes:
        output.say(tr("{name} is already here, {size}", name=here.name, size=human_bytes(here.size_bytes)))
        row = here
    else:
        adapters.free_name(locked.entry.name)
        plan = plan_locked(locked.entry, replace(options, include=(), exclude=(), everything=True))
        if dry_run:
            if as_json:
                output.json_line({**plan.to_json(), "kind": "adapter"})
            else:
                output.say(tr("{name} would be added, {size}", name=plan.name, size=human_bytes(plan.bytes_total)))
            return
        path, origin = _pull(plan, f"{plan.repo}@{plan.revision}")
        row, _ = _add(path, origin, {"name": locked.entry.name, "alpha": locked.alpha})
        output.say(tr("{name} is ready: {what}", name=row.name, what=adapters.kind_words(adapters.facts_of(row))))
    if as_json:
        output.json_line({"event": "done", **adapters.to_json(row)})


def list_all(
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Names only.")] = False,
) -> None:
    """List the adapters on this machine."""
    from glmchat.hub.adapters import facts_of, kind_words, list_adapters, to_json

    rows = list_adapters()
    if as_json:
        output.json_line([to_json(row) for row in rows])
    elif quiet:
        for row in rows:
            output.data(row.name)
    elif not rows:
        output.say(tr("there are no adapters yet; `glmchat adapters add PATH` adds one"))
    else:
        output.table(
            (tr("name"), tr("kind"), tr("base"), tr("size"), ""),
            [
                (
                    row.name,
                    kind_words(facts_of(row)),
                    row.base or "?",
                    human_bytes(row.size_bytes),
                    tr("forced") if facts_of(row).get("forced") else "",
                )
                for row in rows
            ],
            right=(3,),
        )


def show(name: Name, as_json: AsJson = False) -> None:
    """Show one adapter: what it is, what it was trained on, where it came from, its files."""
    from glmchat.chat.adapters_choice import own_template
    from glmchat.checkpoints.adapter_files import own_tokenizer
    from glmchat.hub.adapters import facts_of, find_adapter, kind_words, to_json

    row = find_adapter(name)
    if as_json:
        files = [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in row.files]
        output.json_line({**to_json(row), "files": files, "evaluations": evaluated(row.name)})
        return
    facts = facts_of(row)
    checked = facts.get("checked_against") or {}
    words = facts.get("vocabulary") if facts.get("replaces") else None
    lines = [
        (tr("name"), row.name),
        (tr("kind"), kind_words(facts)),
        (tr("base"), row.base),
        (tr("checked against"), checked.get("name")),
        *trained_lines(facts.get("trained")),
        (tr("layers"), ", ".join(map(str, facts.get("targets") or ())) or None),
        (tr("tokenizer"), ", ".join(own_tokenizer(row.path)) or None),
        (tr("chat template"), None if own_template(row) is None else tr("its own, used while it is active")),
        (tr("words"), None if words is None else tr("rows of its own for {words} words", words=words)),
        (tr("repository"), row.repo),
        (tr("revision"), row.revision),
        (tr("origin"), row.manifest.asked if row.manifest else None),
        (tr("forced"), tr("yes, answers say so") if facts.get("forced") else None),
        (tr("path"), row.path),
        (tr("size"), human_bytes(row.size_bytes)),
    ]
    for word, value in lines:
        if value is not None:
            output.data(f"{word}: {one_line(str(value), 400)}")
    output.data("")
    output.table(
        (tr("file"), tr("size"), tr("hash")),
        [(f.path, human_bytes(f.size), (f.sha256 or "?")[:12]) for f in row.files],
        right=(1,),
    )
    say_evaluations(row.name)


def trained_lines(record: Any) -> list[tuple[str, str | None]]:
    """What `glmchat tune` noted of an adapter or a model; text in it comes from outside."""
    if not isinstance(record, dict):
        return []
    loss, judged, moved = record.get("loss"), record.get("evaluation"), record.get("delta")
    return [
        (tr("learned by"), _command(record)),
        (tr("trained on rows of"), ", ".join(map(str, record.get("data") or ())) or None),
        (tr("system prompt"), record.get("system") or None),
        (tr("loss"), f"{loss:.4f}" if isinstance(loss, float) else None),
        (tr("held-out loss"), f"{judged:.4f}" if isinstance(judged, float) else None),
        (tr("steps"), record.get("steps")),
        (tr("length of the change"), f"{moved:.4g}" if isinstance(moved, float) else None),
        (tr("run"), record.get("run")),
    ]


def _command(record: Mapping[str, Any]) -> str | None:
    """What would learn it again."""
    from glmchat.chat.recipe import command_of

    recipe, data = record.get("recipe"), record.get("data")
    if not isinstance(recipe, dict) or not isinstance(data, list):
        return None
    return command_of(str(recipe.get("base", "")), [str(one) for one in data], recipe)


def evaluated(name: str) -> list[dict[str, Any]]:
    """The newest evaluations in which a model or an adapter took part, for `--json`."""
    from glmchat.chat.evaluating import facts
    from glmchat.core.eval_folder import evaluations_of

    return [facts(found) for found, _ in islice(evaluations_of(name), _NEWEST)]


def say_evaluations(name: str) -> None:
    """The same in lines."""
    from glmchat.chat.evaluating import brief
    from glmchat.core.eval_folder import evaluations_of

    for number, (found, candidate) in enumerate(islice(evaluations_of(name), _NEWEST)):
        if number == 0:
            output.data("")
            output.data(tr("evaluations"))
        for line in brief(found, candidate):
            output.data(f"  {line}")


def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME…", autocompletion=complete_adapters)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, change nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove adapters from the store."""
    from glmchat.cli.asking import carry_out
    from glmchat.hub.adapters import find_adapter
    from glmchat.hub.removal import plan_removal

    carry_out(plan_removal([find_adapter(name) for name in names]), yes=yes, dry_run=dry_run, as_json=as_json)


def verify(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME…]", autocompletion=complete_adapters)] = None,
    as_json: AsJson = False,
) -> None:
    """Hash every file of an adapter and compare with what was added. Needs no network."""
    from glmchat.hub.adapters import find_adapter, list_adapters
    from glmchat.hub.verify import unknown_files
    from glmchat.hub.verify import verify as check

    reports = [check(row) for row in ([find_adapter(n) for n in names] if names else list_adapters())]
    for report in reports:
        if as_json:
            output.json_line(report.to_json())
        for file in report.wrong:
            output.data(f"{report.name}: {file.sentence()}")
        unknown = unknown_files(report)
        if not as_json and not report.wrong and len(unknown) < len(report.files):
            output.say(tr("{name} is intact", name=report.name))
        if not as_json and unknown:
            output.say(tr("{count} files could not be checked: their hashes are not known", count=len(unknown)))
    for report in reports:
        report.require_good()


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", autocompletion=complete_installed)],
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A name in the store, a folder or a file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to create.")],
    quant: Annotated[str | None, typer.Option(metavar="4|8", help="Write it quantised.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16. Default: that of the base.")] = None,
    alpha: Alpha = None,
    force: Force = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Write a model and an adapter as one model, in the original names."""
    bits = parse_quant(quant)
    from glmchat.chat.jobs import run_job
    from glmchat.checkpoints.adapter_check import check_adapter
    from glmchat.checkpoints.fit import check_weights
    from glmchat.hub import references
    from glmchat.hub.adapters import find_adapter

    path = user_path(adapter)
    if not adapter.startswith((".", "/", "~")) and references.parse(adapter).path is None:
        path = find_adapter(adapter).path
    model = _model(base).path
    check_weights(model)
    check_adapter(path.absolute(), model, alpha=alpha, force=force)
    request = {
        "adapter": str(path.absolute()),
        "base": str(model),
        "out": str(user_path(out)),
        "quant": bits,
        "dtype": dtype,
        "alpha": alpha,
        "force": force,
    }
    with cancelled_by_interrupt() as cancelled, printed_events(as_json=False, quiet=quiet, unit="steps") as show:
        result = follow_job(run_job("merge", request, cancelled=cancelled), show)
    output.say(tr("done: {path}", path=one_line(result["path"])))


def _model(name: str) -> Installed:
    from glmchat.chat.launch import not_installed
    from glmchat.hub.lookup import find_installed
    from glmchat.hub.references import parse

    reference = parse(name)
    row = find_installed(reference)
    if row is None:
        raise not_installed(reference)
    return row
