"""The Llama family (Touvron et al. 2023), Mistral, SmolLM2, Qwen2 and Qwen3: configurations and measures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from glmchat.checkpoints.config import absurd, epsilon, integer, number, rope_theta, token_ids
from glmchat.checkpoints.quantised import is_read
from glmchat.checkpoints.spec import Layout, ModelSpec, linear, norm
from glmchat.core.language import tr

TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm")
_ROPE_TYPES = ("default", "none", "linear", "llama3", "yarn")


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5 writes `rope_parameters`, older ones `rope_scaling` beside `rope_theta`."""
    for key in ("rope_parameters", "rope_scaling"):
        value = config.get(key)
        if isinstance(value, Mapping):
            return value
    return {}


def _rope_type(config: Mapping[str, Any]) -> str:
    rope = _rope(config)
    return str(rope.get("rope_type") or rope.get("type") or "default")


def matches(config: Mapping[str, Any]) -> bool:
    """Variants that need more than this file computes go to transformers: sliding windows, experts, other scalings.

    A window that a Llama names acts on its cache there, though its layers know of none.
    """
    kind = config.get("model_type")
    sliding = config.get("sliding_window") is not None and (
        config.get("use_sliding_window") or not str(kind).startswith("qwen")
    )
    return (
        kind in TYPES
        and not sliding
        and _sees_all(config.get("layer_types"))
        and not config.get("num_local_experts")
        and config.get("hidden_act", "silu") in ("silu", "swish")
        and not config.get("rope_interleaved")
        and is_read(config)
        and _rope_type(config) in _ROPE_TYPES
    )


def _sees_all(layer_types: Any) -> bool:
    return not isinstance(layer_types, list) or all(kind in ("full_attention", "attention") for kind in layer_types)


