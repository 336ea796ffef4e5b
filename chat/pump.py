"""A stream read by a thread of its own, so that its reader can stop at once and act while nothing comes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator

from glmchat.core.messages import StreamEvent


class Ended(Exception):
    """The stream is over."""


class Pump:
    """Reads `source` in a thread; closes it as soon as `stop` is called and the thread gets its next event."""

    def __init__(self, source: Generator[StreamEvent, None, None]) -> None:
        self._source = source
        self._events: queue.Queue[StreamEvent | BaseException] = queue.Queue(maxsize=256)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="answer", daemon=True)
        self._thread.start()

    def get(self, timeout: float) -> StreamEvent | None:
        """The next event; None if none came in time. Raises Ended, or what the stream raised."""
        try:
            event = self._events.get(timeout=max(timeout, 0.001))
        except queue.Empty:
            return None
        if isinstance(event, BaseException):
            raise event
        return event

    def stop(self) -> None:
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def _run(self) -> None:
        last: BaseException = Ended()
        try:
            for event in self._source:
                if not self._offer(event):
                    break
        except Exception as error:  # noqa: BLE001  (handed to the reader, who raises it)
            last = error
        finally:
            self._source.close()
        self._offer(last)

    def _offer(self, event: StreamEvent | BaseException) -> bool:
        """Hand over one event, waiting for a slow reader; False once the reader has stopped."""
        while not self._stopped.is_set():
            try:
                self._events.put(event, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False
