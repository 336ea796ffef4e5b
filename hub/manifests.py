"""Manifests: what was pulled or registered, from where, size and hash of each file. `verify` needs nothing else.

One JSON file per model in `$XDG_DATA_HOME/glmchat/manifests`; the same shape stands in `glmchat.json` beside a model
that glmchat made itself (a quantised copy).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from glmchat.core import locations
from glmchat.core.errors import Hostile
from glmchat.core.json_files import small_json
from glmchat.hub import store
from glmchat.hub.references import LONGEST_PART
from glmchat.hub.safe_paths import safe_path

_LONGEST_PATH = 4095  # bytes, of Linux
FORMAT = 1
BESIDE = "glmchat.json"  # the manifest of a model that glmchat made, in the model's own folder


@dataclass(frozen=True, slots=True)
class FileRecord:
    path: str  # relative to the manifest's root
    size: int
    sha256: str | None = None
    git_blob: str | None = None
    host: str = ""  # who served it; "" for a file that was here
    date: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    name: str
    kind: str  # "model" | "quantized" | "adapter"
    source: str  # "hf" | "modelscope" | "pypi" | "path" | "made"
    root: Path  # the folder that the paths of `files` are relative to
    repo: str | None = None
    revision: str | None = None
    family: str | None = None
    quant: str = "none"
    base: str | None = None
    complete: bool = True  # False while a pull is under way or was broken off
    asked: str = ""  # the reference as the person wrote it
    date: str = ""
    files: tuple[FileRecord, ...] = ()

    @property
    def file(self) -> Path:
        """Where this manifest is kept."""
        whole = f"{self.repo or self.name}@{(self.revision or 'local')[:12]}"
        stem = (f"{self.name}@path" if self.source == "path" else whole).replace("/", "--")
        return locations.manifests_dir() / (re.sub(r"[^\w.@+-]", "_", stem) + ".json")

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "root": str(self.root)}


def write(manifest: Manifest) -> Path:
    """Write the manifest, whole or not at all. Returns its path."""
    locations.private_dir(locations.data_dir())
    locations.private_dir(locations.manifests_dir())
    text = json.dumps(manifest.to_json(), ensure_ascii=False, indent=1)
    store.write_whole(manifest.file, as_bytes(text), mode=0o600)
    return manifest.file


def as_bytes(text: str) -> bytes:
    """JSON in UTF-8. A path that is no UTF-8 holds lone surrogates: escaped, as JSON spells them."""
    return text.encode("utf-8", "backslashreplace")


def read_all() -> list[Manifest]:
    """Every readable manifest. One that is broken describes nothing, so its model counts as not installed."""
    return [_at_home(m) for path in _paths() if (m := read(path)) is not None]


def _at_home(manifest: Manifest) -> Manifest:
    """A home that was copied or moved brings its store along; its manifests name the place that it comes from."""
    here = locations.models_dir() / manifest.root.name
    is_in_store = manifest.source in ("pypi", "modelscope")
    return replace(manifest, root=here) if is_in_store and here != manifest.root and here.is_dir() else manifest


def broken() -> list[Path]:
    """Files in the manifest folder that are no manifests; `prune` offers to remove them."""
    return [path for path in _paths() if read(path) is None]


def remove(manifest: Manifest) -> None:
    manifest.file.unlink(missing_ok=True)


def read(path: Path, *, root: Path | None = None) -> Manifest | None:
    """One manifest, or None if it is not there or is none. `root` overrides the folder written in it."""
    try:
        return _manifest(small_json(path), root)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, Hostile):
        return None


def _paths() -> list[Path]:
    folder = locations.manifests_dir()
    return sorted(folder.glob("*.json")) if folder.is_dir() else []


def _root(value: Any) -> Path:
    """Raises ValueError for what no folder is called, and for one that depends on where somebody stands."""
    if not isinstance(value, str) or len(os.fsencode(value)) > _LONGEST_PATH or not Path(value).is_absolute():
        raise ValueError(value)
    home = Path(value)
    if any(len(os.fsencode(part)) > LONGEST_PART or "\0" in part for part in home.parts):
        raise ValueError(home)
    return home


def _manifest(data: Mapping[str, Any], root: Path | None) -> Manifest:
    files = []
    for raw in data.get("files", []):
        record = FileRecord(
            path=str(raw["path"]),
            size=int(raw["size"]),
            sha256=_hash(raw.get("sha256")),
            git_blob=_hash(raw.get("git_blob")),
            host=str(raw.get("host", "")),
            date=str(raw.get("date", "")),
        )
        if record.size < 0:
            raise ValueError(record.size)
        files.append(record)
        safe_path(record.path, source="the manifest")
    home = root or _root(data["root"])
    return Manifest(
        name=str(data["name"]),
        kind=str(data.get("kind", "model")),
        source=str(data.get("source", "made")),
        root=home,
        repo=_text(data.get("repo")),
        revision=_text(data.get("revision")),
        family=_text(data.get("family")),
        quant=str(data.get("quant") or "none"),
        base=_text(data.get("base")),
        complete=bool(data.get("complete", True)),
        asked=str(data.get("asked", "")),
        date=str(data.get("date", "")),
        files=tuple(files),
    )


def _hash(value: Any) -> str | None:
    """Raises ValueError for what is no hash."""
    if value is not None and not (isinstance(value, str) and re.fullmatch(r"[0-9a-f]{1,64}", value)):
        raise ValueError(value)
    return value


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
