"""GPT-2 (Radford et al. 2019), and with it the Chinese GPT-2 of CPM: configurations and measures."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from glmchat.checkpoints.config import absurd, epsilon, integer, token_ids
from glmchat.checkpoints.quantised import is_read
from glmchat.checkpoints.spec import Layout, ModelSpec, linear, norm
from glmchat.checkpoints.vocabularies import WORDS, is_cpm
from glmchat.core.language import tr

_TRANSPOSED = re.compile(r"transformer\.h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
_BUFFERS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)")


def matches(config: Mapping[str, Any]) -> bool:
    """GPT-2 with cross attention goes to transformers."""
    return (
        config.get("model_type") == "gpt2"
        and config.get("activation_function", "gelu_new") in ("gelu_new", "gelu_pytorch_tanh", "gelu", "gelu_fast")
        and config.get("scale_attn_weights", True) is True
        and not config.get("scale_attn_by_inverse_layer_idx")
        and not config.get("add_cross_attention")
        and is_read(config)
    )


def parse(config: Mapping[str, Any]) -> ModelSpec:
    """Fields under GPT-2's own names or the general ones."""
    hidden = integer(config, "n_embd", "hidden_size", default=768)
    heads = integer(config, "n_head", "num_attention_heads", default=12)
    vocab = integer(config, "vocab_size", default=50257)
    if hidden % heads:
        raise absurd(
            tr(
                "the model's configuration divides a width of {hidden} among {heads} heads, which is not possible",
                heads=heads,
                hidden=hidden,
            ),
            tr("pull the model again"),
        )
    bos = token_ids(config.get("bos_token_id"), vocab)
    tied = config.get("tie_word_embeddings", True) is not False
    return ModelSpec(
        family="gpt2",
        vocab_size=vocab,
        hidden_size=hidden,
        layers=integer(config, "n_layer", "num_hidden_layers", default=12),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn_size=integer(config, "n_inner", default=4 * hidden),
        context=integer(config, "n_positions", "n_ctx", "max_position_embeddings", default=1024),
        eos_ids=token_ids(config.get("eos_token_id"), vocab),  # CPM's config names 50256, which it does not have
        bos_id=bos[0] if bos else None,
        generation=WORDS["cpm"] if is_cpm(config) else None,
        extra={
            "epsilon": epsilon(config, "layer_norm_epsilon", 1e-5),
            "gelu": "none" if config.get("activation_function") == "gelu" else "tanh",
            "tied": tied,
            "ignored": ("lm_head.weight",) if tied else (),  # most files repeat the embedding under this name
        },
        layout=layout,
    )


def rename(name: str) -> str | None:
    """Checkpoint name -> parameter name: causal masks are computed; OpenAI's files leave out `transformer.`."""
    if _BUFFERS.fullmatch(name):
        return None
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def transposed(parameter: str) -> bool:
    return _TRANSPOSED.fullmatch(parameter) is not None


def layout(spec: ModelSpec) -> Layout:
    """The head is the embedding matrix, or one of its own. Files hold the linear layers as [in, out]."""
    hidden, ffn = spec.hidden_size, spec.ffn_size
    ends = ("transformer.wte.weight",) if spec.extra["tied"] else ("transformer.wte.weight", "lm_head.weight")
    return Layout(
        "transformer.h",
        {
            **norm("ln_1", hidden, True),
            **linear("attn.c_attn", 3 * hidden, hidden, True),
            **linear("attn.c_proj", hidden, hidden, True),
            **norm("ln_2", hidden, True),
            **linear("mlp.c_fc", ffn, hidden, True),
            **linear("mlp.c_proj", hidden, ffn, True),
        },
        {
            **dict.fromkeys(ends, (spec.vocab_size, hidden)),
            "transformer.wpe.weight": (spec.context, hidden),
            **norm("transformer.ln_f", hidden, True),
        },
        ends,
    )
