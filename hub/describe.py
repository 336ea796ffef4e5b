"""What a folder's config.json says of the network in it: for `glmchat show`, without torch and without the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glmchat.core.generations import WORDS, generation, is_cpm
from glmchat.hub.installed import small_json

# Bytes for each parameter of a packed matrix: codes, and a scale (with a zero at 4 bits) for a row or a group of 128;
# and of the embedding and the head, which stay at 8 bits.
_BYTES = {"float16": (2.0, 2.0), "int8": (1.0, 1.0), "int4": (0.5 + 4 / 128, 1.0)}


@dataclass(frozen=True, slots=True)
class Architecture:
    """The measures of a network; None where config.json does not say them or says nonsense.

    memory: bytes of the weights alone, {"float16", "int8", "int4"}. ignored_code: Python that config.json points at
    (`auto_map`); glmchat never reads it.
    """

    family: str
    generation: str | None
    layers: int | None
    hidden_size: int | None
    heads: int | None
    kv_heads: int | None
    vocabulary: int | None
    context: int | None
    parameters: int | None
    stored_bits: int | None  # 4 or 8: THUDM's packed checkpoints
    prefix_length: int | None  # a P-Tuning prefix is part of the checkpoint
    memory: Mapping[str, int] | None
    ignored_code: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(folder: Path) -> Architecture | None:
    """The network in `folder`, or None if there is no config.json that names one."""
    config = small_json(folder / "config.json") if folder.is_dir() else {}
    return describe_config(config) if config else None


def describe_config(config: Mapping[str, Any]) -> Architecture | None:
    """As `describe`, from a parsed config.json. Never raises: a damaged file is refused when it is loaded."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return None
    hidden, heads = _number(config, "hidden_size", "n_embd"), _number(config, "num_attention_heads", "n_head")
    family, words = _generation(kind, config)
    grouped = family in ("chatglm2", "chatglm3", "glm4")
    groups = _number(config, "multi_query_group_num") if grouped else _number(config, "num_key_value_heads")
    layers = _number(config, "num_layers", "num_hidden_layers", "n_layer")
    vocabulary = _number(config, "padded_vocab_size", "vocab_size")
    counts = _parameters(family, config, layers, hidden, heads, groups or heads, vocabulary)
    memory = None
    if counts is not None:
        packed, ends, dense = counts
        memory = {name: int(packed * size + ends * end + dense * 2) for name, (size, end) in _BYTES.items()}
    bits = config.get("quantization_bit")
    return Architecture(
        family=family,
        generation=words,
        layers=layers,
        hidden_size=hidden,
        heads=heads,
        kv_heads=groups or heads,
        vocabulary=vocabulary,
        context=_number(config, "max_sequence_length", "seq_length", "max_position_embeddings", "n_positions", "n_ctx"),
        parameters=None if counts is None else sum(counts),
        stored_bits=bits if bits in (4, 8) else None,
        prefix_length=_number(config, "pre_seq_len"),
        memory=memory,
        ignored_code=_code(config),
    )


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 32:
            return value
    return None


def _generation(kind: str, config: Mapping[str, Any]) -> tuple[str, str | None]:
    """Family, and the generation in words."""
    if kind != "chatglm":
        return kind, WORDS["cpm"] if is_cpm(config) else None
    which = generation(config)
    return "chatglm" if which in ("first", "slim") else which, WORDS[which]


def _parameters(
    family: str,
    config: Mapping[str, Any],
    layers: int | None,
    hidden: int | None,
    heads: int | None,
    groups: int | None,
    vocabulary: int | None,
) -> tuple[int, int, int] | None:
    """Parameters in matrices that quantising packs, in embedding and head, in everything else; None: not counted."""
    if layers is None or hidden is None or heads is None or groups is None or vocabulary is None:
        return None
    prefix = _number(config, "pre_seq_len") or 0
    if family == "chatglm":
        inner = _number(config, "inner_hidden_size") or 4 * hidden
        matrices = 4 * hidden * hidden + 2 * hidden * inner
        vectors = 3 * hidden + hidden + inner + hidden + 4 * hidden
        return layers * matrices, vocabulary * hidden, layers * vectors + 2 * hidden + prefix * layers * 2 * hidden
    if family in ("chatglm2", "chatglm3", "glm4"):
        width, inner = _number(config, "kv_channels") or 128, _number(config, "ffn_hidden_size") or 13696
        fused = (heads + 2 * groups) * width
        matrices = fused * hidden + heads * width * hidden + 3 * hidden * inner
        vectors = fused + 2 * hidden
        kept = layers * vectors + hidden + prefix * layers * 2 * groups * width
        return layers * matrices, 2 * vocabulary * hidden, kept
    if family == "gpt2":
        inner = _number(config, "n_inner", "intermediate_size") or 4 * hidden
        positions = _number(config, "n_positions", "n_ctx") or 1024
        matrices = 4 * hidden * hidden + 2 * hidden * inner
        vectors = 3 * hidden + hidden + inner + hidden + 4 * hidden
        return layers * matrices, vocabulary * hidden, layers * vectors + 2 * hidden + positions * hidden
    return None


def _code(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Files of Python that `auto_map` names, so that it can be said that they are ignored."""
    found = config.get("auto_map")
    if not isinstance(found, Mapping):
        return ()
    entries = (entry for value in found.values() for entry in (value if isinstance(value, list) else [value]))
    return tuple(sorted({str(entry).rpartition(".")[0] + ".py" for entry in entries if isinstance(entry, str)}))
