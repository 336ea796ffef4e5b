"""A tiny checkpoint of every family, with random weights: the same numbers each time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests" / "engine")]

import engine_builders as llamas  # noqa: E402
import random_checkpoints as originals  # noqa: E402

PROMPT = (5, 9, 17, 200, 33, 7, 150)
_V1 = {"hidden_size": 64, "inner_hidden_size": 96}
_V2 = {"padded_vocab_size": 400, "hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16}
_ORIGINALS: dict[str, tuple[str, dict[str, Any]]] = {
    "chatglm-early": ("chatglm-6b-early", _V1),
    "chatglm": ("chatglm-6b", _V1),
    "chatglm2": ("chatglm2-6b", _V2),
    "chatglm3": ("chatglm3-6b", _V2),
    "glm4": ("glm-4-9b-chat", _V2),
    "gpt2": ("cpm-gpt2", {"vocab_size": 300, "n_embd": 64, "n_head": 4}),
}
_LLAMAS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "glm": {"model_type": "glm", "architectures": ["GlmForCausalLM"], "head_dim": 16},
    "glm4-hf": {"model_type": "glm4", "architectures": ["Glm4ForCausalLM"], "head_dim": 16},
    "qwen3": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
}
NAMES = (*_ORIGINALS, *_LLAMAS, "gguf", "fallback")


def prompt_of(name: str) -> list[int]:
    """ChatGLM-6B reads up to its mask and begins behind it."""
    if name == "chatglm-early":
        return [*PROMPT, 150001, 150004]
    return [*PROMPT, 130001, 130004] if name == "chatglm" else list(PROMPT)


def build(name: str, folder: Path) -> Path:
    if name in _ORIGINALS:
        config, changes = _ORIGINALS[name]
        originals.write_checkpoint(folder, originals.tiny(config, **changes), dtype=torch.float32)
        return folder
    if name in _LLAMAS:
        return llamas.write_folder(folder, **_LLAMAS[name])
    if name == "gguf":
        folder.mkdir()
        return llamas.write_gguf(folder / "tiny.gguf", "Q4_0")
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=272, max_position_embeddings=256, **sizes))
    noise = torch.Generator().manual_seed(11)
    for label, parameter in sorted(model.named_parameters()):
        drawn = 0.2 * torch.randn(parameter.shape, generator=noise)
        parameter.data = 1 + drawn if "norm.weight" in label else drawn
    model.save_pretrained(folder)
    return folder
