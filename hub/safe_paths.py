"""File names from a listing, checked before they touch a disk.

A listing comes from a server, a mirror folder or a lock file; none of them may decide where bytes land. A name is taken
if it is a plain relative path on every system glmchat or its users' disks run on, and refused otherwise; nothing is
rewritten, as a rewritten name would no longer match the hub's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from glmchat.core.errors import Hostile
from glmchat.core.language import tr
from glmchat.core.text import one_line, show_controls

_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
_MAX_PATH, _MAX_PART = 1000, 255  # bytes; what Linux, macOS and NTFS have in common


def safe_path(path: str, *, source: str = "the listing") -> str:
    """`path` itself if it is safe to join to a folder. Raises Hostile with the name and what is wrong with it.

    source: who named it, for the message ("hf-mirror.com", "the mirror folder /mnt/x").
    """
    if wrong := _what_is_wrong(path):
        raise Hostile(
            tr(
                "{source} names a file {path}, which {wrong}",
                source=source,
                path=repr(one_line(path, 120)),
                wrong=wrong,
            ),
            hint=tr("nothing was written; pull from another source"),
            code="listing.path",
        )
    return path


def _what_is_wrong(path: str) -> str | None:
    if not path:
        return tr("is empty")
    if "\0" in path or show_controls(path, keep=frozenset()) != path:
        return tr("contains control characters")
    try:
        encoded = path.encode("utf-8")
    except UnicodeEncodeError:
        return tr("is not text")
    if len(encoded) > _MAX_PATH:
        return tr("is too long")
    if "\\" in path:
        return tr("contains a backslash")
    if path.startswith(("/", "~")):
        return tr("is absolute")
    if re.match(r"[A-Za-z]:", path):
        return tr("starts with a drive letter")
    for part in path.split("/"):
        if part in ("", "."):
            return tr("is not a plain relative path")
        if part == "..":
            return tr("points outside its folder")
        if part.lower() == ".git":
            return tr("writes into a git repository's own folder")
        if _RESERVED.fullmatch(part):
            return tr("is a device name on Windows")
        if part[-1] in ". ":
            return tr("ends in a dot or a space")
        if len(part.encode("utf-8")) > _MAX_PART:
            return tr("is too long")
    return None


def check_listing(paths: Iterable[str], *, source: str = "the listing") -> None:
    """Every name safe, none twice (upper and lower case count as one), no file where another needs a folder."""
    seen: dict[str, str] = {}
    for path in paths:
        folded = safe_path(path, source=source).casefold()
        if folded in seen:
            raise Hostile(
                tr("{source} names {path} twice", source=source, path=repr(one_line(path, 120))),
                hint=tr("nothing was written; pull from another source"),
                code="listing.twice",
            )
        seen[folded] = path
    for folded, path in seen.items():
        parts = folded.split("/")
        for end in range(1, len(parts)):
            if "/".join(parts[:end]) in seen:
                raise Hostile(
                    tr("{source} names {path} under a file", source=source, path=repr(one_line(path, 120))),
                    hint=tr("nothing was written; pull from another source"),
                    code="listing.path",
                )


def inside(folder: Path, path: str, *, source: str | None = None) -> Path:
    """The existing file `folder/path`, links followed. Raises Hostile if it lies outside `folder`."""
    safe_path(path, source=source or str(folder))
    root = folder.resolve()
    target = (root / path).resolve()
    if not target.is_relative_to(root):
        raise Hostile(
            tr(
                "{path} in {folder} is a link that points outside",
                path=repr(one_line(path, 120)),
                folder=one_line(str(folder)),
            ),
            hint=tr("a mirror may serve only files from its own folder; replace the link with the file"),
            code="mirror.link",
        )
    return target
