"""Checkpoints with random weights in the original format: names, shapes, shards and index of the released files.

Nobody can download 13 GB into a test, and speed and memory do not depend on what the numbers are. Written shard by
shard, so a full-size one needs the memory of one shard:

    python benchmarks/random_checkpoints.py chatglm-6b /big/disk/chatglm-6b

Tests write tiny ones through `write_checkpoint(folder, tiny(NAME))`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from glmchat.checkpoints.spec import ModelSpec
from glmchat.engine.families import family_of

_V2 = {
    "model_type": "chatglm", "hidden_size": 4096, "num_layers": 28, "num_attention_heads": 32, "kv_channels": 128,
    "multi_query_attention": True, "multi_query_group_num": 2, "ffn_hidden_size": 13696, "layernorm_epsilon": 1e-5,
    "padded_vocab_size": 65024, "add_bias_linear": False, "add_qkv_bias": True, "rmsnorm": True,
    "post_layer_norm": True, "apply_residual_connection_post_layernorm": False, "original_rope": True,
    "tie_word_embeddings": False, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float16",
}  # fmt: skip
_V1 = {
    "model_type": "chatglm", "hidden_size": 4096, "inner_hidden_size": 16384, "num_layers": 28,
    "num_attention_heads": 32, "layernorm_epsilon": 1e-5, "max_sequence_length": 2048, "position_encoding_2d": True,
    "use_cache": True, "torch_dtype": "float16",
}  # fmt: skip
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "chatglm-6b-early": {**_V1, "vocab_size": 150528, "bos_token_id": 150004, "eos_token_id": 150005},
    "chatglm-6b": {
        **_V1, "vocab_size": 130528, "bos_token_id": 130004, "eos_token_id": 130005, "mask_token_id": 130000,
        "gmask_token_id": 130001, "pad_token_id": 3,
    },
    "chatglm2-6b": {**_V2, "_name_or_path": "THUDM/chatglm2-6b", "seq_length": 32768},
    "chatglm3-6b": {**_V2, "_name_or_path": "THUDM/chatglm3-6b", "seq_length": 8192},
    "glm-4-9b-chat": {
        **_V2, "_name_or_path": "THUDM/glm-4-9b-chat", "num_layers": 40, "padded_vocab_size": 151552,
        "seq_length": 131072, "rope_ratio": 500, "layernorm_epsilon": 1.5625e-07, "torch_dtype": "bfloat16",
        "eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329,
    },
    "cpm-gpt2": {
        "model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "n_ctx": 1024,
        "vocab_size": 30000, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "bos_token_id": 50256,
        "eos_token_id": 50256,
    },
}  # fmt: skip
_NOISE = 1_048_573  # numbers drawn once; a prime, so that no two rows of a matrix are the same


def tiny(name: str, **changes: Any) -> dict[str, Any]:
    """`CONFIGS[name]` with the measures of a toy; vocabulary and ids stay real unless `changes` says otherwise."""
    config = dict(CONFIGS[name])
    if name == "cpm-gpt2":
        config |= {"n_embd": 16, "n_head": 2, "n_layer": 3, "n_positions": 128}
    elif "inner_hidden_size" in config:
        config |= {"hidden_size": 16, "inner_hidden_size": 64, "num_layers": 4, "num_attention_heads": 2}
    else:
        config |= {
            "hidden_size": 32, "num_layers": 3, "num_attention_heads": 4, "kv_channels": 8, "ffn_hidden_size": 48
        }  # fmt: skip
    return config | changes


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float16,
    shard_bytes: int = 1 << 31,
    kind: str = "bin",
    seed: int = 0,
) -> list[Path]:
    """Write config.json and the weights (`kind`: "bin" or "safetensors"); returns the weight files.

    Linear weights have a spread of 1 / sqrt(inputs), norms are near one: logits come out in a sensible range.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(seed)).repeat(2)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in stored_tensors(config):
        if size and size + _bytes(shape, dtype) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += _bytes(shape, dtype)
    stem, ending = ("pytorch_model", ".bin") if kind == "bin" else ("model", ".safetensors")
    weight_map: dict[str, str] = {}
    paths: list[Path] = []
    offset = 0
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        file = f"{stem}{ending}" if single else f"{stem}-{number:05}-of-{len(shards):05}{ending}"
        tensors = {}
        for name, shape in shard:
            tensors[name] = _random(name, shape, noise, offset, dtype)
            offset = (offset + 7919 * 101) % _NOISE
        if "lm_head.weight" in tensors:  # the same numbers as the embedding, which is the first tensor written
            tensors["lm_head.weight"] = _random("wte.weight", dict(shard)["lm_head.weight"], noise, 0, dtype)
        if kind == "bin":
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        paths.append(folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        del tensors
    if len(shards) > 1:
        total = sum(_bytes(shape, dtype) for shard in shards for _, shape in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}{ending}.index.json").write_text(json.dumps(index, indent=2))
    return paths


def stored_tensors(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that the released files of this architecture hold, ignored buffers included."""
    family, spec = family_of(config)
    with torch.device("meta"):
        model = family.build(spec)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if name == "transformer.encoder.layers.0.input_layernorm.weight":
            yield "transformer.rotary_pos_emb.inv_freq", (spec.head_dim // 4,)
        yield name, shape[::-1] if family.transposed is not None and family.transposed(name) else shape
        if family.name == "chatglm" and name.endswith("attention.dense.bias"):
            yield name.replace("dense.bias", "rotary_emb.inv_freq"), (spec.head_dim // 4,)
    if family.name in ("chatglm", "gpt2"):
        yield "lm_head.weight", (spec.vocab_size, spec.hidden_size)


def spec_of(config: Mapping[str, Any]) -> ModelSpec:
    return family_of(config)[1]


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _random(name: str, shape: tuple[int, ...], noise: torch.Tensor, offset: int, dtype: torch.dtype) -> torch.Tensor:
    """The noise from `offset` on, scaled for the kind of tensor, then repeated to the size."""
    flat = noise[offset : offset + _NOISE]
    if len(shape) == 1:
        norm = "norm" in name or ".ln_" in name
        flat = 1 + 0.1 * flat if norm and name.endswith("weight") else 0.05 * flat
    elif "embedding" in name or "wte" in name or "wpe" in name:
        flat = 0.25 * flat
    else:
        flat = flat / math.sqrt(shape[-1])
    count = math.prod(shape)
    return flat.to(dtype).repeat(-(-count // _NOISE))[:count].view(shape).clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(CONFIGS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=("bin", "safetensors"), default="bin")
    parser.add_argument("--shard-bytes", type=int, default=1 << 31)
    parser.add_argument("--layers", type=int, help="fewer layers than the released model has")
    given = parser.parse_args()
    config = dict(CONFIGS[given.name])
    if given.layers:
        config["n_layer" if "n_layer" in config else "num_layers"] = given.layers
    for path in write_checkpoint(given.folder, config, kind=given.kind, shard_bytes=given.shard_bytes):
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
