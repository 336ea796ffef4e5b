"""ChatGLM-6B: which configurations are of it, and its measures (Du et al. 2022, GLM)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glmchat.checkpoints.config import absurd, flag, integer, number, token_ids
from glmchat.checkpoints.spec import Layout, ModelSpec, linear, norm, prefix_encoder
from glmchat.checkpoints.vocabularies import WORDS, generation
from glmchat.core.errors import Damaged
from glmchat.core.language import tr

IMAGE_TOKENS = 20000


def matches(config: Mapping[str, Any]) -> bool:
    """All three generations call themselves "chatglm"; only the first is without grouped attention."""
    return config.get("model_type") == "chatglm" and generation(config) in ("first", "slim")


def parse(config: Mapping[str, Any]) -> ModelSpec:
    """config.json -> measures. Absent ids follow the generation that the vocabulary belongs to."""
    if config.get("quantization_embeddings"):
        raise Damaged(
            tr("this checkpoint has quantised embeddings (chatglm-6b-int4-qe), a layout that was never documented"),
            hint=tr("use chatglm-6b-int4, or chatglm-6b with --quant 4"),
            code="model.quantised_embeddings",
        )
    hidden = integer(config, "hidden_size", default=4096)
    heads = integer(config, "num_attention_heads", default=32)
    vocab = integer(config, "vocab_size", default=150528)
    if hidden % heads or (hidden // heads) % 4:
        raise absurd(
            tr(
                "config.json: hidden_size {hidden} cannot be divided into {heads} heads whose width is a "
                "multiple of four",
                hidden=hidden,
                heads=heads,
            ),
            tr("fetch config.json again from the model's repository"),
        )
    slim = generation(config) == "slim"
    shift = IMAGE_TOKENS if slim else 0
    bos = integer(config, "bos_token_id", default=150004 - shift, low=0, high=vocab - 1)
    # <eop> follows <sop> in every vocabulary. First-generation folders are about whose generation_config.json names the
    # slim <eop>, an ordinary word there, and such a model would never end.
    eop = token_ids(bos + 1, vocab)
    named = token_ids(config.get("eos_token_id"), vocab)
    return ModelSpec(
        family="chatglm",
        vocab_size=vocab,
        hidden_size=hidden,
        layers=integer(config, "num_layers", "num_hidden_layers", default=28),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn_size=integer(config, "inner_hidden_size", default=4 * hidden),
        context=integer(config, "max_sequence_length", "seq_length", default=2048),
        causal=False,
        eos_ids=named if set(eop) <= set(named) else eop,
        bos_id=bos,
        generation=WORDS[generation(config)],
        extra={
            "epsilon": number(config, "layernorm_epsilon", default=1e-5, low=1e-12, high=1.0),
            "mask_id": integer(config, "mask_token_id", default=bos - 4, low=0, high=vocab - 1),
            "gmask_id": integer(config, "gmask_token_id", default=bos - 3, low=0, high=vocab - 1),
            # The revision of March 2023 fixed these ids in code; a config that names them came with later code.
            "first_generation": not slim and config.get("gmask_token_id") is None,
            "image_tokens": 0 if slim else IMAGE_TOKENS,
            "two_positions": flag(config, "position_encoding_2d", True),
            "prefix_length": integer(config, "pre_seq_len", default=0, low=0),
            "prefix_projection": flag(config, "prefix_projection", False),
        },
        layout=layout,
    )


def rename(name: str) -> str | None:
    """Checkpoint name -> parameter name; None for what the original never uses.

    `lm_head.weight` is stored, yet the original's loader replaces it by the embedding matrix, whatever it holds.
    """
    if name.endswith("attention.rotary_emb.inv_freq") or name == "lm_head.weight":
        return None
    return name


def layout(spec: ModelSpec) -> Layout:
    """The head is the embedding matrix, whatever the file holds."""
    hidden, ffn, prefix = spec.hidden_size, spec.ffn_size, spec.prefix_width
    projected = spec.extra["prefix_projection"]
    encoder = (spec.prefix_length, prefix, hidden if projected else prefix, hidden if projected else None)
    return Layout(
        "transformer.layers",
        {
            **norm("input_layernorm", hidden, True),
            **linear("attention.query_key_value", 3 * hidden, hidden, True),
            **linear("attention.dense", hidden, hidden, True),
            **norm("post_attention_layernorm", hidden, True),
            **linear("mlp.dense_h_to_4h", ffn, hidden, True),
            **linear("mlp.dense_4h_to_h", hidden, ffn, True),
        },
        {
            "transformer.word_embeddings.weight": (spec.vocab_size, hidden),
            **norm("transformer.final_layernorm", hidden, True),
            **prefix_encoder("transformer.prefix_encoder", *encoder),
        },
        ("transformer.word_embeddings.weight",),
    )
