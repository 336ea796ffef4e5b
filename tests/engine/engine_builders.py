"""Tiny Llama checkpoints with random weights, as a Hugging Face folder and as a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from glmchat.engine.families import family_of

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 272, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "eos_token_id": 2,
    "tie_word_embeddings": True,
}  # fmt: skip


def vocabulary() -> dict[str, int]:
    """The control tokens, the 256 bytes, and two merged words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {text: index for index, text in enumerate([*SPECIALS, *letters, "he", "Ġt"])}


def tokenizer() -> Tokenizer:
    found = Tokenizer(models.BPE(vocabulary(), [("h", "e"), ("Ġ", "t")]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIALS])
    return found


def weights(config: dict[str, Any], seed: int = 7) -> dict[str, torch.Tensor]:
    """Random tensors under the names of the checkpoint."""
    apart = ("rope_parameters", "rope_scaling", "quantization_config", "quantization")  # they change no shape
    family, spec = family_of({key: value for key, value in config.items() if key not in apart})
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in family.build(spec).named_parameters()}
    noise = torch.Generator().manual_seed(seed)
    return {
        name: 1 + 0.1 * torch.randn(shape, generator=noise)
        if "norm" in name
        else 0.2 * torch.randn(shape, generator=noise)
        for name, shape in shapes.items()
    }


def write_folder(folder: Path, template: str | None = TEMPLATE, **changes: Any) -> Path:
    """config.json, model.safetensors, tokenizer.json and a chat template."""
    config = {**CONFIG, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(config), folder / "model.safetensors")
    tokenizer().save(str(folder / "tokenizer.json"))
    data = {"eos_token": "<|im_end|>"} | ({} if template is None else {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(json.dumps(data))
    return folder


def write_gguf(
    path: Path,
    kind: str = "F32",
    template: str | None = TEMPLATE,
    kinds: Mapping[str, str] | None = None,
    **fields: Any,
) -> Path:
    """The same network as `write_folder`, in GGUF's names and its order of query and key rows.

    kinds: other types than `kind`, by a part of the tensor's name.
    """
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    words = list(vocabulary())
    words += [f"<unused{i}>" for i in range(CONFIG["vocab_size"] - len(words))]
    writer.add_token_list(words)
    writer.add_token_types([3 if word in SPECIALS or word.startswith("<unused") else 1 for word in words])
    writer.add_token_merges(["h e", "Ġ t"])
    writer.add_eos_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
    for key, value in fields.items():
        add[type(value)](key, value)
    for name, tensor in weights(CONFIG).items():
        short = gguf_name(name)
        if "q_proj" in name or "k_proj" in name:
            heads = CONFIG["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        data = tensor.numpy().astype(np.float32)
        its = next((other for part, other in (kinds or {}).items() if part in name), kind)
        if tensor.dim() == 2 and its != "F32":
            quantised = GGMLQuantizationType[its]
            writer.add_tensor(short, quants.quantize(data, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(short, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """A checkpoint's tensor name in GGUF's words."""
    for ours, theirs in (
        ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output"),
        ("model.layers.", "blk."), ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"), ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"), ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name
