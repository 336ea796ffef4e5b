"""The one list of the architectures that can be run, which of them a configuration is of, and what it says of itself.

A family's measures are one file of this room: what its configurations look like, and what they say. How it is computed
is the file of the same name in engine/models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from glmchat.checkpoints import chatglm, chatglm2, glm, gpt2, llama
from glmchat.checkpoints.architectures import unknown_type
from glmchat.checkpoints.config import integer, refuse_no_name, settle_generation, token_ids
from glmchat.checkpoints.gguf_file import config_of, open_gguf
from glmchat.checkpoints.quantised import described, method_name
from glmchat.checkpoints.recipe import Recipe, is_ours_to_read
from glmchat.checkpoints.spec import ModelSpec
from glmchat.checkpoints.vocabularies import WORDS, generation
from glmchat.checkpoints.weight_files import settle_head
from glmchat.core.errors import Damaged, GlmchatError, Usage
from glmchat.core.json_files import small_json
from glmchat.core.language import tr
from glmchat.core.text import one_line


@dataclass(frozen=True, slots=True)
class Family:
    """matches: config (config.json, or GGUF metadata in config.json's words) -> is it ours.
    parse: config -> measures, every one checked (checkpoints/config.py) before memory is taken; raises Damaged.
    rename: a checkpoint's tensor name -> the parameter's name, or None for a buffer that is ignored.
    transposed: parameter name -> is it stored [in, out] (GPT-2's Conv1D) instead of [out, in]."""

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Mapping[str, Any]], ModelSpec]
    rename: Callable[[str], str | None] = str
    transposed: Callable[[str], bool] | None = None


def _any_other(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("model_type"), str) and not config.get("gguf")


