"""Bytes from mirrors to whole, verified files: what the planner asks for, and what it gets back."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from glmchat.core.http import make_client
from glmchat.hub.download_state import DownloadState, RetryPolicy
from glmchat.hub.file_request import Candidate, FetchedFile, FileProgress, FileRequest, Progress
from glmchat.hub.store import stopped
from glmchat.hub.transfer import State, Transfer

if TYPE_CHECKING:
    import httpx2

__all__ = ["Candidate", "FetchedFile", "FileProgress", "FileRequest", "Progress", "RetryPolicy", "Speed", "download"]

_TICK = 0.1  # seconds between two looks at the threads, at `cancelled` and at the progress
_GRACE = 0.6  # seconds that threads get to end after a cancel
_SPEED_WINDOW = 5.0  # seconds


def download(
    files: Sequence[FileRequest],
    *,
    on_progress: Callable[[Progress], None],
    cancelled: Callable[[], bool],
    concurrency: int = 4,
    retry: RetryPolicy | None = None,
) -> list[FetchedFile]:
    """Bring all `files` home, `concurrency` at a time; -> one FetchedFile per file, in order.

    on_progress and cancelled are called in this thread, some ten times a second. A file that is already whole at its
    destination is only hashed. Raises the first failure after stopping the others: NetworkFailed, Failed, Damaged,
    DoesNotFit; Interrupted when `cancelled` says so or on Ctrl-C, within a second. What has arrived is kept.
    """
    retry = retry or RetryPolicy()
    with make_client(timeout=_timeout(retry.stall)) as client:
        return _Run(files, DownloadState(client, retry)).go(on_progress, cancelled, max(1, min(concurrency, 32)))


def _timeout(stall: float) -> httpx2.Timeout:
    import httpx2

    return httpx2.Timeout(stall, connect=min(10.0, stall), pool=None)


class _Run:
    """The threads of one download and what they have brought so far."""

    def __init__(self, files: Sequence[FileRequest], shared: DownloadState) -> None:
        self.files, self.shared = files, shared
        self.states = [State(total=one.size) for one in files]
        self.got: list[FetchedFile | None] = [None] * len(files)
        self.failure: BaseException | None = None
        self._waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._speed = Speed()
        # Two names for one blob (the same licence in two folders) are one transfer.
        first: dict[Path, int] = {}
        self._same_as = [first.setdefault(one.destination, index) for index, one in enumerate(files)]
        for index in first.values():
            self._waiting.put(index)

    def go(
        self, on_progress: Callable[[Progress], None], cancelled: Callable[[], bool], concurrency: int
    ) -> list[FetchedFile]:
        # Daemon threads: one that hangs in a connect must not keep the process after Ctrl-C.
        threads = [
            threading.Thread(target=self._work, name=f"download-{number}", daemon=True)
            for number in range(min(concurrency, len(self.files)))
        ]
        on_progress(self.progress())
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                next((thread for thread in threads if thread.is_alive()), threads[0]).join(_TICK)
                if cancelled():
                    self.failure = self.failure or stopped()
                    break
                if self.failure is not None:
                    break
                on_progress(self.progress())
        finally:  # also on KeyboardInterrupt
            self.shared.cancel()
            ends = time.monotonic() + _GRACE
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(0.0, ends - time.monotonic()))
        if self.failure is not None:
            raise self.failure
        on_progress(self.progress())
        got = [self.got[same] for same in self._same_as]
        return [replace(one, path=file.path) for file, one in zip(self.files, got, strict=True) if one is not None]

    def _work(self) -> None:
        while not self.shared.cancelled:
            try:
                index = self._waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self.got[index] = Transfer(self.files[index], self.states[index], self.shared).run()
            except BaseException as failure:  # noqa: BLE001 - carried to the caller's thread and raised there
                if self.failure is None and not self.shared.cancelled:
                    self.failure = failure
                return

    def progress(self) -> Progress:
        states = [self.states[same] for same in self._same_as]
        files = tuple(
            FileProgress(file.path, state.done, state.total, state.state, state.host)
            for file, state in zip(self.files, states, strict=True)
        )
        done = sum(one.done for one in files)
        totals = [one.total for one in files]
        total = None if any(one is None for one in totals) else sum(one for one in totals if one is not None)
        speed = self._speed.measure(sum(state.received for state in self.states))
        left = (total - done) / speed if total is not None and speed else None
        return Progress(files, done, total, speed, left, self.shared.next_note())


class Speed:
    """Bytes per second over the last seconds, from new bytes only: a resume does not look fast."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def measure(self, received: int) -> float | None:
        now = time.monotonic()
        self._seen.append((now, received))
        while now - self._seen[0][0] > _SPEED_WINDOW:
            self._seen.popleft()
        since, before = self._seen[0]
        return (received - before) / (now - since) if now - since >= 0.5 else None
