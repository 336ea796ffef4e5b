"""A drawn network as a GGUF file, and dense beside it what gguf's own dequantising makes of the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2 as proto
from transformers import AutoTokenizer

if TYPE_CHECKING:
    from folder_draws import Draw

_NAMES = (
    ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output"),
    ("model.layers.", "blk."), ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"), ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"), ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
)  # fmt: skip
_PRE = {"bytes": "gpt-2", "Llama 3": "llama-bpe", "Qwen": "qwen2"}  # llama.cpp's word for how a text is cut
_MIXTURE = ("Q4_K", "Q5_K", "Q6_K", "Q3_K", "Q2_K", "Q4_K", "Q8_0")


def gguf_name(name: str) -> str:
    for theirs, short in _NAMES:
        name = name.replace(theirs, short)
    return name


def write_gguf(one: Draw, folder: Path, plain: Path, config: Any, model: torch.nn.Module) -> Path:
    """`folder` holds the vocabulary already. A drawn end of a text is the first id of it that is no byte."""
    path = folder / "model.gguf"
    writer = GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    _add_words(one, folder, writer, config.vocab_size)
    dense: dict[str, torch.Tensor] = {}
    for number, (name, tensor) in enumerate(sorted(model.state_dict().items())):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        turn = _turning(name, config)
        data = turn(tensor).contiguous().numpy().astype(np.float32)
        kind = one.quant.removeprefix("GGUF ")
        kind = _MIXTURE[number % len(_MIXTURE)] if kind == "K mixture" else kind
        if data.ndim != 2 or kind == "F32":
            writer.add_tensor(gguf_name(name), data)
            dense[name] = tensor.clone()
            continue
        quantised = GGMLQuantizationType[kind]
        packed = _random_blocks(data, quantised, number) if kind.endswith("_K") else quants.quantize(data, quantised)
        writer.add_tensor(gguf_name(name), packed, raw_dtype=quantised)
        read = torch.from_numpy(quants.dequantize(packed, quantised).astype(np.float32)).view(tensor.shape)
        dense[name] = _turned_back(read, name, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file({name: value.contiguous() for name, value in dense.items()}, plain / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    config.save_pretrained(plain)
    return path


def _heads(name: str, config: Any) -> int | None:
    """Of a matrix whose rows llama.cpp wants in the order of neighbours; only its Llamas are turned."""
    if config.model_type != "llama" or not ("q_proj" in name or "k_proj" in name):
        return None
    return int(config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)


def _turning(name: str, config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    heads = _heads(name, config)
    if heads is None:
        return lambda tensor: tensor
    return lambda tensor: tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _turned_back(tensor: torch.Tensor, name: str, config: Any) -> torch.Tensor:
    heads = _heads(name, config)
    if heads is None:
        return tensor
    return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _random_blocks(data: np.ndarray[Any, Any], kind: GGMLQuantizationType, seed: int) -> np.ndarray[Any, Any]:
    """Codes at random in blocks with small scales: gguf only reads these types."""
    elements, size = GGML_QUANT_SIZES[kind]
    blocks = data.size // elements
    codes = np.random.default_rng(seed).integers(0, 256, (blocks, size), dtype=np.uint8)
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind.name]
    small = np.frombuffer(np.float16(0.0004).tobytes(), np.uint8)
    for at in scales:
        codes[:, at : at + 2] = small
    return codes.reshape(data.shape[0], -1)


def _add_pieces(folder: Path, writer: GGUFWriter, rows: int) -> list[str]:
    """As llama.cpp's converter: pieces with their scores and types, added words as control or user-defined ones."""
    model = proto.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    listed = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = {word["content"]: int(at) for at, word in settings.get("added_tokens_decoder", {}).items()}
    special = {word["content"] for word in settings.get("added_tokens_decoder", {}).values() if word["special"]}
    if (folder / "added_tokens.json").is_file():
        added |= json.loads((folder / "added_tokens.json").read_text())
    for text in sorted(added, key=added.__getitem__):
        listed.append((text, -1000.0, 3 if text in special else 4))
    listed += [(f"<unused{n}>", -1000.0, 5) for n in range(rows - len(listed))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text for text, _, _ in listed])
    writer.add_token_scores([score for _, score, _ in listed])
    writer.add_token_types([kind for _, _, kind in listed])
    return [text for text, _, _ in listed]


def _add_words(one: Draw, folder: Path, writer: GGUFWriter, rows: int) -> None:
    if one.has_pieces:
        words = _add_pieces(folder, writer, rows)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        for name in ("bos", "eos"):
            word = settings[f"{name}_token"]
            writer.add_uint32(
                f"tokenizer.ggml.{name}_token_id", words.index(word if isinstance(word, str) else word["content"])
            )
        writer.add_uint32("tokenizer.ggml.unknown_token_id", 0)
        writer.add_add_bos_token(one.begins)
        if "chat_template" in settings:
            writer.add_chat_template(settings["chat_template"])
        return
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    theirs = AutoTokenizer.from_pretrained(folder)
    added = {word["content"]: word["special"] for word in tokenizer["added_tokens"]}
    words = sorted(theirs.get_vocab(), key=theirs.get_vocab().__getitem__)
    words = [*words, *(f"<unused{n}>" for n in range(rows - len(words)))][:rows]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_PRE[one.vocabulary])
    writer.add_token_list(words)
    unused = "<unused"
    writer.add_token_types([(3 if added[w] else 4) if w in added else 5 if w.startswith(unused) else 1 for w in words])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in merges])
    for name in ("bos", "eos"):
        number = theirs.convert_tokens_to_ids(getattr(theirs, f"{name}_token"))
        if isinstance(number, int) and number < rows:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
    if theirs.chat_template is not None:
        writer.add_chat_template(theirs.chat_template)
