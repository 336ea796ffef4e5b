"""Full-size files of random weights in the formats of llama.cpp and chatglm.cpp, for speed beside them.

Speed depends on shapes and bits, not on what the numbers are: blocks get random codes and one small scale, so that
nothing overflows and no file of 16-bit weights has to exist first. Both formats keep 32 inputs of a row in a block:
Q4_0 is a float16 scale and 16 bytes of codes, Q8_0 a float16 scale and 32.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

Shape = tuple[int, ...]
_BLOCK = 32
_BLOCK_BYTES = {"q4_0": 18, "q8_0": 34}
_GGML_TYPES = {"f32": 0, "q4_0": 2, "q8_0": 8}  # chatglm.cpp numbers them as ggml does
_NOISE = np.random.default_rng(0).integers(0, 256, 1 << 24, dtype=np.uint8)


def blocks(kind: str, shape: Shape) -> np.ndarray:
    """uint8 [rows, bytes of a row]: quantised blocks of random codes, the weights' spread some 1 / sqrt(inputs)."""
    rows, inputs = shape
    size = _BLOCK_BYTES[kind]
    count = rows * inputs // _BLOCK
    scale = np.float16(inputs**-0.5 / (4 if kind == "q4_0" else 64))
    data = np.resize(_NOISE, count * size).reshape(count, size)
    data[:, :2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
    return data.reshape(rows, -1)


def vector(name: str, size: int) -> np.ndarray:
    """float32 [size]: ones for norms, zeros for biases."""
    return np.ones(size, np.float32) if name.endswith("norm.weight") else np.zeros(size, np.float32)


def write_gguf(path: Path, config: Mapping[str, Any], kind: str, head: str) -> None:
    """ChatGLM2 or 3 for llama.cpp, its vocabulary made up; `head`: the kind of embedding and head."""
    hidden, ffn, layers = config["hidden_size"], config["ffn_hidden_size"], config["num_layers"]
    heads, groups, width = config["num_attention_heads"], config["multi_query_group_num"], config["kv_channels"]
    vocab = config["padded_vocab_size"]
    writer = gguf.GGUFWriter(path, "chatglm")
    writer.add_context_length(config["seq_length"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config["layernorm_epsilon"])
    writer.add_rope_dimension_count(width // 2)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(vocab)])
    writer.add_token_scores([0.0] * vocab)
    writer.add_token_types([int(gguf.TokenType.NORMAL)] * vocab)
    kinds = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q8_0": gguf.GGMLQuantizationType.Q8_0}

    def matrix(name: str, shape: Shape, as_kind: str) -> None:
        writer.add_tensor(name, blocks(as_kind, shape), raw_dtype=kinds[as_kind])

    matrix("token_embd.weight", (vocab, hidden), head)
    for layer in range(layers):
        prefix = f"blk.{layer}."
        for name in ("attn_norm.weight", "ffn_norm.weight"):
            writer.add_tensor(prefix + name, vector(name, hidden))
        matrix(prefix + "attn_qkv.weight", ((heads + 2 * groups) * width, hidden), kind)
        writer.add_tensor(prefix + "attn_qkv.bias", vector("bias", (heads + 2 * groups) * width))
        matrix(prefix + "attn_output.weight", (hidden, heads * width), kind)
        matrix(prefix + "ffn_up.weight", (2 * ffn, hidden), kind)
        matrix(prefix + "ffn_down.weight", (hidden, ffn), kind)
    writer.add_tensor("output_norm.weight", vector("norm.weight", hidden))
    matrix("output.weight", (vocab, hidden), head)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_chatglm_cpp(path: Path, config: Mapping[str, Any], kind: str, vocabulary: Path) -> None:
    """ChatGLM-6B (slim), 2 or 3 for chatglm.cpp; all matrices, embedding and head too, are of one kind."""
    first = "inner_hidden_size" in config
    with path.open("wb") as out:
        model_type = 1 if first else 3 if "chatglm3" in config["_name_or_path"] else 2
        proto = vocabulary.read_bytes()
        out.write(b"ggml" + struct.pack("<i", model_type))
        # version, kind, vocabulary, width, heads, key heads, layers, inner width, epsilon, prefix length, rotary base,
        # context, end and padding ids
        out.write(
            struct.pack(
                "<iiiiiiiififiii",
                2,
                _GGML_TYPES[kind],
                config["vocab_size" if first else "padded_vocab_size"],
                config["hidden_size"],
                config["num_attention_heads"],
                config["num_attention_heads" if first else "multi_query_group_num"],
                config["num_layers"],
                config["inner_hidden_size" if first else "ffn_hidden_size"],
                config["layernorm_epsilon"],
                0,
                10000.0,
                config["max_sequence_length" if first else "seq_length"],
                config["eos_token_id"],
                config["pad_token_id"],
            )
        )
        out.write(struct.pack("<i", len(proto)) + proto)
        for name, shape in _first_generation(config) if first else _second_generation(config):
            _tensor(out, name, shape, kind)


def _tensor(out: BinaryIO, name: str, shape: Shape, kind: str) -> None:
    kind = kind if len(shape) == 2 else "f32"
    out.write(struct.pack("<i", len(name)) + name.encode())
    out.write(struct.pack(f"<{2 + len(shape)}i", len(shape), *shape, _GGML_TYPES[kind]))
    out.write(b"\0" * (-out.tell() % 16))
    out.write((blocks(kind, shape) if len(shape) == 2 else vector(name, shape[0])).tobytes())


def _first_generation(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, inner = config["hidden_size"], config["inner_hidden_size"]
    yield "transformer.word_embeddings.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_layers"]):
        prefix = f"transformer.layers.{layer}."
        for name, shape in (
            ("input_layernorm", (hidden,)),
            ("attention.query_key_value", (3 * hidden, hidden)),
            ("attention.dense", (hidden, hidden)),
            ("post_attention_layernorm", (hidden,)),
            ("mlp.dense_h_to_4h", (inner, hidden)),
            ("mlp.dense_4h_to_h", (hidden, inner)),
        ):
            yield f"{prefix}{name}.weight", shape
            yield f"{prefix}{name}.bias", shape[:1]
    yield "transformer.final_layernorm.weight", (hidden,)
    yield "transformer.final_layernorm.bias", (hidden,)


def _second_generation(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    hidden, ffn = config["hidden_size"], config["ffn_hidden_size"]
    mixed = (config["num_attention_heads"] + 2 * config["multi_query_group_num"]) * config["kv_channels"]
    yield "transformer.embedding.word_embeddings.weight", (config["padded_vocab_size"], hidden)
    for layer in range(config["num_layers"]):
        prefix = f"transformer.encoder.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}self_attention.query_key_value.weight", (mixed, hidden)
        yield f"{prefix}self_attention.query_key_value.bias", (mixed,)
        yield f"{prefix}self_attention.dense.weight", (hidden, hidden)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}mlp.dense_h_to_4h.weight", (2 * ffn, hidden)
        yield f"{prefix}mlp.dense_4h_to_h.weight", (hidden, ffn)
    yield "transformer.encoder.final_layernorm.weight", (hidden,)
    yield "transformer.output_layer.weight", (config["padded_vocab_size"], hidden)
