"""A file on its way: `<etag>.glmchat.incomplete`, grown at its end, re-hashed on resume, renamed when it is whole.

Every chunk goes to the kernel at once (no buffer of ours), so a killed process loses what it had not yet received and
nothing else. Nothing is ever truncated in place: starting over unlinks and creates a new file, so that a second
process which already renamed this one keeps its whole copy. Two processes that write the same partial write the same
bytes at the same offsets; that is harmless, and works on network disks where locks do not.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from glmchat.core.errors import Failed
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.hub.store import BLOCK, disk_error, stopped

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def _open(path: Path) -> int:
    """Raises OSError, also for a pipe or a device in its place: in a shared cache somebody else may have made it."""
    descriptor = os.open(path, _FLAGS, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, tr("{name} is no file", name=one_line(path.name)), str(path))
    return descriptor


class PartialFile:
    """Owns the descriptor and the running sha256 of the first `length` bytes. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.length = 0
        self._digest = hashlib.sha256()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = _open(path)
        except OSError as error:
            raise disk_error(error, path) from None

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def take_over(self, limit: int | None, on_bytes: Callable[[int], None], cancelled: Callable[[], bool]) -> int:
        """Hash what an earlier run left and continue behind it. Longer than `limit`: start over. -> bytes kept."""
        size = os.fstat(self._fd).st_size
        if limit is not None and size > limit:
            self.restart()
            return 0
        block = memoryview(bytearray(BLOCK))
        while self.length < size:
            if cancelled():
                raise stopped()
            os.lseek(self._fd, self.length, os.SEEK_SET)
            count = os.readv(self._fd, [block[: size - self.length]])
            if not count:
                break
            self._digest.update(block[:count])
            self.length += count
            on_bytes(count)
        return self.length

    def append(self, chunk: bytes | memoryview) -> None:
        """Write behind what is here. Raises DoesNotFit when the disk is full (the partial stays), Failed otherwise."""
        rest = memoryview(chunk)
        self._digest.update(rest)
        while rest:
            try:
                count = os.pwrite(self._fd, rest, self.length)
            except OSError as error:
                raise disk_error(error, self.path) from None
            self.length += count
            rest = rest[count:]

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def restart(self) -> None:
        """Drop every byte and begin at zero, in a new file."""
        self.close()
        try:
            self.path.unlink(missing_ok=True)
            self._fd = _open(self.path)
        except OSError as error:
            raise disk_error(error, self.path) from None
        self.length = 0
        self._digest = hashlib.sha256()

    def finish(self, destination: Path) -> None:
        """fsync, then rename: `destination` is whole or absent at every moment."""
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            os.fsync(self._fd)
            mine = os.fstat(self._fd)
            with contextlib.suppress(FileNotFoundError):
                there = self.path.stat()
                if (there.st_ino, there.st_dev) == (mine.st_ino, mine.st_dev):
                    self.path.replace(destination)
            if destination.stat().st_size != self.length:  # another process took the partial and is not done with it
                raise Failed(
                    tr("another process is writing {path}", path=one_line(str(destination))),
                    hint=tr("wait for it to finish, then run the same command again"),
                    code="pull.busy",
                )
            fsync_folder(destination.parent)
        except OSError as error:
            raise disk_error(error, destination) from None


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut. Some network disks cannot; there the rename itself must do."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)
