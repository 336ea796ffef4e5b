"""GLM-4 as transformers writes it (`glm`: GLM-4-9B-chat-hf; `glm4`: GLM-4-0414 and GLM-Z1): configurations, measures.

THUDM's own GLM-4 folders (model_type "chatglm") are of chatglm2.py: another table of names, another vocabulary file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glmchat.checkpoints.config import absurd, epsilon, integer, number, rope_theta, token_ids
from glmchat.checkpoints.quantised import is_read
from glmchat.checkpoints.spec import Layout, ModelSpec, linear, norm
from glmchat.core.language import tr

_TYPES = {"glm": "GLM-4 (hf)", "glm4": "GLM-4-0414"}
_END_IDS = (151329, 151336, 151338)  # transformers' default: <|endoftext|>, <|user|>, <|observation|>


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    values = [config.get(key) for key in ("rope_parameters", "rope_scaling")]
    return next((value for value in values if isinstance(value, Mapping)), {})


def matches(config: Mapping[str, Any]) -> bool:
    """Other scalings of positions go to transformers."""
    rope = _rope(config)
    return (
        config.get("model_type") in _TYPES
        and config.get("hidden_act", "silu") in ("silu", "swish")
        and (rope.get("rope_type") or rope.get("type") or "default") == "default"
        and is_read(config)
    )


def parse(config: Mapping[str, Any]) -> ModelSpec:
    """Raises Damaged for a field that is missing or absurd."""
    hidden = integer(config, "hidden_size", high=2**17, default=4096)
    heads = integer(config, "num_attention_heads", high=2048, default=32)
    kv_heads = integer(config, "num_key_value_heads", high=2048, default=2)
    head_dim = integer(config, "head_dim", high=2**13, default=128)
    rope = {**config, **_rope(config)}
    rotated = int(head_dim * number(rope, "partial_rotary_factor", low=0, high=1, default=0.5))
    damaged = tr("config.json is damaged: pull the model again")
    if rotated % 2 or not rotated:
        raise absurd(
            tr("only {rotated} of {head_dim} dimensions of a head are rotated", rotated=rotated, head_dim=head_dim),
            damaged,
        )
    if heads % kv_heads:
        raise absurd(
            tr(
                "{heads} attention heads of width {head_dim} cannot share {kv_heads} key heads",
                heads=heads,
                head_dim=head_dim,
                kv_heads=kv_heads,
            ),
            damaged,
        )
    vocab = integer(config, "vocab_size", high=2**22, default=151552)
    tied = bool(config.get("tie_word_embeddings", False))
    kind = str(config["model_type"])
    ends = config.get("eos_token_id")
    return ModelSpec(
        family="glm",
        vocab_size=vocab,
        hidden_size=hidden,
        layers=integer(config, "num_hidden_layers", high=1000, default=40),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=integer(config, "intermediate_size", high=2**20, default=13696),
        context=integer(config, "max_position_embeddings", high=2**26, default=131072),
        eos_ids=token_ids([i for i in _END_IDS if i < vocab] if ends is None else ends, vocab),
        bos_id=next(iter(token_ids(config.get("bos_token_id"), vocab)), None),
        generation=_TYPES[kind],
        extra={
            "eps": epsilon(config, "rms_norm_eps", 1.5625e-7),
            "theta": rope_theta(rope),
            "rotated": rotated,
            "qkv_bias": bool(config.get("attention_bias", True)),
            "output_bias": False,
            "head_norms": False,
            "sandwich": kind == "glm4",
            "tied": tied,
            "ignored": ("lm_head.weight",) if tied else (),
        },
        layout=layout,
    )


def layout(spec: ModelSpec) -> Layout:
    extra, hidden, ffn, head = spec.extra, spec.hidden_size, spec.ffn_size, spec.head_dim
    queries, keys = spec.heads * head, spec.kv_heads * head
    ends = ("model.embed_tokens.weight",) if extra["tied"] else ("model.embed_tokens.weight", "lm_head.weight")
    sandwich = norm("post_self_attn_layernorm", hidden, False) | norm("post_mlp_layernorm", hidden, False)
    return Layout(
        "model.layers",
        {
            **norm("input_layernorm", hidden, False),
            **linear("self_attn.q_proj", queries, hidden, extra["qkv_bias"]),
            **linear("self_attn.k_proj", keys, hidden, extra["qkv_bias"]),
            **linear("self_attn.v_proj", keys, hidden, extra["qkv_bias"]),
            **linear("self_attn.o_proj", hidden, queries, False),
            **norm("post_attention_layernorm", hidden, False),
            **linear("mlp.gate_up_proj", 2 * ffn, hidden, False),
            **linear("mlp.down_proj", hidden, ffn, False),
            **(sandwich if extra["sandwich"] else {}),
        },
        {**dict.fromkeys(ends, (spec.vocab_size, hidden)), **norm("model.norm", hidden, False)},
        ends,
    )
