"""`glmchat compare`: one prompt to several models, quantisations, adapters or settings."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glmchat.cli import output
from glmchat.cli.completion import complete_columns
from glmchat.core.errors import GlmchatError, Interrupted, Usage
from glmchat.core.language import tr
from glmchat.core.messages import Finished, Piece, Sampling
from glmchat.core.text import one_line

if TYPE_CHECKING:
    from glmchat.chat.compare import Comparison, ComparisonEvent


def register(app: typer.Typer) -> None:
    app.command("compare")(compare)


def compare(
    columns: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME[:int4][+ADAPTER[:WEIGHT]][,SETTING=VALUE]…",
            help="Two or more. An empty NAME is the model before: `smollm2 +poet ,temp=0`.",
            autocompletion=complete_columns,
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="Default: stdin.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A sampling setting of all; repeatable.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", metavar="TEXT", help="System prompt.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Of each engine.")] = None,
    context: Annotated[int | None, typer.Option("--context", min=16, help="Tokens of context to hold.")] = None,
    one_by_one: Annotated[
        bool, typer.Option("--one-by-one", help="Never two engines at once: speeds can be compared.")
    ] = False,
    pick: Annotated[
        int | None, typer.Option("--pick", metavar="N", min=1, help="Go on with the Nth answer (`run -c`).")
    ] = None,
    resume: Annotated[
        int | None, typer.Option("--resume", metavar="ID", help="Bring the answers that a kill left missing.")
    ] = None,
    no_history: Annotated[bool, typer.Option("--no-history", help="Save nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout, each with its column.")] = False,
) -> None:
    """Ask several models, quantisations, adapters or settings the same, side by side.

    The answers are stored as versions of one answer, each with its identity. Engines answer at the same time where
    cores and memory allow it, else one after the other.
    """
    from glmchat.chat.compare import Comparison
    from glmchat.chat.compare import resume as resumed
    from glmchat.chat.comparison_columns import parse_columns
    from glmchat.chat.history import History
    from glmchat.chat.launch import LaunchOptions
    from glmchat.cli.asking import read_stdin
    from glmchat.cli.replay import _changes
    from glmchat.core.settings import load_settings

    settings = load_settings()
    sampling = _changes(setting or [])
    Sampling(**sampling)
    base = LaunchOptions(
        sampling=sampling,
        system=system,
        device="auto",
        threads=threads or settings.threads,
        context=context or settings.context,
    )
    if resume is not None and (columns or prompt is not None or no_history):
        raise Usage(
            tr("--resume takes columns and prompt from the history"),
            hint=tr("give --resume alone"),
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
            raise Usage(tr("there are {n} columns", n=len(comparison.columns)), hint="--pick N", code="compare.pick")
        printer = _JsonPrinter(comparison) if as_json else _TextPrinter(comparison)
        with _stopping_on_interrupt(comparison) as stopped, closing(events):
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


@contextmanager
def _stopping_on_interrupt(comparison: Comparison) -> Iterator[threading.Event]:
    """The first Ctrl-C ends the answers and keeps what was said; the second ends everything."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stopped.set()
        threading.Thread(target=comparison.stop, daemon=True).start()  # the handler must not wait for a lock

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


class _TextPrinter:
    """Column after column on stdout; what a later one says meanwhile waits."""

    def __init__(self, comparison: Comparison) -> None:
        self.failed: list[GlmchatError] = []
        self._comparison = comparison
        self._text: dict[int, list[str]] = {i: [] for i in range(len(comparison.columns))}
        self._notes: dict[int, str] = {}
        self._over: set[int] = set()
        self._now = 0
        self._open = False

    def take(self, event: ComparisonEvent) -> None:
        from glmchat.chat.compare import ColumnFailed, Said
        from glmchat.chat.comparison_engines import OneByOne

        if isinstance(event, OneByOne):
            output.say(tr("one after the other: {why}", why=event.reason))
        elif isinstance(event, ColumnFailed):
            self.failed.append(event.error)
            self._notes[event.column] = f"{event.error.message} ({event.error.hint})"
            self._ended(event.column)
        elif isinstance(event, Said) and isinstance(event.event, Piece):
            self._text[event.column].append(event.event.text)
            self._print()
        elif isinstance(event, Said) and isinstance(event.event, Finished):
            self._notes[event.column] = _summary(event.event)
            self._ended(event.column)

    def _ended(self, column: int) -> None:
        self._over.add(column)
        self._print()

    def _print(self) -> None:
        while self._now < len(self._text):
            pieces = self._text[self._now]
            if pieces or self._now in self._over:
                if not self._open:
                    output.data(f"== {self._now + 1}  {one_line(self._comparison.columns[self._now].text)}")
                    self._open = True
                output.data("".join(pieces), end="")
                pieces.clear()
            if self._now not in self._over:
                return
            output.data("")
            output.say(self._notes[self._now])
            self._now, self._open = self._now + 1, False

    def end(self) -> None:
        self._over |= set(self._text)
        for column in self._text:
            self._notes.setdefault(column, tr("no answer"))
        self._print()
        output.say(
            tr("conversation {id}; --pick N goes on with the Nth answer", id=self._comparison.tree.conversation.id)
        )


