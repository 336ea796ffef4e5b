"""Will it fit? What a model needs in memory, from its files' sizes and its config alone, and the words for "no".

Counted is what stays in memory at the end of a context that is full: weights as they will lie there, the key/value
cache of the whole context, scratch for one piece of a prompt, and the program itself; benchmarks/fit.py compares that
with what the engine and its helper then hold. Not counted: pages of the checkpoint's own file, which the first load
maps and the system takes back when it needs them (they stand in a process's resident size all the same), and what
quantising in memory takes for a moment, about two bytes for each weight of the largest matrix.

Measured on one machine, from which the constants below were also taken: within 5 % with one thread for the starter
model at 1,900 and 8,000 tokens, and for a ChatGLM3 of two layers in float32, int8 and int4 at 500; at 1,000 tokens too
since the cache beside packed weights is counted in the type that the engine settles on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glmchat.chat.gguf_sizes import gguf_sizes
from glmchat.checkpoints.describe import counts_of
from glmchat.checkpoints.folder_check import check_folder
from glmchat.core.errors import DoesNotFit
from glmchat.core.language import tr
from glmchat.core.machine import available_memory, has_bf16
from glmchat.core.text import human_bytes
from glmchat.hub.weight_counts import guess_weights, number, stored_width

# Bytes: interpreter, torch, server, vocabulary and thread pools 200 MB, the pages of their libraries 105 MB, and what
# the allocator keeps of freed scratch, some 15 MB (torch 2.13, x86-64); then the process that renders chat templates,
# which the families with formats of their own do without.
RUNTIME = 320_000_000
HELPER = 20_000_000
_NO_TEMPLATE = ("chatglm", "gpt2")
SCRATCH_TOKENS = 512  # a prompt is read in pieces of at most this many rows
LONGEST_CONTEXT = 32_768  # tokens; the engine reserves no more unless it is asked for
DEFAULT_CONTEXT = 4096  # tokens, where the config names none
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
_EASILY = 0.4  # of the free memory: what float32 weights may take before the engine chooses bfloat16
_ROOMY = 0.7  # of the free memory: what packed weights and a full float32 cache may take before it does
FIT_CONTEXTS = (2048, 8192, 32768)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that loading and answering take."""

    weights: int
    cache: int
    scratch: int
    runtime: int = RUNTIME + HELPER

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.scratch + self.runtime


@dataclass(frozen=True, slots=True)
class Fit:
    """One line of the table: these weights at this context, and whether there is room. fits None: nobody knows."""

    quant: str
    context: int
    memory: Memory
    free: int | None

    @property
    def fits(self) -> bool | None:
        return None if self.free is None else self.memory.total <= self.free

    def to_json(self) -> dict[str, Any]:
        parts = {f"{name}_bytes": size for name, size in asdict(self.memory).items()}
        return {
            "quant": self.quant,
            "context": self.context,
            **parts,
            "total_bytes": self.memory.total,
            "free_bytes": self.free,
            "fits": self.fits,
        }


