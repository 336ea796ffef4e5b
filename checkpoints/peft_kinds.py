"""The kinds of adapters that PEFT computes, for models that go through transformers; read without torch and PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from glmchat.checkpoints.adapter_settings import LARGEST_RANK, absurd, is_simple, refuse_variants
from glmchat.checkpoints.config import integer
from glmchat.core.errors import Damaged, Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PeftKind:
    """name: as papers write it. mark: part of every tensor's name that belongs to it. weighed: the attribute of PEFT's
    layers in which its effect is linear, by which a weight can multiply; None: it is there or it is not."""

    name: str
    mark: str
    weighed: str | None = None


# By the peft_type in adapter_config.json, in small letters. Each is held against PEFT's own logits in tests/engine.
KINDS: Mapping[str, PeftKind] = {
    "adalora": PeftKind("AdaLoRA", "lora_", "scaling"),
    "beft": PeftKind("BEFT", "beft_"),
    "c3a": PeftKind("C3A", "c3a_"),
    "deft": PeftKind("DEFT", "deft_"),
    "delora": PeftKind("DeLoRA", "delora_"),
    "fourierft": PeftKind("FourierFT", "fourierft_", "fourierft_scaling"),
    "glora": PeftKind("GLoRA", "glora_"),
    "gralora": PeftKind("GraLoRA", "gralora_", "scaling"),
    "hira": PeftKind("HiRA", "hira_"),
    "hra": PeftKind("HRA", "hra_"),
    "ia3": PeftKind("IA3", "ia3_"),
    "lily": PeftKind("Lily", "lily_"),
    "ln_tuning": PeftKind("LayerNorm tuning", "ln_tuning_"),
    "loha": PeftKind("LoHa", "hada_", "scaling"),
    "lokr": PeftKind("LoKr", "lokr_", "scaling"),
    "miss": PeftKind("MiSS", "miss_"),
    "oft": PeftKind("OFT", "oft_"),
    "peanut": PeftKind("PEANuT", "peanut_"),
    "randlora": PeftKind("RandLoRA", "randlora_", "scaling"),
    "road": PeftKind("RoAd", "road_"),
    "tinylora": PeftKind("TinyLoRA", "tinylora_"),
    "trainable_tokens": PeftKind("trainable tokens", "trainable_tokens_"),
    "unilora": PeftKind("Uni-LoRA", "unilora_"),
    "vblora": PeftKind("VB-LoRA", "vblora_"),
    "vera": PeftKind("VeRA", "vera_", "vera_lambda_b"),
    "waveft": PeftKind("WaveFT", "waveft_", "waveft_scaling"),
}

# Of the hub, of the training, or of other files: nothing that decides an answer's numbers.
_LEFT_OUT = (
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "peft_version", "inference_mode",
    "runtime_config", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "init_lora_weights",
)  # fmt: skip
_PATTERNS = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern", "modules_to_save")
# No longer than a side of some tensor, except where PEFT takes whole matrices instead, or counts blocks.
_RANKS = {"r": LARGEST_RANK, "init_r": LARGEST_RANK, "n_frequency": 1 << 24}


def refusal(peft_type: Any) -> Usage:
    """Why an adapter of this type cannot be used at all."""
    if peft_type in ("POLY", "MULTITASK_PROMPT_TUNING"):
        reason = tr("it needs a task number with every question")
    elif peft_type in ("XLORA", "SHADOW"):
        reason = tr("it needs other models or adapters, which are not in its folder")
    elif peft_type in ("OSF", "FROD", "PSOFT"):
        reason = tr("it decomposes every matrix of the base again at each load")
    elif peft_type in ("SHIRA", "SUPERTUNING"):
        reason = tr("its file decides where it writes in the matrices of the base model")
    elif peft_type == "BOFT":
        reason = tr("PEFT runs a compiler for it, and computes something else where that fails")
    elif peft_type == "ADAPTION_PROMPT":
        reason = tr("it replaces Llama's attention, which glmchat computes itself")
    else:
        return Usage(
            tr(
                "this is an adapter of the type {kind}, which glmchat does not support",
                kind=one_line(repr(peft_type), 40),
            ),
            hint=tr(
                "supported: LoRA, prefixes, virtual tokens and PEFT adapters such as LoHa, LoKr, IA3, VeRA and OFT"
            ),
            code="adapter.type",
        )
    return Usage(
        tr("adapters of the type {kind} cannot be used here: {reason}", kind=peft_type, reason=reason),
        hint=tr("merge it with PEFT and use the merged model"),
        code="adapter.type",
    )


def kind_of(config: Mapping[str, Any]) -> str | None:
    """The key in `KINDS` of the kind that adapter_config.json names; None for another one."""
    said = config.get("peft_type")
    return said.lower() if isinstance(said, str) and said.lower() in KINDS and said.isupper() else None


def check_peft(kind: str, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    """Raise Damaged or Usage for tensors or settings that no adapter of this kind has, whatever model it is for."""
    if not any(KINDS[kind].mark in name for name in shapes):
        raise Damaged(
            tr(
                "adapter_config.json says {kind}, and none of the {n} tensors belongs to one ({names}, …)",
                kind=KINDS[kind].name,
                n=len(shapes),
                names=one_line(next(iter(shapes), "?"), 80),
            ),
            hint=tr("the configuration and the weights come from two different training runs"),
            code="adapter.contents",
        )
    settings(kind, config, shapes)


def settings(kind: str, config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """What of adapter_config.json is handed to PEFT: no path, no name of a hub, no absurd size, no slow pattern.

    Raises Damaged or Usage.
    """
    refuse_variants(config)
    plain = {name: value for name, value in config.items() if name not in _LEFT_OUT and value is not None}
    for name, value in plain.items():
        _check(name, value, 0)
    for name in _PATTERNS:
        values = plain.get(name, ())
        for value in [values] if isinstance(values, str) else values if isinstance(values, list) else ():
            if not isinstance(value, str) or not value or (isinstance(values, str) and not is_simple(value)):
                raise absurd(name, value, "names, or a pattern without nested repetition")
    longest = max((length for shape in shapes.values() for length in shape), default=0)
    for name, most in _RANKS.items():
        rank = integer(plain, name, low=0, high=most, default=0)
        if kind not in ("lokr", "oft") and rank > longest:
            raise Damaged(
                tr("adapter_config.json gives {name} {rank}, but no tensor is that long", name=name, rank=rank),
                hint=tr("the configuration and the weights come from two different training runs"),
                code="adapter.rank",
            )
    return plain


def takes_weight(kind: str, config: Mapping[str, Any]) -> bool:
    """Whether what the adapter changes can be multiplied; layers that it replaces whole cannot."""
    whole = any(config.get(name) not in (None, "none", []) for name in ("modules_to_save", "bias"))
    return KINDS[kind].weighed is not None and not whole


def refuse_together(parts: Iterable[tuple[str, bool, float]]) -> None:
    """Raise Usage for adapters that PEFT cannot apply at once, or not with these weights.

    parts: kind ("lora" too), whether it takes a weight (`takes_weight`), weight; those of other kinds are left out.
    """
    active = [(kind, scalable, weight) for kind, scalable, weight in parts if weight and kind in (*KINDS, "lora")]
    kinds = list(dict.fromkeys(kind for kind, _, _ in active))
    if len(kinds) > 1:
        names = " + ".join("LoRA" if kind == "lora" else KINDS[kind].name for kind in kinds)
        raise Usage(
            tr("adapters of different kinds cannot be active at once: {kinds}", kinds=names),
            hint=tr("use those of one kind, or merge one of them with PEFT"),
            code="adapter.mixture",
        )
    for kind, scalable, weight in active:
        if kind != "lora" and weight != 1 and not scalable:
            raise Usage(
                tr("this {kind} can only be on or off: its weight cannot be {weight}", kind=KINDS[kind].name,
                   weight=f"{weight:g}"),
                hint=tr("leave out the weight; it is 1 by default"),
                code="adapter.weight",
            )  # fmt: skip


def rank_of(config: Mapping[str, Any]) -> int | None:
    """The rank that adapter_config.json names, for `adapters show`; not every kind has one."""
    value = next((config[name] for name in ("r", "init_r") if isinstance(config.get(name), int)), None)
    return value if value and not isinstance(value, bool) else None


def _check(name: str, value: Any, depth: int) -> None:
    if isinstance(value, str):
        fine = len(value) <= 300
    elif isinstance(value, int | float):
        fine = -(1 << 32) < value < 1 << 32  # of NaN neither is true
    elif isinstance(value, list | dict):
        fine = depth < 3 and len(value) <= 100_000
        for key in value if isinstance(value, dict) and name.endswith("_pattern") else ():
            if not is_simple(key):
                raise absurd(name, key, "names, or patterns without nested repetition")
        for part in value.values() if isinstance(value, dict) else value:
            if name == "rank_pattern" and isinstance(part, int) and part > LARGEST_RANK:
                raise absurd(name, part, "ranks")
            _check("", part, depth + 1)
    else:
        fine = value is None
    if not fine:
        raise absurd(name, value, "plain settings")
