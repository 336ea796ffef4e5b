"""The one way in to files that others made: regular files alone, opened without waiting, read up to a bound.

Whatever lies under a name (a pipe, a device, a socket, a loop of links) becomes an OSError whose `strerror` can
be shown. A house test sees to it that nothing else in the product opens a file to read it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from datetime import datetime
from fnmatch import fnmatchcase
from io import BufferedReader, FileIO
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from glmchat.core.errors import Damaged
from glmchat.core.language import tr
from glmchat.core.text import one_line

MB = 2**20
# The most that a file of a name may hold, in bytes: a few times the largest that was ever published of its kind.
_BOUNDS = (
    ("*.index.json", 64 * MB),
    ("tokenizer.json", 64 * MB),
    ("vocab.json", 64 * MB),
    ("merges.txt", 64 * MB),
    ("*.model", 64 * MB),
    ("tokenizer_config.json", 16 * MB),
    ("*config.json", 4 * MB),
    ("*.jinja", 1 * MB),
    ("*.toml", 4 * MB),
)
_ANY = 16 * MB  # manifests, lock files, notes
# What a shell hands over: `--messages <(jq …)` is /dev/fd/63.
_HANDED_OVER = re.compile(r"/dev/stdin|/dev/fd/\d+|/proc/self/fd/\d+")
_MOST_FILES = 20_000  # below a folder; a model has some hundreds, a disk millions
_NO_WAIT = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


class TooLarge(OSError):
    """A file that holds more than its kind may. most: bytes."""

    def __init__(self, path: Path, most: int) -> None:
        super().__init__(errno.EFBIG, tr("it is larger than {most} MB", most=max(1, most // MB)), str(path))
        self.most = most


def files_below(folder: Path) -> Iterator[Path]:
    """All that is no folder below one, links too, at most some thousands: a disk is no model.

    A folder below it that may not be read holds none. Raises PermissionError for `folder` itself.
    """
    next(iter(folder.iterdir()), None)
    found = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return islice(found, _MOST_FILES)


def bound(path: Path) -> int:
    """The most bytes that a file of this name may hold."""
    return next((most for pattern, most in _BOUNDS if fnmatchcase(path.name, pattern)), _ANY)


class _Raw(FileIO):
    """One that says in the errors of a bad disk which file it is, as opening does."""

    def readinto(self, buffer: Any) -> int:
        try:
            return super().readinto(buffer) or 0
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from None


def open_file(path: Path) -> BufferedReader:
    """A regular file, to be read. Raises OSError for anything else, which is never opened, let alone waited for."""
    # Looked at before it is opened: opening a device may already do something (a tape, a watchdog).
    _require_regular(path.stat(), path)
    raw = _Raw(str(path), opener=lambda name, _: os.open(name, _NO_WAIT))
    try:
        _require_regular(os.fstat(raw.fileno()), path)
    except BaseException:
        raw.close()
        raise
    return BufferedReader(raw)


def read_file(path: Path, most: int | None = None) -> bytes:
    """All of a regular file. Raises OSError, TooLarge above `most` bytes; None: what its name allows."""
    most = bound(path) if most is None else most
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise TooLarge(path, most)
        return _read(file, path, most)


def read_given(path: Path, most: int) -> bytes:
    """As `read_file`, of a path that a person typed: the pipe of a shell's <(command) is read to its end as well."""
    if not _HANDED_OVER.fullmatch(str(path)):
        return read_file(path, most)
    with path.open("rb") as file:
        return _read(file, path, most)


def read_text(path: Path, most: int | None = None, *, errors: str = "strict") -> str:
    """The same as UTF-8. Raises OSError, or UnicodeDecodeError where `errors` is strict."""
    return read_file(path, most).decode("utf-8", errors)


def _read(file: BufferedReader, path: Path, most: int) -> bytes:
    data = file.read(most + 1)  # one that grows meanwhile, or that does not tell its size, is bounded too
    if len(data) > most:
        raise TooLarge(path, most)
    return data


def require_readable(path: Path) -> None:
    """Raise Damaged if there is something under this name that is no regular file, or that this user may not read."""
    try:
        open_file(path).close()
    except OSError as error:
        raise unreadable(path, error) from None


