"""ChatGLM2-6B, ChatGLM3-6B and GLM-4: which configurations are of them, and their measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glmchat.checkpoints.config import absurd, flag, integer, number, require, token_ids
from glmchat.checkpoints.spec import Layout, ModelSpec, linear, norm, prefix_encoder
from glmchat.checkpoints.vocabularies import WORDS, generation
from glmchat.core.language import tr

CHATGLM3_ROLES = (64794, 64795, 64796, 64797)  # <|system|> <|user|> <|assistant|> <|observation|>


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "chatglm" and generation(config) not in ("first", "slim")


def parse(config: Mapping[str, Any]) -> ModelSpec:
    """config.json -> measures; variants of the architecture that were never released are refused by name."""
    require(config, "multi_query_attention", True)
    require(config, "rmsnorm", True)
    require(config, "post_layer_norm", True)
    require(config, "apply_residual_connection_post_layernorm", False)
    family = generation(config)
    hidden = integer(config, "hidden_size", default=4096)
    heads = integer(config, "num_attention_heads", default=32)
    groups = integer(config, "multi_query_group_num", default=2)
    width = integer(config, "kv_channels", default=128)
    vocab = integer(config, "padded_vocab_size", "vocab_size", default=65024)
    if heads % groups or width % 4:
        raise absurd(
            tr(
                "config.json: {heads} heads of width {width} cannot be divided among {groups} groups",
                heads=heads,
                width=width,
                groups=groups,
            ),
            tr("fetch config.json again from the model's repository"),
        )
    eos = token_ids(config.get("eos_token_id", 2), vocab)
    if family == "chatglm3":
        eos = tuple(dict.fromkeys((*eos, *(i for i in (CHATGLM3_ROLES[1], CHATGLM3_ROLES[3]) if i < vocab))))
    context = integer(config, "seq_length", "max_position_embeddings", default=2048)
    ratio = number(config, "rope_ratio", default=1.0, low=1e-3, high=1e6)
    long = "" if family == "glm4" or ratio == 1.0 else f", rope_ratio {ratio:g}"
    return ModelSpec(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        layers=integer(config, "num_layers", "num_hidden_layers", default=28),
        heads=heads,
        kv_heads=groups,
        head_dim=width,
        ffn_size=integer(config, "ffn_hidden_size", default=13696),
        context=context,
        eos_ids=eos,
        generation=WORDS[family] + long,
        extra={
            "epsilon": number(config, "layernorm_epsilon", default=1e-5, low=1e-12, high=1.0),
            "rope_ratio": ratio,
            "linear_bias": flag(config, "add_bias_linear", False),
            "qkv_bias": flag(config, "add_qkv_bias", True),
            "prefix_length": integer(config, "pre_seq_len", default=0, low=0),
            "prefix_projection": flag(config, "prefix_projection", False),
        },
        layout=layout,
    )


def rename(name: str) -> str | None:
    """Checkpoint name -> parameter name; None for the stored rotary frequencies, which the original never loads."""
    return None if name == "transformer.rotary_pos_emb.inv_freq" else name


def layout(spec: ModelSpec) -> Layout:
    """All three generations have the same tensors."""
    hidden, ffn, bias = spec.hidden_size, spec.ffn_size, spec.extra["linear_bias"]
    queries, fused = spec.heads * spec.head_dim, (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    projected = hidden if spec.extra["prefix_projection"] else None
    ends = ("transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight")
    return Layout(
        "transformer.encoder.layers",
        {
            **norm("input_layernorm", hidden, False),
            **linear("self_attention.query_key_value", fused, hidden, bias or spec.extra["qkv_bias"]),
            **linear("self_attention.dense", hidden, queries, bias),
            **norm("post_attention_layernorm", hidden, False),
            **linear("mlp.dense_h_to_4h", 2 * ffn, hidden, bias),
            **linear("mlp.dense_4h_to_h", hidden, ffn, bias),
        },
        {
            **dict.fromkeys(ends, (spec.vocab_size, hidden)),
            **norm("transformer.encoder.final_layernorm", hidden, False),
            **prefix_encoder(
                "transformer.prefix_encoder", spec.prefix_length, spec.prefix_width, spec.prefix_width, projected
            ),
        },
        ends,
    )