def fit_table(folder: Path, contexts: Sequence[int] = FIT_CONTEXTS) -> list[Fit]:
    """Every way to load `folder` on this machine: as it is and quantised, at several contexts and the model's own.

    Weights that are quantised already have one way. Empty where the files say too little.
    """
    config = measures(folder)
    own = _length(config)
    lengths = sorted({min(c, own) for c in contexts} | {min(own, LONGEST_CONTEXT)})
    free = available_memory()
    rows = []
    for quant in (None, *(() if _is_quantised(folder, config) else (8, 4))):
        for context in lengths:
            if (memory := estimate(folder, quant, context=context)) is not None:
                label = f"int{quant}" if quant else str(config.get("torch_dtype") or config.get("dtype") or "as it is")
                rows.append(Fit(label, context, memory, free))
    return rows


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
    stored = _stored(folder)
    if not stored:
        return None
    config = measures(folder)
    length = context or min(_length(config), LONGEST_CONTEXT)
    sizes = gguf_sizes(folder) if folder.is_file() else None
    counts = counts_of(config) or guess_weights(stored // stored_width(config), config)
    wide = _width(dtype, 4 * counts.parameters)
    if sizes is not None:
        weights = sizes.weights
        width = _packed_width(dtype, weights, _cache(config, length, 4))
    elif _is_quantised(folder, config):
        weights = stored
        width = _packed_width(dtype, weights, _cache(config, length, 4))
    elif quant is not None:
        width = _packed_width(dtype, counts.bytes_in_memory(quant, wide), _cache(config, length, 4))
        weights = counts.bytes_in_memory(quant, width)
    else:
        width = wide
        weights = counts.bytes_in_memory(None, width)
    runtime = RUNTIME + (0 if config.get("model_type") in _NO_TEMPLATE else HELPER)
    return Memory(weights, _cache(config, length, width), _scratch(config, length, width), runtime)


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
    """Refuse before anything loads: Damaged, Hostile or Usage for what is no model (checkpoints/folder_check.py), DoesNotFit
    with the numbers and the nearest thing that fits (exit 4)."""
    check_folder(folder)
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


def _stored(folder: Path) -> int:
    """Bytes of the weight files."""
    if folder.is_file():
        return folder.stat().st_size
    files = [f for f in folder.glob("*") if f.suffix in _WEIGHTS] if folder.is_dir() else []
    if {f.suffix for f in files} > {".safetensors"}:  # both forms of the same weights: the safe one is read
        files = [f for f in files if f.suffix == ".safetensors"]
    return sum(f.stat().st_size for f in files)


def measures(folder: Path) -> dict[str, Any]:
    """config.json, or the same names from a GGUF file's header."""
    if folder.is_file():
        return dict(sizes.config) if (sizes := gguf_sizes(folder)) is not None else {}
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _is_quantised(folder: Path, config: dict[str, Any]) -> bool:
    if folder.is_file() or any(folder.glob("*.gguf")):
        return True
    return "quantization_config" in config or bool(config.get("quantization_bit"))


def _width(dtype: str | None, wide: int) -> int:
    """Bytes of an activation. wide: dense weights in float32, taken where bfloat16 is slow and they fit easily."""
    if dtype is not None:
        return 4 if dtype == "float32" else 2
    free = available_memory()
    return 2 if has_bf16() or (free is not None and wide > _EASILY * free) else 4


def _packed_width(dtype: str | None, weights: int, cache: int) -> int:
    """Bytes of an activation beside packed weights: four, unless the float32 `cache` leaves too little room.

    The engine decides by the same rule (engine/placement.py, settle_dtype) where the C kernel runs.
    """
    if dtype is not None:
        return 4 if dtype == "float32" else 2
    free = available_memory()
    return 2 if free is not None and weights + cache > _ROOMY * free else 4


def _length(config: dict[str, Any]) -> int:
    """Tokens of the model's own context."""
    names = ("seq_length", "max_sequence_length", "max_position_embeddings", "n_positions")
    return number(config, *names) or DEFAULT_CONTEXT


def _cache(config: dict[str, Any], context: int, width: int) -> int:
    layers = number(config, "num_hidden_layers", "num_layers", "n_layer")
    heads = number(config, "num_attention_heads", "n_head")
    hidden = number(config, "hidden_size", "n_embd")
    if not (layers and heads and hidden):
        return 0
    groups = number(config, "multi_query_group_num") if config.get("multi_query_attention") else None
    groups = groups or number(config, "num_key_value_heads") or heads
    head = number(config, "head_dim", "kv_channels") or hidden // heads
    return 2 * layers * groups * head * context * width


def _scratch(config: dict[str, Any], context: int, width: int) -> int:
    """One piece of a prompt on its way through a layer: the attention's scores, or what the feed-forward part holds."""
    ffn = number(config, "intermediate_size", "inner_hidden_size", "ffn_hidden_size", "n_inner")
    hidden = number(config, "hidden_size", "n_embd") or 1024
    heads = number(config, "num_attention_heads", "n_head") or 1
    vocabulary = number(config, "padded_vocab_size", "vocab_size") or 65_000
    rows = min(SCRATCH_TOKENS, context)
    scores = rows * context * heads * 4
    feeding = rows * 2 * (ffn or 4 * hidden) * width
    return max(scores, feeding) + vocabulary * 4 * 4
