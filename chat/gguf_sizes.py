"""The measures of a GGUF file from its header alone, for the memory estimate. The engine reads it in earnest.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Whatever looks wrong ends the reading with None: a
damaged file is the engine's to name, an estimate just does without it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST = 2_000_000  # entries of anything; the largest vocabularies have some 260,000
_HEADER_LIMIT = 256_000_000  # bytes
# Bytes per weight in memory: these stay as they are, every other type is dequantised to 16 bits at load.
_KEPT = {0: 4.0, 1: 2.0, 2: 18 / 32, 3: 20 / 32, 8: 34 / 32, 30: 2.0}


@dataclass(frozen=True, slots=True)
class GGUFSizes:
    """weights: bytes in memory once loaded. config: measures under the names that config.json uses."""

    weights: int
    config: dict[str, int]


def gguf_sizes(path: Path) -> GGUFSizes | None:
    try:
        with path.open("rb") as file:
            return _read(file)
    except (OSError, struct.error, ValueError, UnicodeDecodeError, OverflowError):
        return None


def _read(file: BinaryIO) -> GGUFSizes:
    magic, version, tensors, entries = struct.unpack("<4sIQQ", file.read(24))
    if magic != b"GGUF" or version not in (2, 3) or tensors > _MOST or entries > _MOST:
        raise ValueError("no GGUF of this kind")
    found: dict[str, int] = {}
    for _ in range(entries):
        key = _string(file).partition(".")[2]  # "llama.block_count" -> "block_count"
        value = _value(file, _one(file, "I"))
        if value is not None:
            found[key] = value
    weights = 0.0
    for _ in range(tensors):
        _string(file)
        count = 1
        for _ in range(min(_one(file, "I"), 8)):
            count *= _one(file, "Q")
        weights += count * _KEPT.get(_one(file, "I"), 2.0)
        _one(file, "Q")
    names = {
        "num_hidden_layers": "block_count",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "max_position_embeddings": "context_length",
    }
    return GGUFSizes(int(weights), {ours: found[theirs] for ours, theirs in names.items() if theirs in found})


def _value(file: BinaryIO, kind: int) -> int | None:
    """A whole number; None for everything else, which is skipped."""
    if kind == _STRING:
        _string(file)
        return None
    if kind == _ARRAY:
        inner, count = _one(file, "I"), _one(file, "Q")
        if count > _MOST:
            raise ValueError("an array that long is a lie")
        if inner in _SCALARS:
            _skip(file, count * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING:
            _skip_strings(file, count)
        else:
            for _ in range(count):
                _value(file, inner)
        return None
    value = _one(file, _SCALARS[kind]) if kind in _SCALARS else None
    if value is None:
        raise ValueError("unknown kind of value")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _one(file: BinaryIO, form: str) -> int:
    value: int = struct.unpack("<" + form, file.read(struct.calcsize(form)))[0]
    return value


def _string(file: BinaryIO) -> str:
    length = _one(file, "Q")
    if length > 1_000_000:
        _skip(file, length)
        return ""
    return file.read(length).decode("utf-8", "replace")


def _skip_strings(file: BinaryIO, count: int) -> None:
    """The vocabulary: by far the longest part of a header, so this loop is the one that has to be quick."""
    read, length_of = file.read, struct.Struct("<Q").unpack
    for _ in range(count):
        length = length_of(read(8))[0]
        if length > 1_000_000:
            raise ValueError("a word that long is a lie")
        read(length)


def _skip(file: BinaryIO, width: int) -> None:
    if file.tell() + width > _HEADER_LIMIT:
        raise ValueError("a header that long is a lie")
    file.seek(width, 1)
