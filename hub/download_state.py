"""What the transfers of one download share: how to retry, the cancel signal, and how each source has behaved so far."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from glmchat.hub.fetch import source_name
from glmchat.hub.file_request import Candidate
from glmchat.hub.store import stopped

if TYPE_CHECKING:
    import httpx2

_FAILURES = 2  # in a row; then the source goes to the end of every file's list, for the run


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to put up with what. Seconds."""

    stall: float = 20.0  # without a byte
    first_pause: float = 1.0  # doubles with every round that brought nothing
    longest_pause: float = 30.0
    rounds: int = 6  # through all candidates without a byte; then the file has failed
    unreached_rounds: int = 2  # the same while no server has been reached at all: then there is no network


class DownloadState:
    """What all transfers of one download share: the client, the hosts' records, the cancel signal, open connections."""

    def __init__(self, client: httpx2.Client, retry: RetryPolicy) -> None:
        self.client = client
        self.retry = retry
        self.hosts = Hosts()
        self.note = ""
        self._notices: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.reached = False  # some server has answered something
        self._cancel = threading.Event()
        self._lock = threading.Lock()
        self._open: set[httpx2.Response] = set()

    def notify(self, text: str) -> None:
        """What has to be said however soon the file is there; a `note` goes when its trouble does."""
        self._notices.put(text)

    def next_note(self) -> str:
        try:
            return self._notices.get_nowait()
        except queue.Empty:
            return self.note

    def cancel(self) -> None:
        """Wake every transfer, also those that wait in recv()."""
        self._cancel.set()
        with self._lock:
            for response in self._open:
                _shut(response)

    @property
    def cancelled(self) -> bool:
        return self._cancel.is_set()

    def check(self) -> None:
        if self._cancel.is_set():
            raise stopped()

    def pause(self, seconds: float) -> None:
        self._cancel.wait(seconds)
        self.check()

    @contextlib.contextmanager
    def watch(self, response: httpx2.Response) -> Iterator[None]:
        with self._lock:
            self._open.add(response)
        try:
            self.check()
            yield
        finally:
            with self._lock:
                self._open.discard(response)


def _shut(response: httpx2.Response) -> None:
    stream = response.extensions.get("network_stream")
    sock = stream.get_extra_info("socket") if stream is not None else None
    if isinstance(sock, socket.socket):
        with contextlib.suppress(OSError):  # it may be gone already
            # Not SSLSocket.shutdown: that takes the TLS object away from the thread that reads with it.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)


class Hosts:
    """Shared by all files of a download. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures: dict[str, int] = {}
        self._demoted: set[str] = set()
        self._not_before: dict[str, float] = {}
        self._first = threading.Condition()
        self._asked: set[str] = set()  # sources whose first answer is awaited
        self._met: set[str] = set()  # sources that have answered something
        self.token_refused: set[str] = set()

    def order(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """In the given order, the demoted ones last."""
        with self._lock:
            return sorted(candidates, key=lambda one: source_name(one) in self._demoted)

    def is_demoted(self, candidate: Candidate) -> bool:
        with self._lock:
            return source_name(candidate) in self._demoted

    def failed(self, candidate: Candidate, *, at_once: bool = False, retry_after: float | None = None) -> None:
        """Count a failure; `at_once` demotes without a second chance (a web page, a wrong file)."""
        name = source_name(candidate)
        with self._lock:
            self._failures[name] = self._failures.get(name, 0) + 1
            if at_once or self._failures[name] >= _FAILURES:
                self._demoted.add(name)
            if retry_after is not None:
                self._not_before[name] = time.monotonic() + retry_after

    def worked(self, candidate: Candidate) -> None:
        with self._lock:
            self._failures.pop(source_name(candidate), None)

    def begin(self, candidate: Candidate, check: Callable[[], None]) -> None:
        """Until a source has answered once, it is asked one thing at a time: it may refuse the token, or ask to wait.

        check is called while another request waits for that first answer. `answered` must follow.
        """
        name = source_name(candidate)
        with self._first:
            while name in self._asked:
                self._first.wait(0.1)
                check()
            if name not in self._met:
                self._asked.add(name)

    def answered(self, candidate: Candidate) -> None:
        """The source has answered, or failed."""
        name = source_name(candidate)
        with self._first:
            self._met.add(name)
            self._asked.discard(name)
            self._first.notify_all()

    def allowed(self, candidate: Candidate) -> Candidate:
        """The candidate without its token, if the source has refused that."""
        if source_name(candidate) not in self.token_refused:
            return candidate
        kept = {name: value for name, value in candidate.headers.items() if name.lower() != "authorization"}
        return replace(candidate, headers=kept)

    def seconds_until(self, candidate: Candidate) -> float:
        """What is left of the time that the source asked for with Retry-After."""
        with self._lock:
            return max(0.0, self._not_before.get(source_name(candidate), 0.0) - time.monotonic())