# What is read of a folder by its name, by us or by the libraries that read vocabularies and weights.
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_WORDS = ("added_tokens.json", "chat_template.json", "special_tokens_map.json", "vocab.*")


def require_plain_folder(folder: Path) -> None:
    """Raise Damaged for what lies in a folder and is no file: a pipe or a device of any name, and under a name that is
    read anything else too, a link to nothing, one that this user may not read, or one over its bound. Libraries open
    them by name.

    Of weights not all may be needed: a link to nothing is one that is missing, which is found where they are chosen.
    """
    names = [pattern for pattern, _ in _BOUNDS] + [*_WEIGHTS, *_WORDS]
    try:
        for path in sorted(folder.iterdir()):
            is_read = any(fnmatchcase(path.name, pattern) for pattern in names)
            try:
                status = path.stat()
                if not (is_read or stat.S_ISDIR(status.st_mode)):
                    _require_regular(status, path)
                elif is_read:
                    _touch(path)
            except FileNotFoundError:
                if is_read and path.is_symlink() and not any(fnmatchcase(path.name, pattern) for pattern in _WEIGHTS):
                    raise
    except OSError as error:
        raise unreadable(Path(error.filename or folder), error) from None


def _touch(path: Path) -> None:
    """Its size and its first byte: what could still go wrong is a disk that fails later."""
    with open_file(path) as file:
        if not any(fnmatchcase(path.name, pattern) for pattern in _WEIGHTS):
            size, most = os.fstat(file.fileno()).st_size, bound(path)
            if size > most:
                raise TooLarge(path, most)
        file.read(1)


def write_for_person(path: Path, text: str, *, replace: bool = False) -> None:
    """A file that somebody asked for, whole or not at all; what stood there stays until the new one is on the disk.

    replace: over a file that is there; a pipe or a device (/dev/stdout) is then written to. Raises OSError.
    """
    if not replace and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    place = path.resolve()  # a link stays one
    temporary = place.with_name(f".{place.name[:200]}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a link that somebody put there would be followed
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(place)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a write does not say where
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk. Raises OSError."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def set_aside(path: Path) -> Path:
    """Rename what is damaged, with the date, so that something new can begin in its place; nothing is deleted."""
    stamp = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    names = chain([f"{path.name}.corrupt-{stamp}"], (f"{path.name}.corrupt-{stamp}-{n}" for n in count(2)))
    aside = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
    return path.rename(aside)


_NOTES: list[str] = []


def note(sentence: str) -> None:
    """Something that a person should hear once, whatever was asked for: a face says it (`take_notes`)."""
    _NOTES.append(sentence)


def take_notes() -> list[str]:
    """What was noted since the last call."""
    notes = list(_NOTES)
    _NOTES.clear()
    return notes


def unreadable(path: Path, error: OSError, *, is_vocabulary: bool = False) -> Damaged:
    """The error for a file of a model that cannot be read: what is wrong, and what to do about it."""
    hint = tr("pull the model again")
    if error.errno in (errno.EACCES, errno.EPERM):
        hint = tr("check its owner and permissions, and the disk")
    elif path.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP):
        hint = tr("it is a link that leads to no file: put the file in its place, or pull the model again")
    elif error.errno in (errno.EINVAL, errno.EISDIR):
        hint = tr("take it away and put the file in its place, or pull the model again")
    return Damaged(
        tr("cannot read {name}: {reason}", name=one_line(str(path)), reason=error.strerror or str(error)),
        hint=hint,
        code="tokenizer.unreadable" if is_vocabulary else "config.unreadable",
    )


def _require_regular(status: os.stat_result, path: Path) -> None:
    if stat.S_ISREG(status.st_mode) or _is_null(status):
        return
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, tr("it is a folder, not a file"), str(path))
    if stat.S_ISFIFO(status.st_mode):
        words = tr("it is a named pipe, not a file")
    elif stat.S_ISSOCK(status.st_mode):
        words = tr("it is a socket, not a file")
    else:
        words = tr("it is a device, not a file")
    raise OSError(errno.EINVAL, words, str(path))


def _is_null(status: os.stat_result) -> bool:
    """/dev/null, which people put in the place of a file that is to be empty."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == Path(os.devnull).stat().st_rdev
