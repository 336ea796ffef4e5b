"""What a planner asks the downloader for, what it hears meanwhile, and what it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


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
    state: str  # "waiting" | "checking" (re-hashing what is here) | "loading" | "retrying" | "done"
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
