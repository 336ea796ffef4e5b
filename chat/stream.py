"""A stream read by a thread of its own, so that its reader can stop at once and act while nothing comes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator

from glmchat.chat.client.endpoint import Progress, Stop
from glmchat.core.messages import StreamEvent

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
