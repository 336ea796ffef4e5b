"""One model, copy or adapter on this machine: how its row is read from the place where it lies, and its details.

Answered from manifests and `stat` alone: no hub, no hashing, no huggingface_hub import.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from glmchat.checkpoints.config import settle_generation
from glmchat.checkpoints.families import Architecture, describe, describe_config, memory_of
from glmchat.checkpoints.fit import config_at, counted_spec, guess_spec, spec_at
from glmchat.checkpoints.quantised import described, label
from glmchat.checkpoints.readers import readers_at
from glmchat.checkpoints.recipe import is_ours_to_read
from glmchat.checkpoints.weight_choice import missing_parts
from glmchat.checkpoints.weight_files import chosen_weights, weight_paths
from glmchat.core import locations
from glmchat.core.errors import Damaged
from glmchat.core.files import files_below
from glmchat.core.json_files import small_json
from glmchat.core.text import one_line
from glmchat.hub import manifests, selection, store
from glmchat.hub.catalogue import Catalogue, Entry
from glmchat.hub.gguf_choice import choices, default_choice, label_of, matching
from glmchat.hub.manifests import BESIDE, FileRecord, Manifest
from glmchat.hub.modelscope_cache import Kept


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


def copy_folder(row: Installed, bits: int, variant: str = "") -> Path:
    """The folder of the copy with `bits` in the store. variant: settings that differ from the default ("g32-fast")."""
    stem = re.sub(r"[^\w.@+-]", "-", _name_for_copies(row).partition(":")[0]).strip(".-") or "model"
    if row.source == "path":  # two folders of one name are two models
        stem = re.sub(r"[^\w.@+-]", "-", row.path.stem if row.path.is_file() else row.path.name).strip(".-") or "model"
    return locations.models_dir() / f"{stem}-int{bits}{'-' + variant if variant else ''}"


def _name_for_copies(row: Installed) -> str:
    """Of one that a list names by its path, as the same model lies elsewhere too: what both are called."""
    return row.repo if row.repo is not None and row.name == str(row.path) else row.name


def copy_manifest(row: Installed, bits: int) -> dict[str, Any]:
    """What the store wants to know of the copy; the quantiser adds files, hashes and settings."""
    return {
        "name": f"{_name_for_copies(row)}:int{bits}",
        "base": _name_for_copies(row),
        "repo": row.repo,
        "revision": row.revision,
        **({"family": row.family} if row.family else {}),
        "asked": str(row.path),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "parent_files": [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in row.files],
    }


def has_whole_weights(folder: Path, names: Sequence[str]) -> bool:
    """True if all the weights that the index, or else their names, speak of are in `folder`. names: its files."""
    try:
        chosen = chosen_weights(folder, names)
    except Damaged:  # all that was to come has come; what is wrong with it is told by whoever reads it
        return True
    if chosen is not None:
        return not chosen.missing
    gguf = [name for name in names if name.endswith(".gguf")]
    return bool(gguf) and not missing_parts(gguf)


def engine_path(root: Path, files: Iterable[str]) -> Path:
    """What the engine is given: the folder, or its first GGUF file where that is all the weights there are."""
    weights = [f for f in files if selection.is_weights(f)]
    if weights and all(f.endswith(".gguf") for f in weights):
        return root / min(default_choice(weights))
    return root


def one_gguf(row: Installed, wanted: str) -> Installed | None:
    """The row of one of several GGUF models in a repository's folder, by its label or its file; None: not here.

    It is whole if its own files are, whatever the others are.
    """
    root = row.manifest.root if row.manifest is not None else row.path if row.path.is_dir() else row.path.parent
    records = row.files or tuple(FileRecord(name, _size(root / name) or 0) for name in sorted(_inside(root)))
    found = matching([f.path for f in records], wanted)
    if len(found) != 1:
        return None
    files = tuple(f for f in records if f.path in found[0])
    sizes = [_size(root / f.path) for f in files]
    first = found[0][0]
    label = label_of(first)
    name = f"{row.name}/{first}" if label == first else f"{row.name}:{label}"
    return replace(
        row,
        name=row.name if len(choices(f.path for f in records)) == 1 else name,
        path=root / first,
        family=family_at(root / first) or row.family,
        quant=quant_of_folder(root / first) if (root / first).is_file() else row.quant,
        size_bytes=sum(size for size in sizes if size is not None),
        complete=all(size == f.size for size, f in zip(sizes, files, strict=True)) and not missing_parts(found[0]),
        files=files,
    )


def family_of(config: dict[str, Any]) -> str | None:
    """The family as the engine will call it, as far as a config.json tells it."""
    network = describe_config(config)
    return one_line(network.family, 40) if network else None


def family_at(folder: Path) -> str | None:
    """As `family_of`, with what the files beside config.json tell; or the family in a GGUF file's header."""
    if folder.is_file():
        network = describe(folder)
        return one_line(network.family, 40) if network else None
    return family_of(settle_generation(folder, small_json(folder / "config.json")))


