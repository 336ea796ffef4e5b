"""What is on this machine: pulled, quantised, registered, and whatever else the Hugging Face cache already holds.

Answered from manifests and `stat` alone: no hub, no hashing, no huggingface_hub import.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glmchat.checkpoints.describe import describe_config
from glmchat.core import locations
from glmchat.core.errors import GlmchatError
from glmchat.core.json_files import small_json
from glmchat.core.text import one_line
from glmchat.hub import aliases, catalogue, manifests, selection, store
from glmchat.hub.catalogue import Catalogue
from glmchat.hub.manifests import BESIDE, FileRecord, Manifest


@dataclass(frozen=True, slots=True)
class Installed:
    """One model, quantised copy or adapter on this machine."""

    name: str  # a reference that finds it again
    kind: str  # "model" | "quantized" | "adapter"
    path: Path  # what the engine loads: a folder or a GGUF file
    repo: str | None = None
    revision: str | None = None
    family: str | None = None
    quant: str = "none"
    size_bytes: int = 0
    complete: bool = True
    base: str | None = None
    source: str = (
        "hf"  # "hf" | "modelscope" | "pypi" | "path" | "made"; "hf" too for what another tool put into the cache
    )
    files: tuple[FileRecord, ...] = ()
    manifest: Manifest | None = None  # None: found in the cache, glmchat did not pull it

    def to_json(self) -> dict[str, Any]:
        """A row of `glmchat list --json`."""
        return {
            "name": self.name,
            "kind": self.kind,
            "repo": self.repo,
            "revision": self.revision,
            "family": self.family,
            "quant": self.quant,
            "path": str(self.path),
            "size_bytes": self.size_bytes,
            "complete": self.complete,
            "base": self.base,
        }


def list_installed() -> list[Installed]:
    """Everything on this machine, half downloads too (`complete` False), models before what is made from them."""
    known = catalogue.load()
    kept = manifests.read_all()
    found = [row for m in kept if (row := _from_manifest(m, known)) is not None]
    paths = {m.root for m in kept}
    found += [row for folder in _entries(locations.models_dir()) if (row := _made(folder)) is not None]
    found += _in_known_folders(known, paths)
    found += [row for row in _cached(known) if row.path not in paths and row.path.parent not in paths]
    found += list_adapters()
    order = {"model": 0, "quantized": 1, "adapter": 2}
    return sorted(_distinct(found), key=lambda row: (order.get(row.kind, 3), row.name.lower()))


def list_adapters() -> list[Installed]:
    """The adapters of the store. Reads their folders and nothing else."""
    folders = _entries(locations.adapters_dir())
    rows = [row for folder in folders if folder.name[0] != "." and (row := _adapter(folder)) is not None]
    return sorted(rows, key=lambda row: row.name.lower())


def adapter_named(name: str) -> Installed | None:
    """The adapter of that name; reads its folder alone. A name that is a path is none."""
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        return None
    return _adapter(locations.adapters_dir() / name)


def complete_names(beginning: str = "") -> list[str]:
    """Names for shell completion: what is here, the aliases, what the catalogue knows."""
    try:
        words = [r.name for r in list_installed() if r.kind != "adapter"]
        words += [*aliases.load(), *catalogue.load().names()]
    except GlmchatError:  # completion has no place for a message
        return []
    return [w for w in dict.fromkeys(words) if w.lower().startswith(beginning.lower())]


def remember(row: Installed) -> None:
    """Note this model as the one last pulled or run."""
    locations.private_dir(locations.state_dir())
    content = {"name": row.name, "path": str(row.path)}
    store.write_whole(_marker(), manifests.as_bytes(json.dumps(content, ensure_ascii=False)), mode=0o600)


def last_used() -> Installed | None:
    """The model last pulled or run, if it is still here."""
    try:
        path = Path(small_json(_marker())["path"])
    except (KeyError, TypeError):
        return None
    return next((r for r in list_installed() if r.path == path and r.complete and r.kind != "adapter"), None)


def engine_path(root: Path, files: Iterable[str]) -> Path:
    """What the engine is given: the folder, or its first GGUF file where that is all the weights there are."""
    weights = [f for f in files if selection.is_weights(f)]
    if weights and all(f.endswith(".gguf") for f in weights):
        return root / min(weights)
    return root


def family_of(config: dict[str, Any]) -> str | None:
    """The family as the engine will call it, as far as a config.json tells it."""
    said = describe_config(config)
    return one_line(said.family, 40) if said else None


def quant_of(config: dict[str, Any]) -> str:
    """ "int4" or "int8" for a checkpoint that is quantised already, THUDM's way or compressed-tensors', else "none"."""
    widths = [config.get("quantization_bit")]
    described = config.get("quantization_config")
    groups = described.get("config_groups") if isinstance(described, dict) else None
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        widths.append(weights.get("num_bits") if isinstance(weights, dict) else None)
    return next((f"int{bits}" for bits in (4, 8) if bits in widths), "none")  # of two, the ends have the wider


def quant_of_folder(folder: Path) -> str:
    """The quantisation of a checkpoint: from its config, or from the name of its GGUF file (`…Q4_K_M.gguf`)."""
    quant = quant_of(small_json(folder / "config.json"))
    if quant == "none" and (file := next(iter(sorted(folder.glob("*.gguf"))), None)):
        found = re.search(r"(?i)(iq\d\w*|q\d(_\w+)?|bf16|f16|f32)(?=[-.])", file.name)
        quant = found[1].lower() if found else "gguf"
    return "none" if quant in ("f16", "bf16", "f32") else quant


def _marker() -> Path:
    return locations.state_dir() / "last-model.json"


def _from_manifest(manifest: Manifest, known: Catalogue) -> Installed | None:
    """The row of a manifest; None if none of its bytes is here, whole or half."""
    sizes = [_size(manifest.root / f.path) for f in manifest.files]
    whole = bool(sizes) and all(size == f.size for size, f in zip(sizes, manifest.files, strict=True))
    on_disk = sum(size for size in sizes if size is not None)
    if not whole and manifest.source in ("hf", "modelscope") and manifest.repo:
        on_disk += sum(_half(manifest.repo, f) for f, size in zip(manifest.files, sizes, strict=True) if size is None)
    if not whole and not on_disk:
        return None
    entry = known.of_repo(manifest.repo, manifest.revision) if manifest.repo and manifest.revision else None
    return Installed(
        name=entry.reference if entry and manifest.source != "path" else manifest.name,
        kind=manifest.kind,
        path=engine_path(manifest.root, [f.path for f in manifest.files]),
        repo=manifest.repo,
        revision=manifest.revision,
        family=manifest.family or (entry.family if entry else None),
        quant=manifest.quant,
        size_bytes=on_disk,
        # A pull of the configs alone (--include) is whole, and yet no model.
        complete=whole and manifest.complete and any(selection.is_weights(f.path) for f in manifest.files),
        base=manifest.base,
        source=manifest.source,
        files=manifest.files,
        manifest=manifest,
    )


def _made(folder: Path) -> Installed | None:
    """A model or adapter that glmchat made, in a folder with its own glmchat.json. None without one."""
    manifest = manifests.read(folder / BESIDE, root=folder)
    if manifest is None or manifest.kind not in ("quantized", "adapter", "model"):
        return None
    sizes = [_size(folder / f.path) for f in manifest.files]
    whole = manifest.complete and all(s == f.size for s, f in zip(sizes, manifest.files, strict=True))
    on_disk = sum(s for s in sizes if s is not None) if sizes else folder_size(folder)
    return Installed(
        name=manifest.name,
        kind=manifest.kind if manifest.kind != "model" else "quantized",
        path=folder,
        repo=manifest.repo,
        revision=manifest.revision,
        family=manifest.family,
        quant=manifest.quant,
        size_bytes=on_disk,
        complete=whole,
        base=manifest.base,
        source="made",
        files=manifest.files,
        manifest=manifest,
    )


def _in_known_folders(known: Catalogue, manifested: set[Path]) -> list[Installed]:
    """Models without a manifest in folders that the catalogue tells: where `pull` puts the file of a package (it may
    have been put there by hand), and the folders that a user's models.toml names as a source."""
    rows = []
    places = [(e, s, locations.models_dir() / e.name) for e in known for s in e.sources if s.kind == "pypi"]
    places += [(e, s, Path(s.repo).expanduser()) for e in known for s in e.sources if s.kind == "path"]
    for entry, source, folder in places:
        if folder in manifested or not entry.files:
            continue
        if all(_size(folder / f.path) == f.size for f in entry.files):
            records = tuple(FileRecord(f.path, f.size or 0, f.sha256, f.git_blob) for f in entry.files)
            rows.append(
                Installed(
                    name=entry.reference,
                    kind="model",
                    path=engine_path(folder, [f.path for f in entry.files]),
                    revision=entry.revision,
                    family=entry.family,
                    quant=entry.quant,
                    size_bytes=sum(f.size for f in records),
                    source=source.kind,
                    files=records,
                )
            )
    return rows


