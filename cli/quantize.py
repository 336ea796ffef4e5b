"""`glmchat quantize`: plan, show, act. torch is imported when the command runs, not before."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glmchat.cli import output
from glmchat.cli.completion import complete_models
from glmchat.core.errors import NotInstalled, Usage
from glmchat.core.language import tr
from glmchat.core.quant import parse_quant, quant_bits
from glmchat.core.text import human_bytes, one_line

if TYPE_CHECKING:
    from glmchat.engine.quantize.plan import QuantizePlan
    from glmchat.engine.quantize.replace import Recipe
    from glmchat.hub.installed import Installed


def register(app: typer.Typer) -> None:
    app.command("quantize")(quantize)
    app.command("quantise", hidden=True)(quantize)


def quantize(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME[:int4|:int8]", help="A model on this machine, or a folder.", autocompletion=complete_models
        ),
    ],
    bits: Annotated[str | None, typer.Option("--bits", "-b", metavar="4|8", help="Bits of a weight.")] = None,
    group_size: Annotated[
        str, typer.Option(metavar="auto|N", help="Inputs that share a scale at 4 bits: 128, 64 or 32.")
    ] = "auto",
    embeddings: Annotated[
        str,
        typer.Option(
            metavar="auto|4|8|16", help="Bits of embedding and head; auto: 8, or 16 for a 4-bit Llama that others read."
        ),
    ] = "auto",
    symmetric: Annotated[bool, typer.Option("--symmetric", help="No zero points at 4 bits.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="Round to nearest instead of searching scales.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Write it there.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Make a 4 or 8 bit copy of a model that runs in a quarter or half of the memory."""
    row, asked = _source(name, parse_quant(bits, "--bits"))

    from glmchat.engine.quantize.plan import plan_quantise
    from glmchat.hub.quantised_copies import copy_folder

    recipe = _recipe(asked, group_size, embeddings, symmetric=symmetric, fast=fast)
    if row.quant.startswith(f"int{asked}") and not out:
        output.say(tr("{name} has {bits} bits already: nothing to do", name=one_line(row.name), bits=asked))
        if as_json:
            output.json_line({"event": "done", "path": str(row.path), "quant": row.quant, "made": False})
        return
    place = out.expanduser().absolute() if out else copy_folder(row, asked, _variant(recipe))
    if place.exists() and not out:
        output.say(tr("it is here already: {path}", path=str(place)))
        if as_json:
            output.json_line({"event": "done", "path": str(place), "made": False})
        return
    plan = plan_quantise(row.path, place, recipe)
    if as_json:
        output.json_line({"event": "plan", **plan.to_json()})
    else:
        for line in _describe(plan, row.quant):
            output.say(line)
    if not dry_run:
        _execute(plan, row, as_json=as_json, quiet=quiet)


def _source(name: str, bits: int | None) -> tuple[Installed, int]:
    from glmchat.hub import references
    from glmchat.hub.lookup import find_installed

    reference = references.parse(name)
    named = quant_bits(reference.quant) if reference.quant else None
    if bits is not None and named is not None and bits != named:
        raise Usage(
            tr("{name} and --bits {bits} contradict each other", name=one_line(name), bits=bits),
            hint=tr("give one of them"),
            code="quant.bits",
        )
    asked = bits or named or 4
    row = find_installed(reference.base)
    if row is None:
        base = str(reference.base)
        raise NotInstalled(
            tr("{name} is not on this machine", name=one_line(base)), hint=f"glmchat pull {one_line(base)}"
        )
    return row, asked


def _recipe(bits: int, group_size: str, embeddings: str, *, symmetric: bool, fast: bool) -> Recipe:
    from glmchat.engine.quantize.replace import Recipe

    ends = {"auto": None, "4": 4, "8": 8, "16": 0}
    if embeddings not in ends:
        raise Usage(
            tr("--embeddings is {value}", value=repr(one_line(embeddings))),
            hint=tr("auto, 4, 8 or 16"),
            code="quant.embeddings",
        )
    if group_size != "auto" and not group_size.isdecimal():
        raise Usage(
            tr("--group-size is {value}", value=repr(one_line(group_size))),
            hint=tr("auto, 128, 64 or 32"),
            code="quant.group",
        )
    group = None if group_size == "auto" else int(group_size)
    return Recipe(bits, group, ends[embeddings], symmetric, fast)


def _variant(recipe: Recipe) -> str:
    """What sets a copy apart from the one with default settings, which is what `run --quant` looks for."""
    parts = []
    if recipe.group:
        parts.append(f"g{recipe.group}")
    if recipe.ends is not None:
        parts.append(f"ends{recipe.ends or 16}")
    parts += ["symmetric"] * recipe.symmetric + ["fast"] * recipe.fast
    return "-".join(parts)


def _describe(plan: QuantizePlan, stored: str) -> list[str]:
    """stored: the quantisation of the source."""
    told = plan.to_json()
    place = one_line(str(plan.out))
    widths = ", ".join(f"{count} x {kind}" for kind, count in sorted(told["tensors"].items()))
    lines = [
        tr(
            "{name} to {quant}: {before} become {after} ({free} are free)",
            name=one_line(plan.source.name),
            quant=plan.label,
            before=human_bytes(plan.bytes_in),
            after=human_bytes(plan.bytes_out),
            free=human_bytes(plan.bytes_free),
        ),
        tr("tensors: {widths}", widths=widths),
        tr("about {minutes} min, into {path}", minutes=f"{plan.seconds / 60:.1f}", path=place)
        if plan.seconds >= 60
        else tr("less than a minute, into {path}", path=place),
    ]
    if stored != "none" and plan.bytes_out > 0.9 * plan.bytes_in:
        lines.append(tr("little is gained: it is {quant} already", quant=one_line(stored)))
    return lines


def _execute(plan: QuantizePlan, row: Installed, *, as_json: bool, quiet: bool) -> None:
    from contextlib import nullcontext

    from glmchat.core import locations
    from glmchat.engine.quantize.quantiser import QuantizeProgress, execute
    from glmchat.hub.quantised_copies import copy_folder, copy_manifest

    if plan.out.parent == locations.models_dir():
        locations.private_dir(locations.data_dir())
        locations.private_dir(locations.models_dir())
    shown = -1

    def show(progress: QuantizeProgress) -> None:
        nonlocal shown
        percent = 100 * progress.done // max(progress.total, 1)
        if as_json:
            if percent != shown:
                output.json_line({"event": "progress", "done": progress.done, "total": progress.total})
        elif meter is not None:
            meter.update(tr("quantising"), percent, 100)
        shown = percent

    with nullcontext(None) if as_json or quiet else output.progress("steps") as meter:
        folder = execute(plan, manifest=copy_manifest(row, plan.recipe.bits), on_progress=show)
    if as_json:
        output.json_line({"event": "done", "path": str(folder), "quant": plan.label, "made": True})
    else:
        output.say(tr("done: {path}", path=one_line(str(folder))))
        if folder == copy_folder(row, plan.recipe.bits):
            output.say(f"glmchat run {shlex.quote(row.name)} --quant {plan.recipe.bits}")
