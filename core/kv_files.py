"""The KV caches of conversations on the disk: where they lie, what they are called, which go first.

What is in them is the engine's (engine/decoding/kv_store.py). A file is named by what computed it and by the
conversation that it is of, so that one can be taken away by those who know nothing of caches: a conversation is
deleted, `glmchat prune` empties the folder. All of it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from glmchat.core import locations
from glmchat.core.errors import Failed

SUFFIX = ".safetensors"
PARTIAL = ".incomplete"
UNNAMED = ""  # for a conversation that may be kept and whose name nobody told
_NAME = re.compile(r"(?P<key>[0-9a-f]{32})-(?P<conversation>[0-9a-f]{32})\.safetensors")
_GONE = ".gone"  # a mark beside the files: what was computed of a conversation before it is not to be written any more
_OLD = 86400  # seconds after which a mark, or half a file, has nobody who could still write
_HALF_AN_HOUR = 1800


@dataclass(frozen=True, slots=True)
class KVFile:
    """used: nanoseconds since 1970, of the last reading or writing."""

    path: Path
    key: str
    conversation: str
    size: int
    used: int


def conversation_name(history: Path, number: int) -> str:
    """What a conversation of a history is called here; says nothing of either."""
    return hashlib.sha256(f"{history.absolute()}\n{number}".encode("utf-8", "surrogateescape")).hexdigest()[:32]


def is_name(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{32}", text) is not None


def kv_path(key: str, conversation: str) -> Path:
    return locations.kv_dir() / f"{key}-{conversation}{SUFFIX}"


def kv_files(key: str | None = None) -> list[KVFile]:
    """Those that are there, the least recently used first; key: of one engine alone. None where nobody can look."""
    files = []
    for entry in _entries():
        name = _NAME.fullmatch(entry.name)
        if name is not None and key in (None, name["key"]):
            with suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if entry.is_file(follow_symlinks=False):
                    files.append(
                        KVFile(Path(entry.path), name["key"], name["conversation"], status.st_size, status.st_mtime_ns)
                    )
    return sorted(files, key=lambda file: (file.used, file.path.name))


def kv_bytes() -> int:
    return sum(file.size for file in kv_files())


def everything() -> list[Path]:
    """All that lies in the folder, half files and marks too, but for what another program put there."""
    names = (_NAME.fullmatch, lambda name: name.endswith((PARTIAL, _GONE)))
    return sorted(Path(entry.path) for entry in _entries() if any(is_ours(entry.name) for is_ours in names))


def _entries() -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(locations.kv_dir()) as entries:
            yield from entries
    except OSError:  # there is none yet, or it is not ours to read
        return


def open_folder() -> Path:
    """The folder, for this user alone. Raises OSError where it cannot be had or belongs to somebody else."""
    try:
        locations.private_dir(locations.cache_dir())
        folder = locations.private_dir(locations.kv_dir())
    except Failed as error:
        raise OSError(error.message) from None
    if folder.stat().st_uid != os.getuid():  # who may write there could put other numbers into an answer
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def make_room(size: int, limit: int, path: Path) -> bool:
    """Take away the least recently used until `size` bytes more are within `limit`; False where they never will be.

    path: of the file that is about to be written, which takes the place of one of its name.
    """
    _clean()
    if size > limit:
        return False
    others = [file for file in kv_files() if file.path != path]
    total = sum(file.size for file in others)
    for file in others:
        if total + size <= limit:
            break
        file.path.unlink(missing_ok=True)
        total -= file.size
    return total + size <= limit


def _clean() -> None:
    """Half files of engines that were killed, and marks that nobody can need any more."""
    for entry in _entries():
        with suppress(OSError):
            age = time.time() - entry.stat(follow_symlinks=False).st_mtime
            if (entry.name.endswith(PARTIAL) and age > _HALF_AN_HOUR) or (entry.name.endswith(_GONE) and age > _OLD):
                Path(entry.path).unlink(missing_ok=True)


def forget(conversation: str) -> None:
    """Take away what was kept of a conversation, and say so to the engines that may still hold some of it."""
    with suppress(OSError):
        mark = open_folder() / f"{conversation}{_GONE}"
        mark.touch(mode=0o600)
        os.utime(mark, ns=(time.time_ns(),) * 2)  # a file's own time lags behind the clock by some milliseconds
    for file in kv_files():
        if file.conversation == conversation:
            with suppress(OSError):
                file.path.unlink(missing_ok=True)


def is_forgotten(conversation: str, since: float) -> bool:
    """Whether it was forgotten after `since`, in seconds since 1970."""
    try:
        return (locations.kv_dir() / f"{conversation}{_GONE}").stat().st_mtime >= since
    except OSError:
        return False
