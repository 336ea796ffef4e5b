"""git-lfs pointer files: the 130 bytes that stand where a weight should, after a clone without git-lfs.

Format: github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glmchat.hub.hashing import git_blob_of_bytes

_MAX_BYTES = 1024  # the specification's own limit for a pointer
_FORM = re.compile(
    rb"version https?://(?:git-lfs\.github\.com|hawser\.github\.com)/spec/v1\n"
    rb"(?:[^\n]+\n)*?oid sha256:(?P<oid>[0-9a-f]{64})\n(?:[^\n]+\n)*?size (?P<size>\d{1,15})\n?(?:[^\n]+\n?)*"
)


@dataclass(frozen=True, slots=True)
class Pointer:
    """What a pointer file stands for."""

    oid: str  # sha256 of the real file, hex
    size: int  # bytes of the real file


def parse_pointer(path: Path) -> Pointer | None:
    """The pointer that `path` holds, or None for every other file (also one that is not there). Reads 1 kB at most."""
    try:
        with path.open("rb") as file:
            head = file.read(_MAX_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError):
        return None
    return parse_pointer_bytes(head)


def parse_pointer_bytes(head: bytes) -> Pointer | None:
    """The same for the first bytes of a file; more than 1 kB of them cannot be a pointer. Takes CRLF line ends."""
    if len(head) > _MAX_BYTES or not head.startswith(b"version http"):
        return None
    found = _FORM.fullmatch(head.replace(b"\r\n", b"\n"))
    return Pointer(found["oid"].decode(), int(found["size"])) if found else None


def pointer_text(pointer: Pointer) -> bytes:
    """The canonical pointer file, byte for byte as git-lfs writes it."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{pointer.oid}\nsize {pointer.size}\n".encode()


def pointer_blob(oid: str, size: int) -> str:
    """The git blob id that a hub lists as `oid` of an LFS file: that of its pointer."""
    return git_blob_of_bytes(pointer_text(Pointer(oid, size)))


def find_pointers(folder: Path) -> Iterator[tuple[str, Pointer]]:
    """(relative path, pointer) of every pointer file under `folder`, in order, without `.git`."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if ".git" not in relative.parts and path.is_file() and (pointer := parse_pointer(path)):
            yield relative.as_posix(), pointer
