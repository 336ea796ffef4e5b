"""`glmchat compare`: one prompt to several models, quantisations, adapters or settings."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import Annotated

import typer

from glmchat.cli import output
from glmchat.cli.completion import complete_columns
from glmchat.cli.engine_flags import EngineFlags, with_engine_flags
from glmchat.cli.events import on_interrupt
from glmchat.core.errors import Interrupted, Usage
from glmchat.core.language import tr
from glmchat.core.messages import Sampling


def register(app: typer.Typer) -> None:
    app.command("compare")(with_engine_flags(compare, without=("quant", "revision", "dtype", "device")))


def compare(
    *,
    columns: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME[:int4][+ADAPTER[:WEIGHT]][,SETTING=VALUE]…",
            help="Two or more. An empty NAME repeats the model before it: `smollm2 +poet ,temp=0`.",
            autocompletion=complete_columns,
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="Default: stdin.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A sampling setting for all columns; repeatable."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", metavar="TEXT", help="System prompt.")] = None,
    engine: EngineFlags,
    one_by_one: Annotated[
        bool, typer.Option("--one-by-one", help="Never run two engines at once, so that speeds can be compared.")
    ] = False,
    pick: Annotated[
        int | None, typer.Option("--pick", metavar="N", min=1, help="Continue with the Nth answer (`run -c`).")
    ] = None,
    resume: Annotated[
        int | None, typer.Option("--resume", metavar="ID", help="Get the answers that are missing after a kill.")
    ] = None,
    no_history: Annotated[bool, typer.Option("--no-history", help="Save nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout, each with its column.")] = False,
) -> None:
    """Ask several models, quantisations, adapters or settings the same question, side by side.

    The answers are stored as versions of one answer, each with its identity. Engines answer at the same time where
    cores and memory allow it, else one after the other.

    Exit code 0: every column answered. Else that of the first that failed; the others' answers are kept. 130: stopped.
    """
    from glmchat.chat.compare.columns import parse_columns
    from glmchat.chat.compare.compare import Comparison
    from glmchat.chat.compare.compare import resume as resumed
    from glmchat.chat.history.history import History
    from glmchat.chat.launch import LaunchOptions
    from glmchat.cli.asking import read_stdin
    from glmchat.cli.compare_output import JsonPrinter, TextPrinter
    from glmchat.cli.replay import sampling_changes
    from glmchat.core.settings import load_settings

    settings = load_settings()
    sampling = sampling_changes(setting or [])
    Sampling(**sampling)
    base = LaunchOptions(engine=engine.options(settings), sampling=sampling, system=system)
    if resume is not None and (columns or prompt is not None or no_history):
        raise Usage(
            tr("--resume takes the columns and the prompt from the history"),
            hint=tr("use --resume alone"),
            code="compare.resume",
        )
    if resume is None:
        parsed = parse_columns(columns or [])
        text = prompt if prompt is not None else read_stdin(wait=True)
        if not text:
            raise Usage(tr("there is no prompt"), hint=tr("-p TEXT, or text on stdin"), code="run.no_prompt")
    with History.open(None) if no_history else History.default() as history:
        if resume is None:
            comparison = Comparison(history, parsed, settings, base=base, one_by_one=one_by_one)
            events = comparison.ask(str(text))
        else:
            comparison = resumed(history, history.load(resume), settings, base)
            events = comparison.go_on()
        if pick is not None and pick > len(comparison.columns):
            raise Usage(
                tr("there are {n} columns", n=len(comparison.columns)), hint=tr("--pick N"), code="compare.pick"
            )
        printer = JsonPrinter(comparison) if as_json else TextPrinter(comparison)
        stopped = threading.Event()

        def stop() -> None:  # an answer keeps what was said
            stopped.set()
            threading.Thread(target=comparison.stop, daemon=True).start()  # a handler must not wait for a lock

        with on_interrupt(stop), closing(events):
            for event in events:
                printer.take(event)
        printer.end()
        if pick is not None:
            comparison.pick(pick - 1)
        if not no_history and not history.saved:
            output.say(tr("the answer was not saved: {why}", why=history.problem or ""))
    if stopped.is_set():
        raise typer.Exit(Interrupted.exit)
    if printer.failed:
        raise typer.Exit(printer.failed[0].exit)
