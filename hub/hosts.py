"""How the sources of one run have behaved: who is asked first, who is left alone for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from glmchat.hub.fetch import source_name
from glmchat.hub.wanted import Candidate

_FAILURES = 2  # in a row; then the source goes to the end of every file's list, for the run


class Hosts:
    """Shared by all files of a download. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures: dict[str, int] = {}
        self._demoted: set[str] = set()
        self._not_before: dict[str, float] = {}
        self.without_ranges: set[str] = set()

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

    def seconds_until(self, candidate: Candidate) -> float:
        """What is left of the time that the source asked for with Retry-After."""
        with self._lock:
            return max(0.0, self._not_before.get(source_name(candidate), 0.0) - time.monotonic())