class _JsonPrinter:
    """start; then column, text and end (or failed) with the column's number; done."""

    def __init__(self, comparison: Comparison) -> None:
        self.failed: list[GlmchatError] = []
        self._comparison = comparison
        self._ids: dict[int, list[int]] = {}
        self._started = False

    def take(self, event: ComparisonEvent) -> None:
        from glmchat.chat.answering import Begun, Done
        from glmchat.chat.compare import ColumnFailed, Said
        from glmchat.chat.comparison_engines import OneByOne, Together

        if isinstance(event, Together | OneByOne):
            self._start(event.reason if isinstance(event, OneByOne) else None)
        elif isinstance(event, ColumnFailed):
            self.failed.append(event.error)
            output.json_line({"event": "failed", "column": event.column, "error": event.error.to_json()})
        elif isinstance(event, Said):
            said = event.event
            if isinstance(said, Begun):
                self._ids[event.column] = []
                names = ("model", "revision", "quant", "adapters", "sampling")
                told = {name: said.answer.details.get(name) for name in names}
                output.json_line({"event": "column", "column": event.column, "message": said.answer.id, **told})
            elif isinstance(said, Piece):
                self._ids[event.column].extend(said.token_ids)
                output.json_line({"event": "text", "column": event.column, "text": said.text})
            elif isinstance(said, Finished):
                output.json_line({"event": "end", "column": event.column, **_numbers(said, self._ids[event.column])})
            elif isinstance(said, Done):
                facts = said.answer.details.get("stretches") or [{}]
                weights = facts[-1].get("weights") or {}
                hashes = {"weights": weights.get("hash"), "adapter_hashes": facts[-1].get("adapter_hashes")}
                told = {"message": said.answer.id, "state": said.answer.state, **hashes}
                output.json_line({"event": "stored", "column": event.column, **told})

    def _start(self, reason: str | None) -> None:
        comparison = self._comparison
        columns = [
            {
                "column": i,
                "text": c.text,
                "model": launch.model,
                "quant": launch.quant_label,
                "revision": launch.revision,
            }
            for i, (c, launch) in enumerate(zip(comparison.columns, comparison.launches, strict=True))
        ]
        question = comparison.question.id if comparison.question else None
        told = {"conversation": comparison.tree.conversation.id, "question": question, "one_by_one": reason}
        output.json_line({"event": "start", **told, "columns": columns})

    def end(self) -> None:
        output.json_line({"event": "done", "conversation": self._comparison.tree.conversation.id})


def _numbers(event: Finished, ids: list[int]) -> dict[str, Any]:
    names = (
        "finish_reason", "prompt_tokens", "completion_tokens", "ttft_seconds", "prefill_tokens_per_second",
        "decode_tokens_per_second", "load_seconds", "seed",
    )  # fmt: skip
    return {**{name: getattr(event, name) for name in names}, "token_ids": ids}


def _summary(event: Finished) -> str:
    speed = event.decode_tokens_per_second
    return tr(
        "{tokens} tokens, {speed} tok/s, seed {seed}",
        tokens="?" if event.completion_tokens is None else event.completion_tokens,
        speed="?" if speed is None else f"{speed:.1f}",
        seed="?" if event.seed is None else event.seed,
    )
