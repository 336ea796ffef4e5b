"""One ModelSpec counts: what it says of tensors, weights and caches is what the engine then allocates.

Covers checkpoints/recipe.py, checkpoints/families.py, checkpoints/chatglm.py, checkpoints/chatglm2.py,
checkpoints/llama.py, checkpoints/glm.py, checkpoints/gpt2.py, checkpoints/config.py.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from glmchat.checkpoints.families import FAMILIES, parse, spec_of
from glmchat.checkpoints.recipe import Recipe, usual_bytes
from glmchat.engine.families import family_of
from glmchat.engine.loading import set_dtype
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.native.cpu import NativeCpu
from glmchat.engine.quantize.replace import quantisable, quantise_model

ROOT = Path(__file__).resolve().parents[2]
NO_KERNEL = NativeCpu().unavailable()
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
GLM: dict[str, Any] = {
    "model_type": "chatglm", "num_layers": 3, "hidden_size": 128, "num_attention_heads": 4, "vocab_size": 320,
    "bos_token_id": 5, "inner_hidden_size": 256,
}  # fmt: skip
GLM2: dict[str, Any] = {
    **GLM, "multi_query_attention": True, "multi_query_group_num": 2, "kv_channels": 32, "ffn_hidden_size": 96,
    "rmsnorm": True, "padded_vocab_size": 320,
}  # fmt: skip
GPT2: dict[str, Any] = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_ctx": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "chatglm": GLM,
    "chatglm with a prefix": {**GLM, "pre_seq_len": 7},
    "chatglm with a projected prefix": {**GLM, "pre_seq_len": 7, "prefix_projection": True},
    "chatglm2": GLM2,
    "chatglm2 with every bias": {**GLM2, "add_bias_linear": True, "pre_seq_len": 7},
    "chatglm2 without biases": {**GLM2, "add_qkv_bias": False, "pre_seq_len": 7, "prefix_projection": True},
    "gpt2": GPT2,
    "llama": LLAMA,
    "llama, tied, of rows that fill no block": {**LLAMA, "tie_word_embeddings": True, "vocab_size": 301},
    "llama with every bias": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama with scaled frequencies": {**LLAMA, "rope_freqs": True},
    "llama of a width that no group divides": {**LLAMA, "hidden_size": 120, "head_dim": 30},
    "qwen2": {**LLAMA, "model_type": "qwen2"},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 64},
    "glm": {**LLAMA, "model_type": "glm", "head_dim": 64},
    "glm4": {**LLAMA, "model_type": "glm4", "head_dim": 64, "attention_bias": False},
    "smollm": {**LLAMA, "model_type": "smollm"},
}


@pytest.fixture(scope="module")
def full_size() -> ModuleType:
    spec = importlib.util.spec_from_file_location("full_size_specs", ROOT / "benchmarks" / "random_checkpoints.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def network(config: dict[str, Any], device: str = "meta") -> LanguageModel:
    family, spec = family_of(config)
    with torch.device(device):
        return family.build(spec)


def tensors_of(model: LanguageModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_told_by_name_and_shape(name: str) -> None:
    spec = parse(CONFIGS[name])
    model = network(CONFIGS[name])
    assert spec.shapes() == tensors_of(model)
    assert spec.parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert spec.weight_bytes(width=4) == 4 * (spec.parameters() or 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_take_the_bytes_that_are_told(name: str, dtype: torch.dtype) -> None:
    model = network(CONFIGS[name], "cpu").requires_grad_(False)
    set_dtype(model, dtype, "cpu")
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert parse(CONFIGS[name]).weight_bytes(width=dtype.itemsize) == held


@pytest.mark.parametrize(
    "name", ["chatglm-6b-early", "chatglm-6b", "chatglm2-6b", "chatglm3-6b", "glm-4-9b-chat", "cpm-gpt2"]
)
def test_the_released_models_are_told_too(name: str, full_size: ModuleType) -> None:
    config = dict(full_size.CONFIGS[name])
    assert parse(config).shapes() == tensors_of(network(config))


def released(full_size: ModuleType) -> list[dict[str, Any]]:
    """The published measures of ChatGLM, GLM-4 and Llama 3 (8B)."""
    llama3 = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    }  # fmt: skip
    return [dict(full_size.CONFIGS[name]) for name in ("chatglm-6b", "chatglm3-6b", "glm-4-9b-chat")] + [llama3]


@pytest.mark.parametrize("bits", [4, 8])
def test_what_quantised_weights_usually_take_is_near_what_released_models_do(bits: int, full_size: ModuleType) -> None:
    for config in released(full_size):
        spec = parse(config)
        told, counted = usual_bytes(spec.parameters() or 0, bits), spec.weight_bytes(Recipe(bits)) or 0
        assert 0.87 < told / counted < 1.13, spec.family


@pytest.mark.parametrize("name", CONFIGS)
def test_the_matrices_that_quantising_packs_are_those_of_the_network(name: str) -> None:
    packed = {f"{name}.weight": (inputs, is_end) for name, inputs, is_end in quantisable(network(CONFIGS[name]))}
    assert parse(CONFIGS[name]).matrices() == packed


def test_every_family_that_glmchat_computes_is_among_them() -> None:
    computed = {family.name for family in FAMILIES} - {"transformers"}
    assert {family_of(config)[0].name for config in CONFIGS.values()} == computed


@pytest.mark.skipif(NO_KERNEL is not None, reason=f"the C kernel, whose layout is counted, is not here: {NO_KERNEL}")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_quantised_weights_take_the_bytes_that_are_told(name: str, bits: int) -> None:
    torch.manual_seed(1)
    model = network(CONFIGS[name], "cpu").requires_grad_(False)
    quantise_model(model, bits, fast=True)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert parse(CONFIGS[name]).weight_bytes(Recipe(bits, ends=8), width=4) == held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_cache_takes_the_bytes_that_are_told(name: str, dtype: torch.dtype) -> None:
    cache = network(CONFIGS[name], "cpu").requires_grad_(False).new_cache(48, dtype)
    assert parse(CONFIGS[name]).cache_bytes(48, dtype.itemsize) == cache.nbytes


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": 7},
        {"hidden_size": "x"},
        {**GLM, "hidden_size": -1},
        {**GLM, "num_layers": True},
    ],
)
def test_a_configuration_that_names_no_network_has_no_measures(config: dict[str, Any]) -> None:
    assert spec_of(config) is None


def test_of_another_architecture_the_measures_are_known_and_the_tensors_are_not() -> None:
    spec = parse({"model_type": "opt", "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2})
    assert (spec.family, spec.shapes(), spec.parameters(), spec.weight_bytes(Recipe(4))) == ("opt", {}, None, None)