def _parse_other(config: Mapping[str, Any]) -> ModelSpec:
    """Measures under the names that most configurations use. Raises Damaged where one says too little or absurd things.

    What a config.json leaves to transformers' own defaults is not known here; the engine asks transformers for it.

    Llamas that are computed elsewhere (sliding windows, other scalings) have the tensors of Llamas all the same, and so
    has a GPT-2 that somebody else packed.
    """
    if config["model_type"] == "gpt2":
        return replace(gpt2.parse(config), generation="through transformers")
    if config["model_type"] in llama.TYPES and not config.get("num_local_experts"):
        return replace(llama.parse(config), family=config["model_type"], generation="through transformers")
    inner = config.get("text_config")
    text = inner if isinstance(inner, Mapping) else config  # models that also see or hear
    hidden = integer(text, "hidden_size", "n_embd", "d_model")
    heads = integer(text, "num_attention_heads", "n_head", default=1)
    vocab = integer(text, "vocab_size", high=2**22)
    return ModelSpec(
        family=str(config["model_type"]),
        vocab_size=vocab,
        hidden_size=hidden,
        layers=integer(text, "num_hidden_layers", "n_layer", "num_layers"),
        heads=heads,
        kv_heads=integer(text, "num_key_value_heads", default=heads),
        head_dim=integer(text, "head_dim", default=max(hidden // heads, 1)),
        ffn_size=integer(text, "intermediate_size", "n_inner", "d_ff", default=4 * hidden),
        context=integer(text, "max_position_embeddings", "n_positions", "n_ctx", default=2048),
        eos_ids=token_ids(config.get("eos_token_id"), vocab),
        bos_id=next(iter(token_ids(config.get("bos_token_id"), vocab)), None),
        generation="through transformers",
    )


# In the order in which they are asked; the last takes what nobody else knows.
FAMILIES: tuple[Family, ...] = (
    Family("chatglm", chatglm.matches, chatglm.parse, chatglm.rename),
    Family("chatglm2", chatglm2.matches, chatglm2.parse, chatglm2.rename),
    Family("glm", glm.matches, glm.parse, llama.rename),
    Family("gpt2", gpt2.matches, gpt2.parse, gpt2.rename, gpt2.transposed),
    Family("llama", llama.matches, llama.parse, llama.rename),
    Family("transformers", _any_other, _parse_other),
)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a configuration is of. Raises Damaged for one that names none."""
    refuse_no_name(config)
    for family in FAMILIES:
        if family.matches(config):
            return family
    kind = config.get("model_type") or config.get("architectures") or "no architecture"
    if config.get("gguf"):
        raise Damaged(
            tr("this GGUF file of the architecture {kind} has settings that glmchat does not compute",
               kind=one_line(str(kind), 80)),
            hint=tr("use the Hugging Face folder of this model"),
            code="gguf.unread",
        )  # fmt: skip
    raise unknown_type(str(kind), bool(config.get("auto_map")))


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether glmchat computes the network itself."""
    return any(family.matches(config) for family in FAMILIES[:-1])


_EXPERTS = re.compile(r"(moe_)?(n|num)_(local_|routed_)?experts")
_SWITCHED_OFF = ("is_moe", "enable_moe_block")  # where False, the number of experts means nothing


def has_experts(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is of a mixture of experts, by the counts that the architectures of transformers know."""
    text = config.get("text_config")
    parts = [config, *(part for part in (text, config.get("ffn_config")) if isinstance(part, Mapping))]
    if any(part.get(switch) is False for part in parts for switch in _SWITCHED_OFF):
        return False
    counts = [value for part in parts for key, value in part.items() if _EXPERTS.fullmatch(key)]
    return any(max((n for n in _numbers(count)), default=0) > 1 for count in counts)


def _numbers(value: Any) -> list[int]:
    return [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)]


# RWKV divides matrices of its deeper layers while it answers.
_NEVER_PACKED = ("rwkv",)


def refuse_quantising(config: Mapping[str, Any]) -> None:
    """Raise Usage, with the reason, for weights that `--quant` could not make smaller."""
    if not isinstance(kind := config.get("model_type"), str) or config.get("gguf") or is_native(config):
        return
    if described(config) and not is_ours_to_read(config):
        raise Usage(
            tr("these weights were already quantised with {name}", name=method_name(config)),
            hint=tr("run it without --quant"),
            code="quant.already",
        )
    if kind in _NEVER_PACKED:
        raise Usage(
            tr("the layers of this {family} model are no plain matrices and cannot be quantised",
               family=one_line(kind, 40)),
            hint=tr("run it without --quant"),
            code="quant.family",
        )  # fmt: skip
    if has_experts(config):
        raise Usage(
            tr("the experts of this {family} model are no plain matrices and cannot be quantised",
               family=one_line(kind, 40)),
            hint=tr("run it without --quant"),
            code="quant.family",
        )  # fmt: skip


def is_quantisable(config: Mapping[str, Any]) -> bool:
    """Whether `--quant` makes it smaller, as far as the configuration tells."""
    try:
        refuse_quantising(config)
    except Usage:
        return False
    return True


def parse(config: Mapping[str, Any]) -> ModelSpec:
    """The measures that a configuration tells. Raises Damaged."""
    return family_of(config).parse(config)


def spec_of(config: Mapping[str, Any]) -> ModelSpec | None:
    """As `parse`; None where a configuration tells too little or nothing that can be. Never raises."""
    try:
        return parse(config)
    except GlmchatError:
        return None


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
    model_type: str | None = None  # what its makers call it: "qwen2" of the family "llama"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def describe(folder: Path) -> Architecture | None:
    """The network in `folder`, or in a GGUF file; None if nothing there names one."""
    if folder.is_file():
        try:
            file = open_gguf(folder)
        except (GlmchatError, OSError):
            return None
        try:
            return describe_config(config_of(file))
        except GlmchatError:  # of an architecture that is not read its header tells the name
            kind = file.metadata.get("general.architecture")
            return Architecture(kind, None, model_type=kind) if isinstance(kind, str) and kind else None
    config = small_json(folder / "config.json") if folder.is_dir() else {}
    return describe_config(settle_head(folder, settle_generation(folder, config))) if config else None


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
        return Architecture(kind, words, stored_bits=stored_bits, ignored_code=code, model_type=kind)
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
        model_type=kind,
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
