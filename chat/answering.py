"""A stream read by a thread of its own, so that its reader can stop at once and act while nothing comes."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from glmchat.chat.client.endpoint import Progress, Stop
from glmchat.chat.history.history import History
from glmchat.chat.history.rows import State, StoredMessage, Tree
from glmchat.chat.replay import record
from glmchat.core.messages import Finished, Message, Piece, Sampling, Started, StreamEvent

PumpEvent = StreamEvent | Progress
Source = Callable[[Callable[[Progress], None]], Generator[StreamEvent, None, None]]


class Ended(Exception):
    """The stream is over."""


class Pump:
    """Opens and reads a stream in a thread. `open_stream` is given a function for what comes before the answer."""

    def __init__(self, open_stream: Source) -> None:
        self._open = open_stream
        self._events: queue.Queue[PumpEvent | BaseException] = queue.Queue(maxsize=256)
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="answer", daemon=True).start()

    def get(self, timeout: float) -> PumpEvent | None:
        """The next event; None if none came in time. Raises Ended, or what the stream raised."""
        try:
            event = self._events.get(timeout=max(timeout, 0.001))
        except queue.Empty:
            return None
        if isinstance(event, BaseException):
            raise event
        return event

    def stop(self) -> None:
        """Nobody reads any more: the thread closes the stream at its next event and ends."""
        self._stopped.set()

    def _run(self) -> None:
        last: BaseException = Ended()
        source = None
        try:
            source = self._open(self._report)
            for event in source:
                if not self._offer(event):
                    break
        except Exception as error:  # noqa: BLE001  (handed to the reader, who raises it)
            last = error
        finally:
            if source is not None:
                source.close()
        self._offer(last)

    def _report(self, progress: Progress) -> None:
        self._offer(progress)

    def _offer(self, event: PumpEvent | BaseException) -> bool:
        """Hand over one event, waiting for a slow reader; False once the reader has stopped."""
        while not self._stopped.is_set():
            try:
                self._events.put(event, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False


FLUSH_SECONDS = 0.4  # a kill loses at most what was said since; the promise is one second
_POLL = 0.05  # how soon a stop is noticed while nothing comes
_LAST_WORDS = 1.0  # how long a stopped server may take to say what it counted
_STATES: Mapping[str | None, State] = {"length": "cut", "cancelled": "stopped"}


class Speaker(Protocol):
    """What a session needs of an endpoint (chat/client/endpoint.py has the real one)."""

    @property
    def is_local(self) -> bool: ...

    def stream(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        adapters: Sequence[tuple[str, float]] | None = None,
        continue_final: bool = False,
        *,
        continue_ids: Sequence[int] = (),
        asked: Collection[str] | None = None,
        stop: Stop | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Generator[StreamEvent, None, None]: ...

    def complete(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling,
        adapters: Sequence[tuple[str, float]] | None = None,
        *,
        asked: Collection[str] | None = None,
        stop: Stop | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Generator[StreamEvent, None, None]: ...

    def tokenize(self, text: str | Sequence[Message], *, continue_final: bool = False) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Begun:
    """The question is stored and an empty answer stands below it. question None: nothing new was asked."""

    question: StoredMessage | None
    answer: StoredMessage


@dataclass(frozen=True, slots=True)
class Trimmed:
    """From this request on the model does not see these messages (oldest whole turns). Empty: it sees all again."""

    unseen: tuple[int, ...]
    tokens: int | None
    limit: int | None


@dataclass(frozen=True, slots=True)
class Done:
    """The answer as it now stands in the history."""

    answer: StoredMessage


SessionEvent = Begun | Trimmed | Progress | Started | Piece | Finished | Done
Answer = Generator[SessionEvent, None, None]


class Switch:
    """The stop of a session: one answer at a time, stopped from any thread."""

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._lock = threading.RLock()  # a signal handler may call `now` in the thread that holds it
        self._wanted = False
        self._connection: Stop | None = None

    @property
    def busy(self) -> bool:
        return self._busy.locked()

    @property
    def wanted(self) -> bool:
        return self._wanted

    def take(self) -> bool:
        """Begin an answer; False if one is running."""
        if not self._busy.acquire(blocking=False):
            return False
        with self._lock:
            self._wanted, self._connection = False, None
        return True

    def give_back(self) -> None:
        self._busy.release()

    def connection(self) -> Stop:
        """The stop of one request; pulled at once if a stop is wanted already."""
        with self._lock:
            self._connection = Stop()
            if self._wanted:
                self._connection.now()
            return self._connection

    def now(self) -> None:
        with self._lock:
            if self._busy.locked():
                self._wanted = True
                if self._connection is not None:
                    self._connection.now()


class Writing:
    """Gathers the pieces of an answer and flushes them into the history twice a second."""

    def __init__(self, history: History, tree: Tree, answer: StoredMessage, details: dict[str, Any]) -> None:
        self.details = details
        self.said = False
        self.ended = False
        self.prompt_ids: tuple[int, ...] | None = None
        self._stretch: dict[str, Any] | None = None
        self._history, self._tree, self._answer = history, tree, answer
        self._text: list[str] = []
        self._ids: list[int] = []
        self._flushed = time.monotonic()  # the wall clock may go backwards

    def add(self, piece: Piece) -> None:
        self.said = True
        self.record(piece.facts)
        self._text.append(piece.text)
        self._ids.extend(piece.token_ids)

    def record(self, facts: Mapping[str, Any]) -> None:
        """What a replay of this stretch needs: at the first piece, at the end for an answer without a visible word.

        Hashes that the server did not know then are added when it tells them.
        """
        if self.prompt_ids is None or not facts.get("passes"):
            return
        if self._stretch is None:
            start, launch = len(self._answer.token_ids), self.details.get("launch")
            self._stretch = record.stretch(start, self.prompt_ids, facts, launch)
            self.details["stretches"] = [*(self.details.get("stretches") or []), self._stretch]
        elif not record.add_hashes(self._stretch, facts):
            return
        self._history.describe_answer(self._tree, self._answer, self.details)

    def due(self) -> float:
        """Seconds until the next flush."""
        return max(0.0, self._flushed + FLUSH_SECONDS - time.monotonic())

    def flush(self) -> None:
        if self._text or self._ids:
            self._history.add_piece(self._tree, self._answer, "".join(self._text), self._ids)
            self._text, self._ids = [], []
        self._flushed = time.monotonic()

    def end(self, state: State, details: Mapping[str, Any] | None = None) -> None:
        """Once; later calls do nothing."""
        if not self.ended:
            self.ended = True
            self.flush()
            self._history.finish_answer(self._tree, self._answer, state, {**self.details, **(details or {})})


def relay(pump: Pump, writing: Writing, switch: Switch) -> Answer:
    """Pass events on and write them down until the answer ends or is stopped; `writing` has ended when this returns."""
    finished: Finished | None = None
    deadline: float | None = None
    try:
        while deadline is None or time.monotonic() < deadline:
            if switch.wanted and deadline is None:
                deadline = time.monotonic() + _LAST_WORDS
            try:
                event = pump.get(min(_POLL, max(writing.due(), 0.001)))
            except Ended:
                break
            if isinstance(event, Finished):
                finished = event
                break
            if isinstance(event, Piece):
                writing.add(event)
            elif isinstance(event, Started):
                writing.prompt_ids = event.prompt_ids
                writing.details["prompt_tokens"] = event.prompt_tokens
                writing.details["model"] = writing.details["model"] or event.model
            if writing.due() == 0.0:
                writing.flush()
            if event is not None:
                yield event
    finally:
        pump.stop()
    finished = finished or Finished("cancelled" if switch.wanted else None)
    writing.record(finished.facts)
    writing.end(_STATES.get(finished.finish_reason, "complete"), facts_of(finished))
    yield finished


def facts_of(finished: Finished) -> dict[str, Any]:
    """What the server told of the answer, for its details; what it did not tell is left out."""
    names = (
        "finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens", "ttft_seconds",
        "prefill_tokens_per_second", "decode_tokens_per_second", "load_seconds", "seed",
    )  # fmt: skip
    told = {name: getattr(finished, name) for name in names if getattr(finished, name) is not None}
    facts = {name: value for name, value in finished.facts.items() if name not in record.OWN}
    return {**told, **({"facts": facts} if facts else {})}