def quant_of(config: dict[str, Any]) -> str:
    """ "int4" or "int8" for a checkpoint that is quantised already, another method's word, or "none"."""
    if described(config) and not is_ours_to_read(config):
        return label(config) or "none"
    widths = [config.get("quantization_bit")]
    groups = described(config).get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        widths.append(weights.get("num_bits") if isinstance(weights, Mapping) else None)
    return next((f"int{bits}" for bits in (4, 8) if bits in widths), "none")  # of two, the ends have the wider


def quant_of_folder(folder: Path) -> str:
    """The quantisation of a checkpoint: from its config, or from the name of its GGUF file (`…Q4_K_M.gguf`)."""
    quant = quant_of(small_json(folder / "config.json")) if folder.is_dir() else "none"
    inside = [folder.name] if folder.is_file() else sorted(p.name for p in folder.glob("*.gguf"))
    if quant == "none" and (file := next(iter(default_choice(inside)), None)):
        label = re.search(r"(?i)(iq\d\w*|q\d(_\w+)?|bf16|f16|f32)(?=[-.])", file)
        quant = label[1].lower() if label else "gguf"
    return "none" if quant in ("f16", "bf16", "f32") else quant


def row_of_manifest(manifest: Manifest, entries: Catalogue) -> Installed:
    """The row of what was pulled or registered, judged by the disk: another program may have finished what a pull of
    ours began, and a pull of a few files (--include) is no model. Of size 0 if none of its bytes is here.
    """
    files = (*manifest.files, *_beside(manifest))
    sizes = [_size(manifest.root / f.path) for f in files]
    whole = bool(sizes) and all(size == f.size for size, f in zip(sizes, files, strict=True))
    on_disk = sum(size for size in sizes if size is not None)
    if not whole and manifest.source in ("hf", "modelscope") and manifest.repo:
        on_disk += sum(_half(manifest.repo, f) for f, size in zip(files, sizes, strict=True) if size is None)
    entry = entries.of_repo(manifest.repo, manifest.revision) if manifest.repo and manifest.revision else None
    path = engine_path(manifest.root, [f.path for f in files])
    return Installed(
        name=manifest_name(manifest, entries),
        kind=manifest.kind,
        path=path,
        repo=manifest.repo,
        revision=manifest.revision,
        family=manifest.family or (entry.family if entry else None) or (family_at(path) if whole else None),
        quant=manifest.quant,
        size_bytes=on_disk,
        complete=whole and has_whole_weights(manifest.root, [f.path for f in files]),
        base=manifest.base,
        source=manifest.source,
        files=files,
        manifest=manifest,
    )


def _beside(manifest: Manifest) -> list[FileRecord]:
    """What other programs put into the same snapshot of the cache; each link is named by the hash of its file."""
    if manifest.source != "hf" or manifest.root.parent.name != "snapshots" or not manifest.root.is_dir():
        return []
    listed = {f.path for f in manifest.files}
    records = []
    for path in sorted(_inside(manifest.root)):
        if path not in listed and (size := _size(manifest.root / path)) is not None:
            sha256, git_blob = hash_of_link(manifest.root / path)
            records.append(FileRecord(path, size, sha256, git_blob))
    return records


def hash_of_link(place: Path) -> tuple[str | None, str | None]:
    """(sha256, git blob id) of a file in the Hugging Face cache: one of them, where its link leads to a blob."""
    name = place.readlink().name if place.is_symlink() else ""
    return (
        name if re.fullmatch(r"[0-9a-f]{64}", name) else None,
        name if re.fullmatch(r"[0-9a-f]{40}", name) else None,
    )


