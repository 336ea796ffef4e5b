"""`glmchat quantize`: what is to be quantised, and in words what jobs/quantise.py plans and does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glmchat.checkpoints.families import refuse_quantising
from glmchat.checkpoints.fit import check_weights, config_at
from glmchat.cli import output
from glmchat.cli.completion import complete_installed
from glmchat.cli.output import cancelled_by_interrupt, follow_job, printed_events
from glmchat.core.engine_options import parse_quant, quant_bits
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.locations import user_path
from glmchat.core.shell import shell_word
from glmchat.core.text import one_line

if TYPE_CHECKING:
    from glmchat.hub.installed import Installed


def register(app: typer.Typer) -> None:
    app.command("quantize")(quantize)
    app.command("quantise", hidden=True)(quantize)


def quantize(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME[:int4|:int8]", help="A model on this machine, or a folder.", autocompletion=complete_installed
        ),
    ],
    bits: Annotated[str | None, typer.Option("--bits", "-b", metavar="4|8", help="Bits per weight.")] = None,
    group_size: Annotated[
        str, typer.Option(metavar="auto|N", help="Inputs that share a scale at 4 bits: 128, 64 or 32.")
    ] = "auto",
    embeddings: Annotated[
        str,
        typer.Option(
            metavar="auto|4|8|16",
            help="Bits for embedding and head; auto: 8, or 16 for a 4-bit Llama that other programs can read.",
        ),
    ] = "auto",
    symmetric: Annotated[bool, typer.Option("--symmetric", help="No zero points at 4 bits.")] = False,
    fast: Annotated[bool, typer.Option("--fast", help="Round to nearest instead of searching for scales.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Where to write it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan, write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Make a 4-bit or 8-bit copy of a model that needs a quarter or half of the memory."""
    row, asked = _source(name, parse_quant(bits, "--bits"))
    recipe = _recipe(asked, group_size, embeddings, symmetric=symmetric, fast=fast)
    if row.quant.startswith(f"int{asked}") and not out:
        output.say(tr("{name} already has {bits} bits: nothing to do", name=one_line(row.name), bits=asked))
        if as_json:
            output.json_line({"event": "done", "path": str(row.path), "quant": row.quant, "made": False})
        return
    from glmchat.hub.installed import copy_folder, copy_manifest

    place = user_path(out) if out else copy_folder(row, asked, _variant(recipe))
    if place.exists() and not out:
        output.say(tr("it already exists: {path}", path=str(place)))
        if as_json:
            output.json_line({"event": "done", "path": str(place), "made": False})
        return
    request = {"source": str(row.path), "out": str(place), "recipe": recipe, "stored": row.quant, "dry_run": dry_run}
    result = _run({**request, "manifest": copy_manifest(row, asked)}, as_json=as_json, quiet=quiet)
    if dry_run:
        return
    if as_json:
        output.json_line({"event": "done", **result})
        return
    output.say(tr("done: {path}", path=one_line(result["path"])))
    if place == copy_folder(row, asked):
        output.say(f"glmchat run {shell_word(row.name)} --quant {asked}")


def _run(request: dict[str, Any], *, as_json: bool, quiet: bool) -> dict[str, Any]:
    from glmchat.chat.jobs import run_job

    with cancelled_by_interrupt() as cancelled, printed_events(as_json=as_json, quiet=quiet, unit="steps") as show:
        return follow_job(run_job("quantise", request, cancelled=cancelled), show)


def _source(name: str, bits: int | None) -> tuple[Installed, int]:
    from glmchat.chat.launch import not_installed, unfinished
    from glmchat.hub import references
    from glmchat.hub.lookup import find_installed

    reference = references.parse(name)
    named = quant_bits(reference.quant) if reference.quant else None
    if bits is not None and named is not None and bits != named:
        raise Usage(
            tr("{name} and --bits {bits} conflict", name=one_line(name), bits=bits),
            hint=tr("give one of them"),
            code="quant.bits",
        )
    asked = bits or named or 4
    row = find_installed(reference.base)
    if row is None:
        raise not_installed(reference)
    if not row.complete:
        raise unfinished(row)
    refuse_quantising(config_at(row.path))
    check_weights(row.path)
    return row, asked


def _recipe(bits: int, group_size: str, embeddings: str, *, symmetric: bool, fast: bool) -> dict[str, Any]:
    """The fields of checkpoints.recipe.Recipe, which refuses what no kernel takes."""
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
    return {"bits": bits, "group": group, "ends": ends[embeddings], "symmetric": symmetric, "fast": fast}


def _variant(recipe: Mapping[str, Any]) -> str:
    """What sets a copy apart from the one with default settings, which is what `run --quant` looks for."""
    parts = []
    if recipe["group"]:
        parts.append(f"g{recipe['group']}")
    if recipe["ends"] is not None:
        parts.append(f"ends{recipe['ends'] or 16}")
    parts += ["symmetric"] * recipe["symmetric"] + ["fast"] * recipe["fast"]
    return "-".join(parts)
