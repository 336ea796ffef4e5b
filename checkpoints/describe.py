"""What a folder's config.json says of the network in it: for `glmchat show`, without torch and without the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glmchat.checkpoints.vocabularies import WORDS, generation, is_cpm
from glmchat.hub.installed import small_json
from glmchat.hub.weight_counts import WeightCounts, count_weights, number


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
    hidden, heads = number(config, "hidden_size", "n_embd"), number(config, "num_attention_heads", "n_head")
    family, words = _generation(kind, config)
    grouped = family in ("chatglm2", "chatglm3", "glm4")
    groups = number(config, "multi_query_group_num") if grouped else number(config, "num_key_value_heads")
    layers = number(config, "num_layers", "num_hidden_layers", "n_layer")
    vocabulary = number(config, "padded_vocab_size", "vocab_size")
    counts = count_weights(family, config)
    bits = config.get("quantization_bit")
    return Architecture(
        family=family,
        generation=words,
        layers=layers,
        hidden_size=hidden,
        heads=heads,
        kv_heads=groups or heads,
        vocabulary=vocabulary,
        context=number(config, "max_sequence_length", "seq_length", "max_position_embeddings", "n_positions", "n_ctx"),
        parameters=None if counts is None else counts.parameters,
        stored_bits=bits if bits in (4, 8) else None,
        prefix_length=number(config, "pre_seq_len"),
        memory=None if counts is None else memory_of(counts),
        ignored_code=_code(config),
    )


def memory_of(counts: WeightCounts) -> dict[str, int]:
    """Bytes of the weights alone, in 16 bits and quantised."""
    return {name: counts.bytes_in_memory(bits) for name, bits in (("float16", None), ("int8", 8), ("int4", 4))}


def counts_of(config: Mapping[str, Any]) -> WeightCounts | None:
    """The weights of the network that a config.json names; None where it is not known."""
    kind = config.get("model_type")
    return count_weights(_generation(kind, config)[0], config) if isinstance(kind, str) else None


def _generation(kind: str, config: Mapping[str, Any]) -> tuple[str, str | None]:
    """Family, and the generation in words."""
    if kind != "chatglm":
        return kind, WORDS["cpm"] if is_cpm(config) else None
    which = generation(config)
    return "chatglm" if which in ("first", "slim") else which, WORDS[which]


def _code(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Files of Python that `auto_map` names, so that it can be said that they are ignored."""
    found = config.get("auto_map")
    if not isinstance(found, Mapping):
        return ()
    entries = (entry for value in found.values() for entry in (value if isinstance(value, list) else [value]))
    return tuple(sorted({str(entry).rpartition(".")[0] + ".py" for entry in entries if isinstance(entry, str)}))
