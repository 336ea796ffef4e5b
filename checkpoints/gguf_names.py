"""GGUF's words for the Llama family, in the words of config.json and of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glmchat.checkpoints.gguf_file import GGUFFile
from glmchat.core.errors import Damaged
from glmchat.core.language import tr
from glmchat.core.text import one_line

ARCHITECTURES = ("llama", "qwen2", "qwen3")

# general.architecture's own prefix is stripped: "llama.block_count" is looked up as "block_count".
_MEASURES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "expert_count": "num_local_experts",
}

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "rope_freqs.weight": "model.rope_freqs",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def config_of(file: GGUFFile) -> dict[str, Any]:
    """The metadata in config.json's words, with `model_type` and `gguf: True`."""
    meta: Mapping[str, Any] = file.metadata
    architecture = meta.get("general.architecture")
    if not isinstance(architecture, str):
        raise Damaged(
            tr("{name} does not say which architecture it contains", name=one_line(file.path.name)),
            hint=tr("it is an adapter or a vocabulary, or it is damaged"),
            code="gguf.no_architecture",
        )
    config: dict[str, Any] = {"model_type": architecture, "gguf": True}
    if architecture not in ARCHITECTURES:
        raise Damaged(
            tr(
                "{name} contains a model of the architecture {architecture}, which glmchat does not read from GGUF",
                name=one_line(file.path.name),
                architecture=one_line(architecture, 40),
            ),
            hint=tr(
                "GGUF files of {names} can be read; for this model, use the Hugging Face folder",
                names=", ".join(ARCHITECTURES),
            ),
            code="gguf.architecture",
        )
    for word, ours in _MEASURES.items():
        value = meta.get(f"{architecture}.{word}")
        if value is not None:
            config[ours] = value
    scaling = meta.get(f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none"):
        config["rope_scaling"] = {"rope_type": scaling, "factor": meta.get(f"{architecture}.rope.scaling.factor")}
    if "rope_freqs.weight" in file.tensors:
        config["rope_freqs"] = True
    rotated = meta.get(f"{architecture}.rope.dimension_count")
    if rotated is not None:
        config["rotary_dim"] = rotated
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None:
        config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    config["attention_output_bias"] = "blk.0.attn_output.bias" in file.tensors
    ids = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    config["eos_token_id"] = [value for value in ids if isinstance(value, int)]
    config["bos_token_id"] = meta.get("tokenizer.ggml.bos_token_id")
    return config


def checkpoint_name(name: str) -> str:
    """ "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; unknown names come back as they are."""
    if name in _OUTER:
        return _OUTER[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    return name
