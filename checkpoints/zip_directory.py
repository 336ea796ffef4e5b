"""The directory of a zip archive, as which torch saves tensors.

Counts, sizes and places are claims. Each is compared with the file before it is used: no member lies over another, none
has the name of another, and there is one way to read it, which is also torch's. Source: PKWARE's APPNOTE.TXT.
"""

from __future__ import annotations

import os
import struct
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, NoReturn

from glmchat.checkpoints.weight_choice import damaged_weights
from glmchat.core.language import tr
from glmchat.core.text import one_line

_MOST_MEMBERS = 100_000
_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_ENTRY, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_ENCRYPTED = 1


class FileBytes:
    """A file of which a few places are read; each read is compared with its size first."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.size = path, os.fstat(descriptor).st_size
        self._descriptor = descriptor

    def take(self, at: int, count: int) -> bytes:
        data = os.pread(self._descriptor, count, at) if 0 <= at <= self.size - count else b""
        if len(data) != count:
            self.broken(tr("it ends too early"))
        return data

    def broken(self, reason: str) -> NoReturn:
        raise damaged_weights(self.path, reason)


class Member(NamedTuple):
    """Where a member lies. is_packed: compressed or encrypted, so that its bytes are not what they stand for."""

    at: int
    size: int  # bytes in the archive
    is_packed: bool


def read_directory(read: FileBytes) -> dict[str, Member]:
    """Name -> place, in the order of the directory. Raises Damaged where one overlaps another or stands there twice."""
    end = read.size - _END.size
    mark, disk, _, _, count, length, start, comment = _END.unpack(read.take(end, _END.size))
    if mark != b"PK\5\6" or comment or disk:
        read.broken(tr("its directory is missing"))
    if (
        end >= _LOCATOR.size
        and (locator := _LOCATOR.unpack(read.take(end - _LOCATOR.size, _LOCATOR.size)))[0] == b"PK\6\7"
    ):
        end = locator[2]
        mark, *_, count, length, start = _END64.unpack(read.take(end, _END64.size))
        if mark != b"PK\6\6":
            read.broken(tr("its directory is missing"))
    if count > _MOST_MEMBERS or count * _ENTRY.size > length or start + length != end:
        read.broken(tr("its directory does not have the size that it claims"))
    directory, at = read.take(start, length), 0
    places: list[tuple[int, str, int, bool]] = []
    for _ in range(count):
        if at + _ENTRY.size > length:
            read.broken(tr("its directory does not have the size that it claims"))
        mark, _, _, flags, method, _, _, _, packed, size, *more, where = _ENTRY.unpack_from(directory, at)
        name_at = at + _ENTRY.size
        extra_at = name_at + more[0]
        at = extra_at + more[1] + more[2]
        name = directory[name_at:extra_at].decode("utf-8", "replace")
        wide = iter(_wide(directory[extra_at : extra_at + more[1]]))
        size, packed, where = (next(wide, n) if n == 0xFFFFFFFF else n for n in (size, packed, where))
        if mark != b"PK\1\2" or at > length:
            read.broken(tr("its directory does not have the size that it claims"))
        places.append((where, name, packed, bool(method or flags & _ENCRYPTED or packed != size)))
    return _laid_out(read, places, start)


def _wide(extra: bytes) -> list[int]:
    """The 64-bit numbers of an entry, for those that do not fit into 32."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            data = extra[at + 4 : at + 4 + length // 8 * 8]
            return list(struct.unpack(f"<{len(data) // 8}Q", data))
        at += 4 + length
    return []


def _laid_out(read: FileBytes, places: list[tuple[int, str, int, bool]], directory: int) -> dict[str, Member]:
    found: dict[str, Member] = {}
    ordered = sorted(range(len(places)), key=lambda index: places[index][0])
    limits = {one: places[other][0] for one, other in pairwise(ordered)}
    for index, (where, name, size, is_packed) in enumerate(places):
        mark, *_, name_length, extra_length = _LOCAL.unpack(read.take(where, _LOCAL.size))
        at = where + _LOCAL.size + name_length + extra_length
        if mark != b"PK\3\4" or at + size > limits.get(index, directory):
            read.broken(tr("{name} lies over another member", name=one_line(name, 60)))
        if name in found or read.take(where + _LOCAL.size, name_length).decode("utf-8", "replace") != name:
            read.broken(tr("{name} stands in it twice", name=one_line(name, 60)))
        found[name] = Member(at, size, is_packed)
    return found
