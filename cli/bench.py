"""`glmchat bench`: how fast a model is on this machine, and how near that is to what the memory bus allows."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer

from glmchat.checkpoints.families import refuse_quantising
from glmchat.checkpoints.fit import check_weights, config_at
from glmchat.cli import output
from glmchat.cli.completion import complete_installed
from glmchat.cli.engine_flags import EngineFlags, with_engine_flags
from glmchat.cli.output import cancelled_by_interrupt
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line


def register(app: typer.Typer) -> None:
    app.command("bench")(with_engine_flags(bench, without=("revision", "keep_alive")))


def bench(
    *,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A model on this machine.", autocompletion=complete_installed)
    ] = None,
    engine: EngineFlags,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Measure load time, prefill and decode speed, peak memory, and how much of the memory bus decoding uses."""
    from glmchat.chat.jobs import run_job
    from glmchat.chat.launch import locate, wanted_model
    from glmchat.core.settings import load_settings

    asked = engine.bits
    settings = load_settings()
    choice = wanted_model(name, settings)
    if choice is None:
        raise Usage(
            tr("no model was named"), hint=tr("glmchat bench NAME; `glmchat list` shows them"), code="model.none"
        )
    row, bits = locate(choice.text, quant=asked)
    if bits is not None:
        refuse_quantising(config_at(row.path))
    check_weights(row.path)
    options = replace(engine.options(settings), folder=row.path, quant=bits, context=engine.context)
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
        if event.get("card"):
            output.say(
                tr(
                    "on {device}: {card}, compute capability {capability}, driver {driver}, CUDA {cuda}",
                    device=event["device"],
                    card=one_line(event["card"]),
                    capability=event["capability"],
                    driver=event["driver"],
                    cuda=event["cuda"],
                )
            )
        elif event.get("device_reason"):
            output.say(tr("on the CPU: {reason}", reason=one_line(event["device_reason"])))
    elif event["event"] == "bench.length":
        speeds = (event["prefill_tokens_per_second"], event["decode_tokens_per_second"])
        rows.append((event["prompt_tokens"], *(f"{speed:.1f}" for speed in speeds)))
    else:
        output.table((tr("prompt"), tr("prefill tok/s"), tr("decode tok/s")), rows, right=(0, 1, 2))
        bus, percent = human_bytes(event["read_bytes_per_second"]), f"{100 * event['decode_fraction']:.0f}"
        if event.get("card"):
            output.data(
                tr(
                    "{card} reads {bus}/s from its memory, decoding {percent} % of that; peak {peak} of its memory",
                    card=one_line(event["card"]),
                    bus=bus,
                    percent=percent,
                    peak=human_bytes(event["card_peak_bytes"]),
                )
            )
            return
        output.data(
            tr(
                "{threads} threads read {bus}/s from memory, decoding {percent} % of that; peak memory {peak}",
                bus=bus,
                threads=event["threads"],
                percent=percent,
                peak=human_bytes(event["peak_rss_bytes"]),
            )
        )