def _cached(known: Catalogue) -> list[Installed]:
    """Snapshots in the Hugging Face cache that hold a model, whoever put them there."""
    cache = locations.hf_cache()
    rows = []
    for folder in sorted(cache.glob("models--*/snapshots/*")) if cache.is_dir() else []:
        try:
            row = _cached_row(folder, known)
        except PermissionError:  # a cache that several users share: what we may not read is not there for us
            continue
        if row is not None:
            rows.append(row)
    return rows


def _cached_row(folder: Path, known: Catalogue) -> Installed | None:
    repo = folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    names = sorted(_inside(folder))
    weights = [n for n in names if selection.is_weights(n)]
    if not weights or not ("config.json" in names or any(n.endswith(".gguf") for n in weights)):
        return None
    entry = known.of_repo(repo, folder.name)
    config = small_json(folder / "config.json")
    wanted = [f.path for f in selection.needed(entry.files)] if entry and entry.files else names
    whole = all(n in names for n in wanted) and not selection.missing_shards(weights)
    return Installed(
        name=entry.reference if entry else _name_of(repo, folder.name),
        kind="model",
        path=engine_path(folder, weights),
        repo=repo,
        revision=folder.name,
        family=(entry.family if entry else None) or family_of(config),
        quant=entry.quant if entry else quant_of_folder(folder),
        size_bytes=sum(_size(folder / n) or 0 for n in names),
        complete=whole and all((folder / n).exists() for n in names),
    )


