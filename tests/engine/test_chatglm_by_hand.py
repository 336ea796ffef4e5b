"""The specification's arithmetic written a second time, in float64 and loops, for configurations nobody recorded.

Covers engine/models/chatglm.py, engine/models/chatglm2.py.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from glmchat.engine import Engine, Sampling

Array = NDArray[np.float64]
Weights = dict[str, Array]
MASK, GMASK, SOP = 200, 201, 204
V1 = {"vocab_size": 300, "bos_token_id": SOP, "eos_token_id": 205, "mask_token_id": MASK, "gmask_token_id": GMASK}
V1 |= {"hidden_size": 64, "inner_hidden_size": 96, "num_attention_heads": 4}
V2 = {"padded_vocab_size": 300, "hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16, "num_attention_heads": 4}
PREFIX = {"pre_seq_len": 3}


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def linear(w: Weights, name: str, x: Array) -> Array:
    return np.asarray(x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", np.zeros(1)))


def prefix_of(w: Weights, layers: int, groups: int, width: int) -> Array:
    """[length, 2 * layers, groups, width]; empty without an encoder."""
    stem = "transformer.prefix_encoder."
    if f"{stem}embedding.weight" not in w:
        return np.zeros((0, 2 * layers, groups, width))
    rows = w[f"{stem}embedding.weight"]
    if f"{stem}trans.0.weight" in w:
        rows = linear(w, f"{stem}trans.2", np.tanh(linear(w, f"{stem}trans.0", rows)))
    return rows.reshape(len(rows), 2 * layers, groups, width)


def attention(query: Array, key: Array, value: Array, prefix: Array, layer: int, seen: NDArray[np.bool_]) -> Array:
    """query [n, heads, d]; key, value [n, groups, d]; one head and one token after the other."""
    key = np.concatenate((prefix[:, 2 * layer], key))
    value = np.concatenate((prefix[:, 2 * layer + 1], value))
    out = np.empty_like(query)
    share = query.shape[1] // key.shape[1]
    for row in range(len(query)):
        may = np.concatenate((np.ones(len(prefix), bool), seen[row]))
        for head in range(query.shape[1]):
            scores = key[may, head // share] @ query[row, head] / query.shape[2] ** 0.5
            out[row, head] = softmax(scores) @ value[may, head // share]
    return out.reshape(len(query), -1)


def layer_norm(w: Weights, name: str, x: Array) -> Array:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return np.asarray(x * w[f"{name}.weight"] + w[f"{name}.bias"])


def turn_halves(x: Array, positions: NDArray[np.int64]) -> Array:
    """x [n, heads, e] by one row of positions; element i goes with i + e / 2. Frequencies are rounded to float16."""
    width = x.shape[-1]
    frequency = np.float32(1) / np.float32(10000) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    angle = positions[:, None, None] * frequency.astype(np.float16).astype(np.float64)
    low, high = x[..., : width // 2], x[..., width // 2 :]
    return np.concatenate(
        (low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)), axis=-1
    )


def chatglm(w: Weights, config: dict[str, Any], ids: list[int]) -> Array:
    heads, n = config["num_attention_heads"], len(ids)
    hidden, layers = config["hidden_size"], config["num_layers"]
    context, is_gmask = ids.index(SOP), GMASK in ids
    place = ids.index(GMASK if is_gmask else MASK)
    seen = np.array([[j < context or j <= i for j in range(n)] for i in range(n)])
    if config["position_encoding_2d"]:
        rows = [[i if i < context else place for i in range(n)], [max(0, i - context + 1) for i in range(n)]]
    else:
        rows = [[i if i < context or is_gmask else place for i in range(n)]]
    prefix = prefix_of(w, layers, heads, hidden // heads)
    x = w["transformer.word_embeddings.weight"][ids]
    for layer in range(layers):
        stem = f"transformer.layers.{layer}."
        a = layer_norm(w, f"{stem}input_layernorm", x)
        fused = linear(w, f"{stem}attention.query_key_value", a).reshape(n, heads, -1)
        query, key, value = np.split(fused, 3, axis=-1)
        query, key = (
            np.concatenate(
                [turn_halves(p, np.array(r)) for p, r in zip(np.split(t, len(rows), axis=-1), rows, strict=True)], -1
            )
            for t in (query, key)
        )
        o = linear(w, f"{stem}attention.dense", attention(query, key, value, prefix, layer, seen))
        m = layer_norm(w, f"{stem}post_attention_layernorm", a * 56**0.5 + o)
        y = linear(w, f"{stem}mlp.dense_h_to_4h", m)
        y = 0.5 * y * (1 + np.tanh(0.7978845608028654 * y * (1 + 0.044715 * y * y)))
        x = m * 56**0.5 + linear(w, f"{stem}mlp.dense_4h_to_h", y)
    return layer_norm(w, "transformer.final_layernorm", x) @ w["transformer.word_embeddings.weight"].T


def rms_norm(w: Weights, name: str, x: Array) -> Array:
    return np.asarray(w[f"{name}.weight"] * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5))


def turn_pairs(x: Array, base: float, step: float) -> Array:
    """x [n, heads, d]: in the first half of a head, element 2i goes with 2i + 1; places stand `1 / step` apart."""
    half = x.shape[-1] // 2
    out = x.copy()
    for i in range(half // 2):
        angle = (np.arange(len(x)) / step * base ** (-2 * i / half))[:, None]
        even, odd = x[..., 2 * i], x[..., 2 * i + 1]
        out[..., 2 * i] = even * np.cos(angle) - odd * np.sin(angle)
        out[..., 2 * i + 1] = odd * np.cos(angle) + even * np.sin(angle)
    return out


def chatglm2(w: Weights, config: dict[str, Any], ids: list[int]) -> Array:
    heads, groups, width = config["num_attention_heads"], config["multi_query_group_num"], config["kv_channels"]
    n, layers, inner = len(ids), config["num_layers"], config["ffn_hidden_size"]
    seen = np.tri(n, dtype=bool)
    prefix = prefix_of(w, layers, groups, width)
    x = w["transformer.embedding.word_embeddings.weight"][ids]
    for layer in range(layers):
        stem = f"transformer.encoder.layers.{layer}."
        fused = linear(w, f"{stem}self_attention.query_key_value", rms_norm(w, f"{stem}input_layernorm", x))
        query, key, value = np.split(fused.reshape(n, -1, width), [heads, heads + groups], axis=1)
        # ChatGLM2-6B-32k interpolates positions; ChatGLM3-6B-32k and GLM-4 enlarge the base.
        ratio = config.get("rope_ratio", 1)
        base, step = (10000.0, ratio) if "chatglm2" in config["_name_or_path"] else (10000.0 * ratio, 1)
        query, key = turn_pairs(query, base, step), turn_pairs(key, base, step)
        mixed = attention(query, key, value, prefix, layer, seen)
        x = x + linear(w, f"{stem}self_attention.dense", mixed)
        u = linear(w, f"{stem}mlp.dense_h_to_4h", rms_norm(w, f"{stem}post_attention_layernorm", x))
        gate, up = u[:, :inner], u[:, inner:]
        x = x + linear(w, f"{stem}mlp.dense_4h_to_h", gate / (1 + np.exp(-gate)) * up)
    return rms_norm(w, "transformer.encoder.final_layernorm", x) @ w["transformer.output_layer.weight"].T


def pack(tensors: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """As `.half().quantize(bits)` of the originals: scale and quotient in float16, ties to even."""
    packed = {}
    for name, tensor in tensors.items():
        if not name.endswith("weight") or not any(s in name for s in ("query_key_value", ".dense", "_to_")):
            packed[name] = tensor
            continue
        half = tensor.half()
        scale = (half.abs().amax(1).float() / (127 if bits == 8 else 7)).half()
        code = (half / scale[:, None]).round().to(torch.int8)
        if bits == 4:
            code = ((code[:, 0::2].int() << 4) | (code[:, 1::2].int() & 15)).to(torch.uint8).view(torch.int8)
        packed[name], packed[f"{name}_scale"] = code, scale
    return packed


def unpack(tensors: dict[str, torch.Tensor], bits: int) -> Weights:
    """Weights in float64: scale times integer, neither rounded."""
    found = {}
    for name, tensor in tensors.items():
        if f"{name}_scale" not in tensors:
            found[name] = tensor.double().numpy()
            continue
        code = tensor.numpy().astype(np.int64)
        if bits == 4:
            low = (code & 15) - 16 * ((code & 15) > 7)
            code = np.stack((code >> 4, low), -1).reshape(len(code), -1)
        found[name] = code * tensors[f"{name}_scale"].double().numpy()[:, None]
    return found


@pytest.mark.parametrize("bits", [0, 8, 4])
@pytest.mark.parametrize(
    ("name", "changes", "ids"),
    [
        pytest.param("chatglm-6b", {}, [11, 12, 13, GMASK, SOP, 21, 22], id="6b"),
        pytest.param("chatglm-6b", {"num_layers": 2}, [11, MASK, 12, SOP, 21, 205, 22], id="6b-mask"),
        pytest.param("chatglm-6b", {"num_layers": 2}, [11, MASK, GMASK, 12, SOP, 21, 22], id="6b-both"),
        pytest.param("chatglm-6b", {"position_encoding_2d": False}, [11, 12, GMASK, SOP, 21, 22], id="6b-one-row"),
        pytest.param("chatglm-6b", {"position_encoding_2d": False}, [11, MASK, 12, SOP, 21, 22], id="6b-one-row-mask"),
        pytest.param("chatglm-6b", PREFIX, [11, 12, GMASK, SOP, 21, 22], id="6b-prefix"),
        pytest.param(
            "chatglm-6b", PREFIX | {"prefix_projection": True}, [11, GMASK, SOP, 21, 22], id="6b-prefix-projected"
        ),
        pytest.param("chatglm2-6b", {}, [11, 12, 13, 2, 14], id="2"),
        pytest.param("chatglm2-6b", {"multi_query_group_num": 1}, [11, 12, 13, 2, 14], id="2-one-group"),
        pytest.param("chatglm2-6b", {"multi_query_group_num": 4}, [11, 12, 13, 2, 14], id="2-a-group-for-each-head"),
        pytest.param("chatglm2-6b", {"kv_channels": 32}, [11, 12, 13, 2, 14], id="2-heads-wider-than-the-model"),
        pytest.param("chatglm2-6b", {"add_bias_linear": True, "add_qkv_bias": False}, [11, 12, 13, 14], id="2-biases"),
        pytest.param("chatglm2-6b", {"add_qkv_bias": False}, [11, 12, 13, 14], id="2-no-bias"),
        pytest.param("chatglm2-6b", PREFIX, [11, 12, 13, 2, 14], id="2-prefix"),
        pytest.param("chatglm2-6b", PREFIX | {"prefix_projection": True}, [11, 12, 13, 2], id="2-prefix-projected"),
        pytest.param("chatglm2-6b", {"rope_ratio": 16}, [11, 12, 13, 2, 14, 15, 16, 17, 18], id="2-32k"),
        pytest.param("chatglm3-6b", {"rope_ratio": 50}, [11, 12, 13, 2, 14, 15, 16, 17, 18], id="3-32k"),
    ],
)
def test_the_engine_computes_what_the_specification_says(
    name: str, changes: dict[str, Any], ids: list[int], bits: int, tmp_path: Path, random_checkpoints: ModuleType
) -> None:
    first = name == "chatglm-6b"
    config = random_checkpoints.tiny(name, **(V1 if first else V2) | changes)
    (path,) = random_checkpoints.write_checkpoint(tmp_path, config)
    tensors = torch.load(path, weights_only=True)
    if bits:
        tensors = pack(tensors, bits)
        torch.save(tensors, path)
    expected = (chatglm if first else chatglm2)(unpack(tensors, bits), config, ids)
    engine = Engine.load(tmp_path, dtype="float32", threads=1)
    assert np.abs(engine.logits(ids).numpy() - expected).max() < 1e-4
    prompt = ids[: ids.index(SOP) + 1] if first else ids[:2]
    said = list(engine.generate(prompt, Sampling(temperature=0, max_tokens=3, ignore_eos=True)))
    rows = (chatglm if first else chatglm2)(unpack(tensors, bits), config, prompt + said)
    assert said == rows[len(prompt) - 1 : -1].argmax(-1).tolist()
    labels = [-100] * (len(prompt) + 1) + ids[len(prompt) + 1 :]
    chosen = [-np.log(softmax(expected[i - 1])[labels[i]]) for i in range(1, len(ids)) if labels[i] != -100]
    assert engine.loss(ids, labels) == pytest.approx(np.mean(chosen), abs=1e-4)