def _yarn(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, float]:
    """YaRN (Peng et al. 2023) with transformers' defaults (`_compute_yarn_parameters`)."""
    context = number(config, "max_position_embeddings", low=1, high=1e9, default=2048)
    said = {"original_max_position_embeddings": config.get("original_max_position_embeddings")}
    both = rope if said["original_max_position_embeddings"] is None else {**rope, **said}
    original = number(both, "original_max_position_embeddings", low=1, high=1e9, default=context)
    factor = number(rope, "factor", low=1e-3, high=1e6, default=context / original)
    scales = [number(rope, name, low=0, high=1e3, default=0.0) for name in ("mscale", "mscale_all_dim")]
    usual = _mscale(factor, scales[0]) / _mscale(factor, scales[1]) if all(scales) else _mscale(factor, 1.0)
    return {
        "factor": factor,
        "original": original,
        "fast": number(rope, "beta_fast", low=0, high=1e6, default=32.0) or 32.0,
        "slow": number(rope, "beta_slow", low=0, high=1e6, default=1.0) or 1.0,
        "attention": number(rope, "attention_factor", low=1e-3, high=1e3, default=usual),
        "truncate": float(rope.get("truncate", True) is not False),
    }


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def parse(config: Mapping[str, Any]) -> ModelSpec:
    """Raises Damaged for a field that is missing or absurd."""
    hidden = integer(config, "hidden_size", high=2**17)
    heads = integer(config, "num_attention_heads", high=2048)
    kv_heads = integer(config, "num_key_value_heads", high=2048, default=heads)
    head_dim = integer(config, "head_dim", high=2**13, default=max(hidden // heads, 1))
    if heads % kv_heads or head_dim % 2:
        raise absurd(
            tr(
                "{heads} attention heads of width {head_dim} cannot share {kv_heads} key heads",
                heads=heads,
                head_dim=head_dim,
                kv_heads=kv_heads,
            ),
            tr("config.json is damaged: pull the model again"),
        )
    rotated = integer(config, "rotary_dim", high=2**13, default=head_dim)
    if rotated != head_dim:
        raise absurd(
            tr("only {rotated} of {head_dim} dimensions of a head are rotated", rotated=rotated, head_dim=head_dim),
            tr("no model of the Llama family looks like this"),
        )
    vocab = integer(config, "vocab_size", high=2**22)
    rope = _rope(config)
    scaling: dict[str, float] = {}
    if _rope_type(config) in ("linear", "llama3"):
        scaling["factor"] = number(rope, "factor", low=1e-3, high=1e9)
    if _rope_type(config) == "llama3":
        scaling["low"] = number(rope, "low_freq_factor", low=1e-3, high=1e6)
        scaling["high"] = number(rope, "high_freq_factor", low=scaling["low"] * 1.0001, high=1e6)
        scaling["original"] = number(rope, "original_max_position_embeddings", low=1, high=1e9)
    if _rope_type(config) == "yarn":
        scaling |= _yarn(config, rope)
    theta = rope_theta({**config, **{k: v for k, v in rope.items() if k == "rope_theta"}})
    kind = str(config.get("model_type"))
    tied = bool(config.get("tie_word_embeddings", False))
    bias = bool(config.get("attention_bias", kind == "qwen2"))
    return ModelSpec(
        family="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        layers=integer(config, "num_hidden_layers", high=1000),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=integer(config, "intermediate_size", high=2**20),
        context=integer(config, "max_position_embeddings", high=2**26, default=2048),
        eos_ids=token_ids(config.get("eos_token_id"), vocab),
        bos_id=next(iter(token_ids(config.get("bos_token_id"), vocab)), None),
        generation=None if kind == "llama" else kind,
        extra={
            "eps": epsilon(config, "rms_norm_eps", 1e-6),
            "theta": theta,
            "rope": scaling,
            "rope_freqs": bool(config.get("rope_freqs")),
            "qkv_bias": bias,
            # Qwen2 has no bias on the output projection; Llama's attention_bias gives it one.
            "output_bias": bool(config.get("attention_output_bias", bias and kind not in ("qwen2",))),
            "ffn_bias": bool(config.get("mlp_bias", False)),
            "head_norms": kind == "qwen3",
            "tied": tied,
            "ignored": ("lm_head.weight",) if tied else (),  # some files repeat the embedding under this name
        },
        layout=layout,
    )


def rename(name: str) -> str | None:
    """Checkpoint name -> parameter name: rotary frequencies, which old files store, are computed; a network that was
    saved without its head leaves out `model.`."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    return f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name


def layout(spec: ModelSpec) -> Layout:
    """Of all that the family's configurations can say."""
    extra, hidden, ffn, head = spec.extra, spec.hidden_size, spec.ffn_size, spec.head_dim
    queries, keys = spec.heads * head, spec.kv_heads * head
    norms = norm("self_attn.q_norm", head, False) | norm("self_attn.k_norm", head, False)
    ends = ("model.embed_tokens.weight",) if extra["tied"] else ("model.embed_tokens.weight", "lm_head.weight")
    return Layout(
        "model.layers",
        {
            **norm("input_layernorm", hidden, False),
            **linear("self_attn.q_proj", queries, hidden, extra["qkv_bias"]),
            **linear("self_attn.k_proj", keys, hidden, extra["qkv_bias"]),
            **linear("self_attn.v_proj", keys, hidden, extra["qkv_bias"]),
            **linear("self_attn.o_proj", hidden, queries, extra["output_bias"]),
            **(norms if extra["head_norms"] else {}),
            **norm("post_attention_layernorm", hidden, False),
            **linear("mlp.gate_proj", ffn, hidden, extra["ffn_bias"]),
            **linear("mlp.up_proj", ffn, hidden, extra["ffn_bias"]),
            **linear("mlp.down_proj", hidden, ffn, extra["ffn_bias"]),
        },
        {
            **dict.fromkeys(ends, (spec.vocab_size, hidden)),
            **norm("model.norm", hidden, False),
            **({"model.rope_freqs": (head // 2,)} if extra["rope_freqs"] else {}),
        },
        ends,
    )
