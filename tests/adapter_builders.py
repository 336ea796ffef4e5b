"""Adapters with random weights in the formats that PEFT and older trainers write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaForCausalLM


def llama(folder: Path) -> LlamaForCausalLM:
    """transformers' own model of a tiny folder, in float32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def randomise(model: torch.nn.Module, seed: int, size: float = 0.3) -> None:
    """Trained-looking numbers in everything that PEFT made trainable."""
    noise = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=noise) * size
            parameter.data = 1.5 + drawn if "magnitude" in name else drawn


def write_peft(base: Path, folder: Path, seed: int = 1, **settings: Any) -> Any:
    """A LoRA of the tiny Llama in `base`, saved by PEFT; returns PEFT's model."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings})
    model = get_peft_model(llama(base), config)
    randomise(model, seed)
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    data = json.loads(path.read_text())
    data["base_model_name_or_path"] = None
    path.write_text(json.dumps(data))
    return model.eval()


def peft_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits


def write_lora(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """adapter_config.json and adapter_model.safetensors as given."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def factors(layers: int, width: int = 64, out: int = 64, rank: int = 4, seed: int = 3) -> dict[str, torch.Tensor]:
    """A and B for every q_proj of the tiny Llama."""
    noise = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(layers):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        found[f"{stem}.lora_A.weight"] = torch.randn(rank, width, generator=noise) * 0.3
        found[f"{stem}.lora_B.weight"] = torch.randn(out, rank, generator=noise) * 0.3
    return found
