"""Every other architecture, which transformers computes: measures under the names that most configurations use.

What a config.json leaves to transformers' own defaults is not known here; the engine asks transformers for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from glmchat.checkpoints import llama
from glmchat.checkpoints.config import integer, token_ids
from glmchat.checkpoints.spec import ModelSpec


def matches(config: Mapping[str, Any]) -> bool:
    return isinstance(config.get("model_type"), str) and not config.get("gguf")


def parse(config: Mapping[str, Any]) -> ModelSpec:
    """Raises Damaged where the configuration says too little, or something absurd.

    Llamas that are computed elsewhere (sliding windows, other scalings) have the tensors of Llamas all the same.
    """
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