def _adapter(folder: Path) -> Installed | None:
    """An adapter of the store: of its folder's name, which a folder that was copied or renamed by hand has too."""
    row = _made(folder)
    if row is not None:
        return replace(row, name=folder.name, kind="adapter")
    config = small_json(folder / "adapter_config.json")
    if not config:
        return None
    base = config.get("base_model_name_or_path")
    return Installed(
        name=one_line(folder.name, 80),
        kind="adapter",
        path=folder,
        size_bytes=folder_size(folder),
        base=one_line(base, 120) if isinstance(base, str) else None,
        source="path",
    )


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _name_of(repo: str, commit: str) -> str:
    """`owner/repo` where that means this commit (it is what `main` is, or the only one here), else with the commit."""
    main = store.ref(repo, "main")
    only = len(list((store.repo_folder(repo) / "snapshots").iterdir())) == 1
    return repo if main == commit or (main is None and only) else f"{repo}@{commit[:12]}"


def _half(repo: str, file: FileRecord) -> int:
    """Bytes of a file that a broken-off pull left: half of it, or all of it without its link."""
    etag = file.git_blob or file.sha256
    return (_size(store.partial(repo, etag)) or _size(store.blob(repo, etag)) or 0) if etag else 0


def _distinct(rows: Iterable[Installed]) -> list[Installed]:
    return list({(row.path, row.kind): row for row in reversed(list(rows))}.values())


def _inside(folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()]


def folder_size(folder: Path) -> int:
    """Bytes of all its files, links followed."""
    return sum(_size(p) or 0 for p in folder.rglob("*") if p.is_file())


def _size(path: Path) -> int | None:
    """Size of a file, links followed; None if it is not there."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None
