"""Facts about one model on this machine beyond its row: files, memory, licence."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from glmchat.hub import selection
from glmchat.hub.catalogue import Catalogue, Entry
from glmchat.hub.describe import describe
from glmchat.hub.installed import Installed

# Bytes per parameter, quantised: 4 bits and a bf16 scale and zero for each group of 32; 8 bits and a scale a row.
_INT4 = 0.5 + 4 / 32
_INT8 = 1.0 + 4 / 4096


def details(row: Installed, known: Catalogue) -> dict[str, Any]:
    """`files`, `memory`, `architecture` and `licence` of `glmchat show --json`.

    memory: bytes of the weights alone, as they are ("none", "int4", "q4_1"…) and, for unquantised weights, as int8 and
    int4 would make them. The KV cache and the program come on top.
    """
    entry = entry_of(row, known)
    return {
        "files": [asdict(f) for f in row.files] or None,
        "memory": _memory(row, entry),
        "architecture": network.to_json() if (network := describe(row.path)) else None,
        "licence": asdict(entry.licence) if entry and entry.licence else None,
    }


def entry_of(row: Installed, known: Catalogue) -> Entry | None:
    """The catalogue's entry behind a row; for a quantised copy that of its base."""
    if row.repo and row.revision and (entry := known.of_repo(row.repo, row.revision)):
        return entry
    names = {row.name, row.base}
    return next((e for e in known if e.reference in names), None)


def _memory(row: Installed, entry: Entry | None) -> dict[str, int] | None:
    if row.kind == "adapter":
        return None
    weights = _weight_bytes(row)
    if not weights:
        return None
    if row.quant != "none":
        return {row.quant: weights}
    parameters = (entry.parameters if entry else None) or weights // 2  # fp16, what checkpoints are published in
    return {"none": weights, "int8": int(parameters * _INT8), "int4": int(parameters * _INT4)}


def _weight_bytes(row: Installed) -> int:
    if row.files:
        return sum(f.size for f in row.files if selection.is_weights(f.path))
    if row.path.is_file():
        return row.path.stat().st_size
    return sum(p.stat().st_size for p in row.path.iterdir() if p.is_file() and selection.is_weights(p.name))