def manifest_name(manifest: Manifest, entries: Catalogue) -> str:
    """The name of its row: the catalogue's, where the catalogue knows the revision. `owner/repo` means what `main` is;
    a revision that it was before, also where another program brought the new one, is named with its commit."""
    repo, revision = manifest.repo, manifest.revision
    entry = entries.of_repo(repo, revision) if repo and revision else None
    if entry is not None and manifest.source != "path":
        return entry.reference
    if repo and revision and manifest.source == "hf" and manifest.name == repo:
        main = store.ref(repo, "main")
        if main not in (None, revision) and store.snapshot(repo, str(main)).is_dir():
            return f"{repo}@{revision[:12]}"
    return manifest.name


def row_of_made(folder: Path, manifest: Manifest) -> Installed:
    """The row of a model or an adapter that glmchat made: a folder with its own glmchat.json."""
    sizes = [_size(folder / f.path) for f in manifest.files]
    whole = manifest.complete and all(s == f.size for s, f in zip(sizes, manifest.files, strict=True))
    on_disk = sum(s for s in sizes if s is not None) if sizes else folder_size(folder)
    return Installed(
        name=manifest.name,
        kind="quantized" if manifest.kind == "model" and manifest.quant != "none" else manifest.kind,
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


def made_manifest(folder: Path) -> Manifest | None:
    """The glmchat.json of a folder that glmchat made; None without one."""
    manifest = manifests.read(folder / BESIDE, root=folder)
    return manifest if manifest is not None and manifest.kind in ("quantized", "adapter", "model") else None


def damaged_notes() -> list[Path]:
    """The glmchat.json of each folder in the store that holds one and cannot be told from it."""
    notes = (folder / BESIDE for folder in entries_of(locations.models_dir()))
    return [note for note in notes if os.path.lexists(note) and made_manifest(note.parent) is None]


def row_of_entry(entry: Entry, source: str, folder: Path) -> Installed | None:
    """A model of the catalogue that lies in a folder which its entry names, without a manifest. None: not whole."""
    if not entry.files or any(_size(folder / f.path) != f.size for f in entry.files):
        return None
    records = tuple(FileRecord(f.path, f.size or 0, f.sha256, f.git_blob) for f in entry.files)
    return Installed(
        name=entry.reference,
        kind="model",
        path=engine_path(folder, [f.path for f in entry.files]),
        revision=entry.revision,
        family=entry.family,
        quant=entry.quant,
        size_bytes=sum(f.size for f in records),
        source=source,
        files=records,
    )


def row_of_snapshot(folder: Path, entries: Catalogue) -> Installed | None:
    """A snapshot in the Hugging Face cache, whoever put it there; None if it holds no model. Raises PermissionError."""
    repo = snapshot_repo(folder)
    row = _row_of_files(folder, repo, folder.name)
    if row is None or (entry := entries.of_repo(repo, folder.name)) is None:
        return row and replace(row, name=_name_of(repo, folder.name))
    names = _inside(folder)
    whole = not entry.files or all(f.path in names for f in selection.needed(entry.files))
    family, complete = entry.family or row.family, row.complete and whole
    return replace(row, name=entry.reference, family=family, quant=entry.quant, complete=complete)


def row_of_kept(kept: Kept, entries: Catalogue) -> Installed | None:
    """A folder in ModelScope's cache; None if it holds no model. Its files are its tools' own, as a user's are.

    Of a model that the catalogue has there too it has the catalogue's name, if its files have their sizes.
    """
    there = (e for e in entries for s in e.sources if s.kind == "modelscope" and s.repo.lower() == kept.repo.lower())
    known = next((row for e in there if (row := row_of_entry(e, "path", kept.folder)) is not None), None)
    if known is not None:
        return known
    row = _row_of_files(kept.folder, kept.repo, kept.revision)
    return row and replace(row, source="path")


def _row_of_files(folder: Path, repo: str, revision: str | None) -> Installed | None:
    """The row of a folder that another program filled; None if it holds no model. Raises PermissionError."""
    names = sorted(_inside(folder))
    weights = [n for n in names if selection.is_weights(n)]
    if not weights or not ("config.json" in names or any(n.endswith(".gguf") for n in weights)):
        return None
    path = engine_path(folder, weights)
    return Installed(
        name=repo,
        kind="model",
        path=path,
        repo=repo,
        revision=revision,
        family=family_at(path),
        quant=quant_of_folder(folder),
        size_bytes=sum(_size(folder / n) or 0 for n in names),
        complete=has_whole_weights(folder, names) and all((folder / n).exists() for n in names),
    )


def snapshot_repo(folder: Path) -> str:
    """The repository of a snapshot's folder: models--owner--name/snapshots/COMMIT."""
    return folder.parent.parent.name.removeprefix("models--").replace("--", "/", 1)


def row_of_adapter(folder: Path) -> Installed | None:
    """An adapter of the store: of its folder's name, which a folder that was copied or renamed by hand has too."""
    manifest = made_manifest(folder)
    if manifest is not None:
        return replace(row_of_made(folder, manifest), name=folder.name, kind="adapter")
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


def entries_of(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def adapter_folders() -> list[Path]:
    """The folders of the store of adapters. A hidden one is an adapter that is being added."""
    return [folder for folder in entries_of(locations.adapters_dir()) if not folder.name.startswith(".")]


def _name_of(repo: str, commit: str) -> str:
    """`owner/repo` where that means this commit (it is what `main` is, or the only one here), else with the commit."""
    main = store.ref(repo, "main")
    only = len(list((store.repo_folder(repo) / "snapshots").iterdir())) == 1
    return repo if main == commit or (main is None and only) else f"{repo}@{commit[:12]}"


def _half(repo: str, file: FileRecord) -> int:
    """Bytes of a file that a broken-off pull left: half of it, or all of it without its link."""
    etag = file.git_blob or file.sha256
    return (_size(store.partial(repo, etag)) or _size(store.blob(repo, etag)) or 0) if etag else 0


def _inside(folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in files_below(folder)] if folder.is_dir() else []


def folder_size(folder: Path) -> int:
    """Bytes of all its files, links followed."""
    return sum(_size(p) or 0 for p in files_below(folder)) if folder.is_dir() else 0


def _size(path: Path) -> int | None:
    """Size of a file, links followed; None if it is not there."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def details(row: Installed, entries: Catalogue) -> dict[str, Any]:
    """`files`, `memory`, `architecture`, `licence` and `readers` of `glmchat show --json`.

    files: with hash and origin where a manifest has them, else what lies in the folder. memory: bytes of the weights
    alone, as they are ("none", "int4", "q4_1"…) and, for unquantised weights, in 16 bits, as int8 and as int4. The KV
    cache and the program come on top.
    """
    entry, network = entry_of(row, entries), describe(row.path)
    return {
        "files": [asdict(f) for f in row.files or _files_in(row.path)] or None,
        "memory": _memory(row, entry, network),
        "architecture": network.to_json() if network else None,
        "licence": asdict(entry.licence) if entry and entry.licence else None,
        "readers": found.to_json() if (found := readers_at(row.path)) is not None else None,
    }


def entry_of(row: Installed, entries: Catalogue) -> Entry | None:
    """The catalogue's entry behind a row; for a quantised copy that of its base."""
    if row.repo and row.revision and (entry := entries.of_repo(row.repo, row.revision)):
        return entry
    names = {row.name, row.base}
    return next((e for e in entries if e.reference in names), None)


def _files_in(folder: Path) -> list[FileRecord]:
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [FileRecord(p.name, p.stat().st_size) for p in paths if p.is_file() and not p.name.startswith(".")]


def _memory(row: Installed, entry: Entry | None, network: Architecture | None) -> dict[str, int] | None:
    if row.kind == "adapter":
        return None
    weights = _weight_bytes(row)
    if not weights:
        return None
    if row.quant != "none":
        return {row.quant: weights}
    if network is not None and network.memory is not None:
        return {"none": weights, **network.memory}
    config, spec = config_at(row.path), spec_at(row.path)
    parameters = entry.parameters if entry else None
    counted = counted_spec(spec, config, weights) if parameters is None else guess_spec(spec, config, parameters)
    return {"none": weights, **(memory_of(counted) or {})}


def _weight_bytes(row: Installed) -> int:
    if row.files:
        return sum(f.size for f in row.files if selection.is_weights(f.path))
    if row.path.is_file():
        return row.path.stat().st_size
    if not row.path.is_dir():  # its manifest outlived it
        return 0
    inside = (p for p in row.path.iterdir() if p.is_file() and selection.is_weights(p.name))
    return sum(p.stat().st_size for p in weight_paths(row.path) or inside)
