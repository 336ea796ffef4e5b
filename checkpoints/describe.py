"""What a folder's config.json says of the network in it: for `glmchat show`, without torch and without the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glmchat.checkpoints.families import spec_of
from glmchat.checkpoints.recipe import Recipe
from glmchat.checkpoints.spec import ModelSpec
from glmchat.checkpoints.vocabularies import WORDS, generation
from glmchat.core.json_files import small_json


@dataclass(frozen=True, slots=True)
class Architecture:
    """The measures of a network; None where config.json does not say them or says nonsense.

    memory: bytes of the weights alone, {"float16", "int8", "int4"}. ignored_code: Python that config.json points at
    (`auto_map`); glmchat never reads it.
    """

    family: str
    generation: str | None
    layers: int | None = None
    hidden_size: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    vocabulary: int | None = None
    context: int | None = None
    parameters: int | None = None
    stored_bits: int | None = None  # 4 or 8: THUDM's packed checkpoints
    prefix_length: int | None = None  # a P-Tuning prefix is part of the checkpoint
    memory: Mapping[str, int] | None = None
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
    bits, code = config.get("quantization_bit"), _code(config)
    stored_bits = bits if bits in (4, 8) else None
    spec = spec_of(config)
    if spec is None:
        words = WORDS[generation(config)] if kind == "chatglm" else None
        return Architecture(kind, words, stored_bits=stored_bits, ignored_code=code)
    return Architecture(
        family=spec.family,
        generation=spec.generation,
        layers=spec.layers,
        hidden_size=spec.hidden_size,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        vocabulary=spec.vocab_size,
        context=spec.context,
        parameters=spec.parameters(),
        stored_bits=stored_bits,
        prefix_length=spec.prefix_length or None,
        memory=memory_of(spec),
        ignored_code=code,
    )


def memory_of(spec: ModelSpec) -> dict[str, int] | None:
    """Bytes of the weights alone, in 16 bits and quantised; None for a network whose tensors are not known."""
    widths = {"float16": None, "int8": Recipe(8), "int4": Recipe(4)}
    sizes = {name: spec.weight_bytes(recipe) for name, recipe in widths.items()}
    return {name: size for name, size in sizes.items() if size is not None} or None


def _code(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Files of Python that `auto_map` names, so that it can be said that they are ignored."""
    found = config.get("auto_map")
    if not isinstance(found, Mapping):
        return ()
    entries = (entry for value in found.values() for entry in (value if isinstance(value, list) else [value]))
    return tuple(sorted({str(entry).rpartition(".")[0] + ".py" for entry in entries if isinstance(entry, str)}))
