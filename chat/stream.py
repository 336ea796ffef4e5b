"""An answer between threads: read by one, so that its reader can stop at once; written into the history by another."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any

from glmchat.chat.client.endpoint import Progress, Stop
from glmchat.chat.history.history import History
from glmchat.chat.history.owners import BEAT_SECONDS
from glmchat.chat.history.rows import State, StoredMessage, Tree
from glmchat.chat.replay import record
from glmchat.core.messages import Finished, Piece, StreamEvent

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


class Switch:
    """The stop of a session: one answer at a time, stopped from any thread."""

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._lock = threading.RLock()  # a signal handler may call `now` in the thread that holds it
        self._is_set = False
        self._connection: Stop | None = None

    @property
    def busy(self) -> bool:
        return self._busy.locked()

    @property
    def is_set(self) -> bool:
        return self._is_set

    def take(self) -> bool:
        """Begin an answer; False if one is running."""
        if not self._busy.acquire(blocking=False):
            return False
        with self._lock:
            self._is_set, self._connection = False, None
        return True

    def give_back(self) -> None:
        self._busy.release()

    def connection(self) -> Stop:
        """The stop of one request; pulled at once if a stop is wanted already."""
        with self._lock:
            self._connection = Stop()
            if self._is_set:
                self._connection.now()
            return self._connection

    def now(self) -> None:
        with self._lock:
            if self._busy.locked():
                self._is_set = True
                if self._connection is not None:
                    self._connection.now()


FLUSH_SECONDS = 0.4  # a kill loses at most what was said since; the promise is one second


class AnswerLog:
    """Gathers the pieces of one answer; a thread of its own writes them, so that a slow disk holds up no piece.

    details: of the answer, with what is learned while it is said; written at the latest when it ends.
    """

    def __init__(self, history: History, tree: Tree, answer: StoredMessage, details: dict[str, Any]) -> None:
        self.details = details
        self.has_pieces = False
        self.prompt_ids: tuple[int, ...] | None = None
        self._history, self._tree, self._answer = history, tree, answer
        self._stretch: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self._text: list[str] = []
        self._ids: list[int] = []
        self._described: dict[str, Any] | None = None  # details that are to be written before the end
        self._news, self._over = threading.Event(), threading.Event()
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._beaten = time.monotonic()

    def beat(self) -> None:
        """Called while nothing comes: now and then another machine that shares the home is shown that we live."""
        if time.monotonic() - self._beaten > BEAT_SECONDS:
            self._beaten = time.monotonic()
            self._history.add_piece(self._tree, self._answer, "")

    def add(self, piece: Piece) -> None:
        self.record(piece.facts)
        with self._lock:
            self._text.append(piece.text)
            self._ids.extend(piece.token_ids)
        self.has_pieces = True
        self._news.set()
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="answer-log", daemon=True)
            self._writer.start()

    def record(self, facts: Mapping[str, Any]) -> None:
        """What a replay of this stretch needs: at the first piece, at the end for an answer without a visible word.

        Hashes that the server did not know then are added when it tells them.
        """
        if self.prompt_ids is None or not facts.get("passes"):
            return
        if self._stretch is None:
            start, launch = len(self._answer.token_ids), self.details.get("launch")
            stretch = record.stretch(start, self.prompt_ids, facts, launch)
        elif (stretch := record.with_hashes(self._stretch, facts)) == self._stretch:
            return
        earlier = [s for s in self.details.get("stretches") or () if s is not self._stretch]
        self._stretch = stretch
        self.details["stretches"] = [*earlier, stretch]
        with self._lock:
            self._described = dict(self.details)

    def end(self, state: State, details: Mapping[str, Any] | None = None) -> None:
        """Write the rest, and how it ended. Once; later calls do nothing."""
        if self._over.is_set():
            return
        self._over.set()
        self._news.set()
        if self._writer is not None:
            self._writer.join()
        if self._failure is not None:
            raise self._failure
        self._flush()
        self._history.finish_answer(self._tree, self._answer, state, {**self.details, **(details or {})})

    def _write(self) -> None:
        """In the thread: whatever has come, then nothing for a while."""
        try:
            while self._news.wait() and not self._over.is_set():
                self._news.clear()
                self._flush()
                self._over.wait(FLUSH_SECONDS)
        except BaseException as error:  # noqa: BLE001 (raised where the answer ends)
            self._failure = error

    def _flush(self) -> None:
        with self._lock:
            text, ids, described = "".join(self._text), self._ids, self._described
            self._text, self._ids, self._described = [], [], None
        if described is not None:
            self._history.describe_answer(self._tree, self._answer, described)
        if text or ids:
            self._history.add_piece(self._tree, self._answer, text, ids)


def facts_of(finished: Finished) -> dict[str, Any]:
    """What the server says of the answer, for its details; what it does not say is left out."""
    names = (
        "finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens", "ttft_seconds",
        "prefill_tokens_per_second", "decode_tokens_per_second", "load_seconds", "seed",
    )  # fmt: skip
    values = {name: getattr(finished, name) for name in names if getattr(finished, name) is not None}
    facts = {name: value for name, value in finished.facts.items() if name not in record.OWN}
    return {**values, **({"facts": facts} if facts else {})}
