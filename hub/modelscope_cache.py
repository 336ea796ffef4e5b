"""The cache of ModelScope's own tools: plain folders of files, under layouts that changed over the years.

    ROOT/hub/OWNER/NAME, ROOT/OWNER/NAME            until 1.20; the second where MODELSCOPE_CACHE was set
    ROOT/hub/models/OWNER/NAME, ROOT/models/…       since then; a dot in a name is written as three underscores
    ROOT/models/OWNER--NAME/snapshots/REVISION      since 1.38

Source: modelscope 1.40's `hub/utils/utils.py` and modelscope_hub 0.5's `_download.py`. Nothing is ever written here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MIDDLES = ("hub/models", "models", "hub", "")
_OTHER_KINDS = ("hub", "models", "datasets", "studios", "skills", "mcps", "agents")  # folders that are no owner
_WORD = re.compile(r"\w[\w.-]*")


@dataclass(frozen=True, slots=True)
class Kept:
    """A model's folder. revision: a branch, a tag or a commit, where the folder's name tells it."""

    repo: str
    folder: Path
    revision: str | None = None


def modelscope_cache() -> Path | None:
    """Where ModelScope's tools keep models; None for a user without a home."""
    try:
        return Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser().absolute()
    except RuntimeError:
        return None


def kept() -> list[Kept]:
    """Every model's folder, each once: what another user closed and what is being fetched are left out."""
    found: dict[str, Kept] = {}
    if (root := modelscope_cache()) is None:
        return []
    for middle in _MIDDLES:
        for owner in _folders(root / middle):
            if owner.name in _OTHER_KINDS and middle in ("hub", ""):
                continue
            for one in _snapshots(owner) if (owner / "snapshots").is_dir() else _plain(owner):
                found.setdefault(os.path.realpath(one.folder), one)  # a link beside it bears the name with its dots
    return list(found.values())


def folders_of(*repos: str) -> list[Path]:
    """The folders that hold one of these repositories, the newest layouts first."""
    names = {repo.lower() for repo in repos}
    return [one.folder for one in kept() if one.repo.lower() in names]


def _plain(owner: Path) -> Iterator[Kept]:
    for folder in _folders(owner):
        name = folder.name.replace("___", ".")
        if _WORD.fullmatch(owner.name) and _WORD.fullmatch(name):
            yield Kept(f"{owner.name}/{name}", folder)


def _snapshots(folder: Path) -> Iterator[Kept]:
    owner, _, name = folder.name.partition("--")
    if _WORD.fullmatch(owner) and _WORD.fullmatch(name):
        for snapshot in _folders(folder / "snapshots"):
            yield Kept(f"{owner}/{name}", snapshot, snapshot.name)


def _folders(place: Path) -> list[Path]:
    """Those in a folder that this user may look into, links last. Hidden ones are half downloads and locks."""
    try:
        with os.scandir(place) as entries:
            shown = [entry for entry in entries if entry.name[0] != "." and entry.is_dir()]
    except OSError:
        return []
    return [place / entry.name for entry in sorted(shown, key=lambda entry: (entry.is_symlink(), entry.name))]
