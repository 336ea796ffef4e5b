"""One answer: text on stdout and nothing else there, or JSON lines."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from glmchat.chat.answering import Begun, Done, Trimmed, cut_note, system_note, trimmed_note
from glmchat.chat.connect import Connection, Purpose, connect, open_session, unused_card
from glmchat.chat.hangup import EXIT, ending_on_kill, listening
from glmchat.chat.history.history import History
from glmchat.chat.launch import LaunchOptions
from glmchat.chat.session import ChatSession
from glmchat.cli import output
from glmchat.core.errors import EngineDied, Interrupted
from glmchat.core.language import tr
from glmchat.core.messages import Finished, Message, Piece, Started
from glmchat.core.settings import Settings

_QUIET_SECONDS = 1.0  # a load that is done by then says nothing


def answer_once(
    history: History,
    launch: LaunchOptions,
    settings: Settings,
    question: str | Sequence[Message] | None,
    *,
    as_json: bool,
    stream: bool,
    complete: bool = False,
) -> int:
    """Load, ask, print; returns the exit code: 0, or 130 if it was interrupted (what was said is printed and kept).

    Raises GlmchatError. A prompt that does not fit is refused (exit 4), nothing is dropped.
    """
    session = open_session(history, launch, settings)  # an unknown conversation is told before anything is loaded
    session.default_policy = "refuse"
    if launch.resume is None:
        session.mark_one_shot()
    with loaded(launch, "completion" if complete else "answer") as connection:
        session.reconnect(connection.endpoint, connection.identity)
        printer = _JsonPrinter(session) if as_json else _TextPrinter(session, stream)
        if isinstance(question, str):
            answer = session.complete(question) if complete else session.ask(question)
        else:
            answer = session.ask_messages(question or ())
        try:
            with (
                listening(session, finish_answer=launch.finish_on_hangup) as terminal,
                stopping_on_interrupt(session),
                closing(answer) as events,
            ):
                for event in events:
                    printer.take(event)
        except EngineDied as error:
            raise connection.cause(error) from None
    if history.path is not None and not history.saved:
        output.say(tr("the answer was not saved: {why}", why=history.problem or ""))
    if terminal.gone:
        return EXIT
    return Interrupted.exit if printer.cancelled else 0


@contextmanager
def loaded(launch: LaunchOptions, purpose: Purpose = "chat") -> Iterator[Connection]:
    """The engine or server, with progress on a terminal once it takes longer than a second."""
    began = time.monotonic()
    shown: list[Any] = []

    def on_progress(stage: str, done: float) -> None:
        if not output.is_terminal(sys.stderr) or (not shown and time.monotonic() - began < _QUIET_SECONDS):
            return
        if not shown:
            bars = output.progress("steps", passing=True)
            shown.extend((bars, bars.__enter__()))
        shown[1].update(tr("Loading {model}", model=launch.engine.model or ""), round(done * 100), 100)

    try:
        connection = connect(launch, on_progress, purpose=purpose)
    except KeyboardInterrupt:
        raise Interrupted(tr("cancelled while loading"), hint=tr("run it again"), code="interrupted") from None
    finally:
        if shown:
            shown[0].__exit__(None, None, None)
    with connection:
        if (words := unused_card(connection.identity.device, connection.identity.device_reason)) is not None:
            output.say(words)
        yield connection


@contextmanager
def stopping_on_interrupt(session: ChatSession) -> Iterator[None]:
    """The first Ctrl-C ends the answer and keeps what was said; the second, and SIGTERM, ends everything."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        session.stop()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with ending_on_kill([session]):
            yield
    finally:
        signal.signal(signal.SIGINT, before)


class _TextPrinter:
    """The answer as a person reads it; a word about its end on stderr where it did not end by itself."""

    def __init__(self, session: ChatSession, stream: bool) -> None:
        self.cancelled = False
        self._stream = stream
        self._saved = session.history.path is not None
        self._whole: list[str] = []
        self._last = "\n"

    def take(self, event: object) -> None:
        if isinstance(event, Piece):
            self._say(event.text)
        elif isinstance(event, Trimmed) and event.greeting:
            output.say(trimmed_note(event))
        elif isinstance(event, Finished):
            if not self._stream:
                self._print("".join(self._whole))
            if self._last != "\n":
                output.data("")
            self._end(event)

    def _say(self, text: str) -> None:
        if self._stream:
            self._print(text)
        else:
            self._whole.append(text)

    def _print(self, text: str) -> None:
        if text:
            output.data(text, end="")
            self._last = text[-1]

    def _end(self, event: Finished) -> None:
        if event.finish_reason == "cancelled":
            self.cancelled = True
            if self._saved:
                output.say(tr("stopped; `glmchat run -c` continues the conversation"))
        elif event.finish_reason == "length":
            output.say(cut_note(event.facts))
        if note := system_note(event.facts):
            output.say(note)
        if ignored := event.facts.get("ignored"):
            output.say(tr("the server ignored: {names}", names=", ".join(map(str, ignored))))


class _JsonPrinter:
    """start, text …, end. What a server does not send is null."""

    def __init__(self, session: ChatSession) -> None:
        self.cancelled = False
        self._session = session
        self._ids: list[int] = []
        self._started = False
        self._prompt_tokens: int | None = None

    def take(self, event: object) -> None:
        if isinstance(event, Begun | Trimmed | Done):
            return
        if isinstance(event, Started):
            self._start(event)
        elif isinstance(event, Piece):
            self._ids.extend(event.token_ids)
            if event.text:  # an id that ends the answer, or holds the first half of a character, says nothing yet
                output.json_line({"event": "text", "text": event.text})
        elif isinstance(event, Finished):
            if not self._started:  # stopped before the first word
                self._start(Started())
            self.cancelled = event.finish_reason == "cancelled"
            self._end(event)

    def _start(self, event: Started) -> None:
        self._started = True
        self._prompt_tokens = event.prompt_tokens
        who = self._session.identity
        adapters = [name if scale == 1.0 else f"{name}:{scale:g}" for name, scale in self._session.adapters]
        output.json_line(
            {
                "event": "start",
                "model": who.model or event.model,
                "revision": who.revision,
                "quant": who.quant,
                "adapter": "+".join(adapters) or None,
                "prompt_tokens": event.prompt_tokens,
            }
        )

    def _end(self, event: Finished) -> None:
        output.json_line(
            {
                "event": "end",
                "finish_reason": event.finish_reason,
                "prompt_tokens": event.prompt_tokens if event.prompt_tokens is not None else self._prompt_tokens,
                "completion_tokens": event.completion_tokens,
                "token_ids": self._ids or ([] if event.completion_tokens == 0 else None),
                "ttft_seconds": event.ttft_seconds,
                "prefill_tokens_per_second": event.prefill_tokens_per_second,
                "decode_tokens_per_second": event.decode_tokens_per_second,
                "load_seconds": event.load_seconds,
                "seed": event.seed,
                **({"ignored": ignored} if (ignored := event.facts.get("ignored")) else {}),
            }
        )
