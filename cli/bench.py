"""`glmchat bench`: how fast a model is on this machine, and how near that is to what the memory bus allows."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from glmchat.cli import output
from glmchat.cli.completion import complete_models
from glmchat.cli.events import cancelled_by_interrupt
from glmchat.core.engine_options import EngineOptions, parse_device, parse_dtype
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.quant import parse_quant
from glmchat.core.text import human_bytes, one_line


def register(app: typer.Typer) -> None:
    app.command("bench")(bench)


def bench(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A model on this machine.", autocompletion=complete_models)
    ] = None,
    quant: Annotated[str | None, typer.Option(metavar="4|8", help="4 or 8 bits.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of context.", min=16)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Measure load time, prefill and decode speed, peak memory, and how much of the memory bus decoding uses."""
    from glmchat.chat import model_choice
    from glmchat.chat.jobs import run_job
    from glmchat.core.settings import load_settings

    asked = parse_quant(quant)
    settings = load_settings()
    wanted = model_choice.wanted_model(name, settings)
    if wanted is None:
        raise Usage(
            tr("no model was named"), hint=tr("glmchat bench NAME; `glmchat list` shows them"), code="model.none"
        )
    row, bits = model_choice.locate(wanted.text, quant=asked)
    options = EngineOptions(
        folder=row.path,
        quant=bits,
        dtype=parse_dtype(dtype),
        device=parse_device(device),
        threads=threads or settings.threads,
        context=context,
    )
    rows: list[tuple[Any, ...]] = []
    with cancelled_by_interrupt() as cancelled:
        for event in run_job("bench", {}, arguments=options.to_arguments(), cancelled=cancelled):
            if event["event"] == "plan":
                continue
            if event["event"] == "result":
                event = {**event, "event": "bench.machine"}
            if as_json:
                output.json_line({"model": row.name, "revision": row.revision, **event})
            else:
                _show(event, row.name, rows)


def _show(event: dict[str, Any], name: str, rows: list[tuple[Any, ...]]) -> None:
    if event["event"] == "bench.load":
        output.say(
            tr(
                "{name}: loaded in {seconds} s, {threads} threads, {kernel}",
                name=one_line(name),
                seconds=f"{event['load_seconds']:.1f}",
                threads=event["threads"],
                kernel=event["kernel"],
            )
        )
    elif event["event"] == "bench.length":
        speeds = (event["prefill_tokens_per_second"], event["decode_tokens_per_second"])
        rows.append((event["prompt_tokens"], *(f"{speed:.1f}" for speed in speeds)))
    else:
        output.table((tr("prompt"), tr("prefill tok/s"), tr("decode tok/s")), rows, right=(0, 1, 2))
        output.data(
            tr(
                "{threads} threads read {bus}/s from memory, decoding {percent} % of that; peak memory {peak}",
                bus=human_bytes(event["read_bytes_per_second"]),
                threads=event["threads"],
                percent=f"{100 * event['decode_fraction']:.0f}",
                peak=human_bytes(event["peak_rss_bytes"]),
            )
        )
