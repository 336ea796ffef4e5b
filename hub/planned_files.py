"""The files of a pull plan: which are here, whole or half, also under another name, and what the others need."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glmchat.core import locations
from glmchat.hub import store
from glmchat.hub.catalogue import KnownFile, Source


@dataclass(frozen=True, slots=True)
class PlannedFile:
    path: str
    size: int | None
    sha256: str | None
    git_blob: str | None
    etag: str  # the name of its blob
    state: str  # "here" | "linked" (a blob that only needs its link) | "copy" | "partial" | "missing"
    have: int = 0  # bytes of a half download
    local: Path | None = None  # state "copy": where it is

    @property
    def missing(self) -> int:
        """Bytes to fetch, as far as sizes are known."""
        return max((self.size or 0) - self.have, 0) if self.state in ("partial", "missing") else 0


def file_state(repo: str, commit: str, file: KnownFile, sources: tuple[Source, ...]) -> PlannedFile:
    """The file as it stands in the Hugging Face cache, or elsewhere on this machine."""
    etag = file.etag or made_up_etag(repo, commit, file.path)
    planned = PlannedFile(file.path, file.size, file.sha256, file.git_blob, etag, "missing")
    blob_size = size_of(store.blob(repo, etag))
    linked = size_of(store.snapshot(repo, commit) / file.path)
    if file.size is None:
        return replace(planned, state="here" if linked is not None else "missing", size=linked)
    if linked == file.size:
        return replace(planned, state="here")
    if blob_size == file.size:
        return replace(planned, state="linked")
    if local := elsewhere(repo, file, sources):
        return replace(planned, state="copy", local=local)
    if have := size_of(store.partial(repo, etag)):
        return replace(planned, state="partial", have=min(have, file.size))
    return planned


def totals(files: Sequence[PlannedFile], root: Path) -> dict[str, Any]:
    """Bytes to fetch, here and in all, and the disk that they need."""
    missing, total = sum(f.missing for f in files), sum(f.size or 0 for f in files)
    copied = sum(f.size or 0 for f in files if f.state == "copy" and not _same_disk(f.local))
    return {
        "bytes_total": total,
        "bytes_here": total - missing,
        "bytes_missing": missing,
        "disk_needed": missing + copied,
        "disk_free": store.free_bytes(root),
    }


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
    folders = []
    for name in dict.fromkeys(names):
        owner, _, model = name.partition("/")
        for root in roots:
            for middle in ("hub/models", "hub", "models", ""):
                # The tools write a dot in a model's name as three underscores.
                for written in dict.fromkeys((model, model.replace(".", "___"))):
                    folder = root / middle / owner / written
                    if folder.is_dir():
                        folders.append(folder)
    return folders


def made_up_etag(repo: str, commit: str, path: str) -> str:
    """A blob name for a file whose hash nobody knows (--trust-host)."""
    return hashlib.sha256(f"{repo}@{commit}/{path}".encode()).hexdigest()


def _same_disk(path: Path | None) -> bool:
    cache = locations.hf_cache()
    while not cache.exists() and cache != cache.parent:
        cache = cache.parent
    return path is not None and path.stat().st_dev == cache.stat().st_dev
