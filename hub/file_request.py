"""What a planner asks the downloader for, what it hears meanwhile, and what it gets.

Progress is told as events, by jobs as lines of JSON: {"event": "say", text} and {"event": "meter", label, done, total}
are for people; {"event": "progress", …} for programs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmchat.core.language import tr


@dataclass(frozen=True, slots=True)
class Candidate:
    """One place that serves a file. Candidates are tried in order."""

    url: str  # http(s)://… or file:///… (a mirror folder)
    headers: Mapping[str, str] = field(default_factory=dict)  # Authorization goes to the URL's own host only
    label: str = ""  # what messages and manifests call it; host[:port] or the folder when empty
    folder: Path | None = None  # the mirror folder that a file:// URL must not leave, not even by a link
    trusted: bool = False  # --trust-host: take a file whose hash nobody knows from here


@dataclass(frozen=True, slots=True)
class FileRequest:
    """One file. What is None is unknown; at least one of sha256 and git_blob must be known unless a host is trusted."""

    path: str  # name in the repository, for messages and progress
    destination: Path  # the whole, verified file; its folder is created
    partial: Path  # `<etag>.glmchat.incomplete` beside it, on the same file system
    candidates: Sequence[Candidate]
    size: int | None = None  # bytes
    sha256: str | None = None
    git_blob: str | None = None  # sha1 of "blob <size>\0" + content, the name git gives a small file
    etag: str | None = None  # what the hub sent; binds a partial when no hash is known


@dataclass(frozen=True, slots=True)
class FetchedFile:
    """One file that is whole and verified on disk."""

    path: str
    size: int
    sha256: str  # computed here, whether it was known before or not
    host: str  # the candidate that sent the last byte (label, host[:port] or folder); "" if all of it was here
    seconds: float
    resumed_from: int  # bytes that an earlier run had left


@dataclass(frozen=True, slots=True)
class FileProgress:
    path: str
    done: int
    total: int | None
    state: str  # "waiting" | "checking" (re-hashing what is here) | "loading" | "retrying" | "unpacking" | "done"
    host: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """One look at a running download. Bytes that an earlier run left count as done, not as speed."""

    files: tuple[FileProgress, ...]
    done: int
    total: int | None
    bytes_per_second: float | None
    seconds_left: float | None
    note: str = ""  # one line about what went wrong and is being done about it, "" most of the time


Tell = Callable[[Mapping[str, Any]], None]
_EVENT_SECONDS = 0.5  # between two progress events
_METER_SECONDS = 0.1  # between two looks at the same bar
_SMALL = 5_000_000  # bytes; smaller files get no bar of their own


class Meter:
    """Tells how far a bar is, at most ten times a second each, and always its end."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._last: dict[str, tuple[float, int]] = {}

    def __call__(self, label: str, done: int, total: int | None) -> None:
        at, before = self._last.get(label, (0.0, -1))
        now = time.monotonic()
        if done == before or (now - at < _METER_SECONDS and done != total):
            return
        self._last[label] = (now, done)
        self._tell({"event": "meter", "label": label, "done": done, "total": total})


class ProgressEvents:
    """Hand it to whatever downloads. for_programs: False where other progress is told to them."""

    def __init__(self, tell: Tell, *, for_programs: bool = True) -> None:
        self._tell, self._for_programs = tell, for_programs
        self._meter = Meter(tell)
        self._at = 0.0
        self._notes = {""}

    def __call__(self, progress: Progress) -> None:
        if progress.note not in self._notes:
            self._notes.add(progress.note)
            self._tell({"event": "say", "text": progress.note})
        if self._for_programs and time.monotonic() - self._at >= _EVENT_SECONDS:
            self._at = time.monotonic()
            names = ("done", "total", "bytes_per_second", "seconds_left")
            self._tell({"event": "progress", **{name: getattr(progress, name) for name in names}})
        for file in progress.files:
            if file.state != "waiting" and (file.total is None or file.total >= _SMALL or len(progress.files) == 1):
                self._meter(file.path, file.done, file.total)
        if len(progress.files) > 1:
            self._meter(tr("in all"), progress.done, progress.total)
