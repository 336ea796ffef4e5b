"""Will it fit? What a model needs in memory, from its files' sizes and its config alone, and the words for "no".

Weights count as they will lie in memory, the key/value cache at the whole context, and scratch for one prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmchat.chat.gguf_sizes import gguf_sizes
from glmchat.core.errors import DoesNotFit
from glmchat.core.language import tr
from glmchat.core.machine import available_memory
from glmchat.core.text import human_bytes

RUNTIME = 350_000_000  # bytes: interpreter, torch and server (240 MB after their import, torch 2.13), thread pools
SCRATCH_TOKENS = 512  # a prompt is read in pieces of at most this many rows
LONGEST_CONTEXT = 32_768  # tokens; the engine reserves no more unless it is asked for
DEFAULT_CONTEXT = 4096  # tokens, where the config names none
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
# Bytes a weight takes once quantised: 4 bits and 8 bits, plus scale and zero for each group of 64.
_QUANTISED = {4: 0.5625, 8: 1.03}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that loading and answering take."""

    weights: int
    cache: int
    scratch: int
    runtime: int = RUNTIME

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.scratch + self.runtime


def memory_words(model: str, needed: int, free: int, smaller: Sequence[tuple[str, int]] = ()) -> DoesNotFit:
    """ "needs 13.4 GB, 8.0 GB free: try `--quant 4`, needs 4.1 GB".

    smaller: (flags, bytes) of other ways to load it; the first that fits is named.
    """
    fitting = next(((flags, size) for flags, size in smaller if size <= free), None)
    if fitting:
        hint = tr("try `{flags}`, needs {size}", flags=fitting[0], size=human_bytes(fitting[1]))
    else:
        hint = tr("close other programs, or take a smaller model")
    return DoesNotFit(
        tr("{model} needs {needed}, {free} free", model=model, needed=human_bytes(needed), free=human_bytes(free)),
        hint=hint,
        code="memory.preflight",
    )


def estimate(
    folder: Path, quant: int | None = None, dtype: str | None = None, context: int | None = None
) -> Memory | None:
    """What loading `folder` (or a GGUF file) takes; None where its files say too little."""
    files = (
        [folder]
        if folder.is_file()
        else [f for f in folder.glob("*") if f.suffix in _WEIGHTS]
        if folder.is_dir()
        else []
    )
    if {f.suffix for f in files} > {".safetensors"}:  # both forms of the same weights: the safe one is read
        files = [f for f in files if f.suffix == ".safetensors"]
    stored = sum(f.stat().st_size for f in files)
    if not stored:
        return None
    if files == [folder] and (sizes := gguf_sizes(folder)) is not None:
        return Memory(sizes.weights, _cache(sizes.config, context, dtype), _scratch(sizes.config))
    config = _config(folder)
    weights = _weights(stored, config, quant, dtype, is_gguf=any(f.suffix == ".gguf" for f in files))
    return Memory(weights, _cache(config, context, dtype), _scratch(config))


def smaller_hint(folder: Path, quant: int | None, context: int | None) -> str | None:
    """A next step for somebody whose engine ran out of memory: "try `--quant 4`, needs 4.1 GB"."""
    now = estimate(folder, quant, context=context)
    if now is None or quant == 4:
        return None
    smaller = estimate(folder, 4, context=context)
    if smaller is None or smaller.total > 0.8 * now.total:
        return None
    return tr("try `{flags}`, needs {size}", flags="--quant 4", size=human_bytes(smaller.total))


def check(
    model: str, folder: Path, quant: int | None = None, dtype: str | None = None, context: int | None = None
) -> Memory | None:
    """Refuse before anything loads. Raises DoesNotFit with the numbers and the nearest thing that fits (exit 4)."""
    needed, free = estimate(folder, quant, dtype, context), available_memory()
    if needed is None or free is None or needed.total <= free:
        return needed
    others = []
    for bits in (8, 4):
        if (quant is None or bits < quant) and (other := estimate(folder, bits, dtype, context)) is not None:
            others.append((f"--quant {bits}", other.total))
    if (short := estimate(folder, 4, dtype, 2048)) is not None and not context:
        others.append(("--quant 4 --context 2048", short.total))
    raise memory_words(model, needed.total, free, others)


def _config(folder: Path) -> dict[str, Any]:
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _weights(stored: int, config: dict[str, Any], quant: int | None, dtype: str | None, *, is_gguf: bool) -> int:
    quantised = is_gguf or "quantization_config" in config or bool(config.get("quantization_bit"))
    if quantised:
        return stored
    width = 4 if config.get("torch_dtype", config.get("dtype")) == "float32" else 2
    count = stored / width
    if quant in _QUANTISED:
        return int(count * _QUANTISED[quant])
    return int(count * (4 if dtype == "float32" else 2 if dtype else width))


def _number(config: dict[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 32:
            return value
    return None


def _cache(config: dict[str, Any], context: int | None, dtype: str | None) -> int:
    layers = _number(config, "num_hidden_layers", "num_layers", "n_layer")
    heads = _number(config, "num_attention_heads", "n_head")
    width = _number(config, "hidden_size", "n_embd")
    if not (layers and heads and width):
        return 0
    groups = _number(config, "multi_query_group_num") if config.get("multi_query_attention") else None
    groups = groups or _number(config, "num_key_value_heads") or heads
    head = _number(config, "head_dim", "kv_channels") or width // heads
    length = _number(config, "seq_length", "max_sequence_length", "max_position_embeddings", "n_positions")
    return (
        2
        * layers
        * groups
        * head
        * (context or min(length or DEFAULT_CONTEXT, LONGEST_CONTEXT))
        * (4 if dtype == "float32" else 2)
    )


def _scratch(config: dict[str, Any]) -> int:
    ffn = _number(config, "intermediate_size", "inner_hidden_size", "ffn_hidden_size", "n_inner")
    width = _number(config, "hidden_size", "n_embd") or 1024
    vocabulary = _number(config, "padded_vocab_size", "vocab_size") or 65_000
    return SCRATCH_TOKENS * (ffn or 4 * width) * 4 * 4 + vocabulary * 4 * 4
