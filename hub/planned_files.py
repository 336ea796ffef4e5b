"""What of a model is here already under another name: other repositories' blobs, ModelScope's own cache."""

from __future__ import annotations

import os
from pathlib import Path

from glmchat.core import locations
from glmchat.hub import store
from glmchat.hub.catalogue import KnownFile, Source


def size_of(path: Path) -> int | None:
    """Size of a file, links followed; None if it is not there."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def elsewhere(repo: str, file: KnownFile, sources: tuple[Source, ...] = ()) -> Path | None:
    """A copy of `file` outside the repository's own blobs that has the right size; its hash is checked when taken.

    Looked at: blobs of other repositories in the same cache (renamed owners, fine-tuned copies with the same
    tokenizer), the folders that the catalogue names as sources, and ModelScope's user cache.
    """
    if file.size is None or not (file.sha256 or file.git_blob):
        return None
    own = store.repo_folder(repo)
    if file.etag:
        for other in sorted(locations.hf_cache().glob(f"models--*/blobs/{file.etag}")):
            if other.parent.parent != own and size_of(other) == file.size:
                return other
    named = [Path(s.repo).expanduser() for s in sources if s.kind == "path"]
    for folder in [*named, *modelscope_folders(repo, sources)]:
        if size_of(folder / file.path) == file.size:
            return folder / file.path
    return None


def modelscope_folders(repo: str, sources: tuple[Source, ...] = ()) -> list[Path]:
    """Folders in which ModelScope's tools keep this model, old and new layout, existing ones only."""
    try:
        roots = [Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()]
    except RuntimeError:  # a user without a home has no such cache
        roots = []
    names = [repo, *(s.repo for s in sources if s.kind == "modelscope")]
    found = []
    for name in dict.fromkeys(names):
        owner, _, model = name.partition("/")
        for root in roots:
            for middle in ("hub/models", "hub", "models", ""):
                # The tools write a dot in a model's name as three underscores.
                for written in dict.fromkeys((model, model.replace(".", "___"))):
                    folder = root / middle / owner / written
                    if folder.is_dir():
                        found.append(folder)
    return found
