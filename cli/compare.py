"""`glmchat compare`: for people one answer after the other, for programs JSON lines."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from glmchat.cli import output
from glmchat.cli.completion import complete_columns
from glmchat.cli.engine_flags import EngineFlags, with_engine_flags
from glmchat.cli.output import on_interrupt
from glmchat.core.errors import GlmchatError, Interrupted, Usage
from glmchat.core.language import tr
from glmchat.core.messages import Finished, Piece, Sampling
from glmchat.core.text import one_line

if TYPE_CHECKING:
    from glmchat.chat.compare.compare import Comparison, ComparisonEvent


class TextPrinter:
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
        from glmchat.chat.compare.columns import OneByOne
        from glmchat.chat.compare.compare import ColumnFailed, Said

        if isinstance(event, OneByOne):
            output.say(tr("one after another: {why}", why=event.reason))
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
            tr("conversation {id}; --pick N continues with the Nth answer", id=self._comparison.tree.conversation.id)
        )


class JsonPrinter:
    """start; then column, text and end (or failed) with the column's number; done."""

    def __init__(self, comparison: Comparison) -> None:
        self.failed: list[GlmchatError] = []
        self._comparison = comparison
        self._ids: dict[int, list[int]] = {}
        self._started = False

    def take(self, event: ComparisonEvent) -> None:
        from glmchat.chat.answering import Begun, Done
        from glmchat.chat.compare.columns import OneByOne, Together
        from glmchat.chat.compare.compare import ColumnFailed, Said

        if isinstance(event, Together | OneByOne):
            self._start(event.reason if isinstance(event, OneByOne) else None)
        elif isinstance(event, ColumnFailed):
            self.failed.append(event.error)
            output.json_line({"event": "failed", "column": event.column, "error": event.error.to_json()})
        elif isinstance(event, Said):
            news = event.event
            if isinstance(news, Begun):
                self._ids[event.column] = []
                names = ("model", "revision", "quant", "adapters", "sampling")
                row = {name: news.answer.details.get(name) for name in names}
                output.json_line({"event": "column", "column": event.column, "message": news.answer.id, **row})
            elif isinstance(news, Piece):
                self._ids[event.column].extend(news.token_ids)
                output.json_line({"event": "text", "column": event.column, "text": news.text})
            elif isinstance(news, Finished):
                output.json_line({"event": "end", "column": event.column, **_numbers(news, self._ids[event.column])})
            elif isinstance(news, Done):
                facts = news.answer.details.get("stretches") or [{}]
                weights = facts[-1].get("weights") or {}
                hashes = {"weights": weights.get("hash"), "adapter_hashes": facts[-1].get("adapter_hashes")}
                row = {"message": news.answer.id, "state": news.answer.state, **hashes}
                output.json_line({"event": "stored", "column": event.column, **row})

    def _start(self, reason: str | None) -> None:
        comparison = self._comparison
        columns = [
            {
                "column": i,
                "text": c.text,
                "model": launch.engine.model,
                "quant": launch.engine.quant_label,
                "revision": launch.engine.revision,
            }
            for i, (c, launch) in enumerate(zip(comparison.columns, comparison.launches, strict=True))
        ]
        question = comparison.question.id if comparison.question else None
        row = {"conversation": comparison.tree.conversation.id, "question": question, "one_by_one": reason}
        output.json_line({"event": "start", **row, "columns": columns})

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


def register(app: typer.Typer) -> None:
    app.command("compare")(with_engine_flags(compare, without=("quant", "revision", "dtype", "products", "device")))


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
        bool, typer.Option("--one-by-one", help="Never write two answers at once, so that speeds can be compared.")
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

    The answers are stored as versions of one answer, each with its identity. Columns of one model and its adapters are
    answered together by one engine; several engines answer at the same time where cores and memory allow it.

    Exit code 0: every column answered. Else that of the first that failed; the others' answers are kept. 130: stopped.
    """
    from glmchat.chat.compare.columns import parse_columns
    from glmchat.chat.compare.compare import Comparison
    from glmchat.chat.compare.compare import resume as resumed
    from glmchat.chat.history.history import History
    from glmchat.chat.launch import LaunchOptions
    from glmchat.cli.asking import read_stdin
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
