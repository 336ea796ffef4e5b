"""Facts about one model on this machine beyond its row: files, memory, licence."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from glmchat.checkpoints.describe import Architecture, describe, memory_of
from glmchat.checkpoints.fit import config_at, counted_spec, guess_spec, spec_at
from glmchat.hub import selection
from glmchat.hub.catalogue import Catalogue, Entry
from glmchat.hub.installed import Installed
from glmchat.hub.manifests import FileRecord


def details(row: Installed, entries: Catalogue) -> dict[str, Any]:
    """`files`, `memory`, `architecture` and `licence` of `glmchat show --json`.

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
    return sum(p.stat().st_size for p in row.path.iterdir() if p.is_file() and selection.is_weights(p.name))
