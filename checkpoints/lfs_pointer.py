"""git-lfs pointers: the 130 bytes that stand where a weight should, after a clone without git-lfs.

Format: github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from glmchat.core.errors import Damaged
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line

_MAX_BYTES = 1024  # the specification's own limit for a pointer
_STARTS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
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


def refuse_pointer(path: Path) -> None:
    """Raise Damaged, with the real size, if `path` is a git-lfs pointer instead of what it stands for, or empty."""
    with path.open("rb") as file:
        head = file.read(_MAX_BYTES + 1)
    if not head:
        raise Damaged(
            tr("{name} is empty", name=one_line(path.name)),
            hint=tr("the download was interrupted: pull the model again"),
            code="file.empty",
        )
    if head.startswith(_STARTS):
        size = re.search(rb"\nsize (\d{1,18})", head)  # also of a pointer whose hash is damaged
        raise Damaged(
            tr(
                "{name} is a git-lfs pointer for a file of {size}, not the file itself",
                name=one_line(path.name),
                size=human_bytes(int(size[1])) if size else "?",
            ),
            hint=tr(
                "fetch it with `glmchat pull --into {folder}`, or `git lfs pull` in the folder",
                folder=shlex.quote(one_line(str(path.parent))),
            ),
            code="file.lfs_pointer",
        )
