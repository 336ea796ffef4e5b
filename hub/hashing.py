"""The names that content has: sha256 (git-lfs and the hub's big files) and git's blob id (its small ones)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from glmchat.core.errors import Interrupted
from glmchat.core.language import tr

BLOCK = 1 << 20  # bytes read at a time: large enough for disks, small enough for memory and for Ctrl-C


def sha256_of(
    path: Path, *, on_bytes: Callable[[int], None] | None = None, cancelled: Callable[[], bool] | None = None
) -> str:
    """sha256 of a file's content in hex. `on_bytes` hears the length of each block. Raises Interrupted, OSError."""
    return _feed(hashlib.sha256(), path, on_bytes, cancelled)


def git_blob_of(path: Path) -> str:
    """The id git gives the file: sha1 of "blob <size>" NUL content (gitformat-objects)."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    return _feed(digest, path, None, None)


def git_blob_of_bytes(content: bytes) -> str:
    """`git_blob_of` for content in memory."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _feed(
    digest: hashlib._Hash,
    path: Path,
    on_bytes: Callable[[int], None] | None,
    cancelled: Callable[[], bool] | None,
) -> str:
    with path.open("rb", buffering=0) as file:
        block = bytearray(BLOCK)
        view = memoryview(block)
        while count := file.readinto(block):
            if cancelled is not None and cancelled():
                raise Interrupted(
                    tr("stopped while checking a file"), hint=tr("run the same command again"), code="pull.interrupted"
                )
            digest.update(view[:count])
            if on_bytes is not None:
                on_bytes(count)
    return digest.hexdigest()
