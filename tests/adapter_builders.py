"""Adapters with random weights in the formats that PEFT and older trainers write."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

WORDS = ["<|turn|>", "<|stop|>", "zebra"]
OWN = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}<|stop|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
)


def theirs(folder: Path) -> Any:
    """transformers' own model of a tiny folder, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def randomise(model: torch.nn.Module, seed: int, size: float = 0.3) -> None:
    """Trained-looking numbers in everything that PEFT made trainable."""
    noise = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=noise) * size
            parameter.data = 1.5 + drawn if "magnitude" in name else drawn


def write_peft(base: Path, folder: Path, seed: int = 1, **settings: Any) -> Any:
    """A LoRA of the tiny model in `base`, saved by PEFT; returns PEFT's model."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings})
    model = get_peft_model(theirs(base), config)
    randomise(model, seed)
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    data = json.loads(path.read_text())
    data["base_model_name_or_path"] = None
    path.write_text(json.dumps(data))
    return model.eval()


def train(base: Path, folder: Path, words: int | None, template: str | None = OWN, **settings: Any) -> Path:
    """An adapter as trl saves one: new words in the tokenizer, the model resized (None: it is not)."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    if template is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": WORDS[:2]})
        tokenizer.add_tokens(WORDS[2:])
        tokenizer.chat_template = template
        tokenizer.eos_token = "<|stop|>"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if words is not None:
            model.resize_token_embeddings(words)
        trained = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
                                                      **settings}))  # fmt: skip
        randomise(trained, 1)
        trained.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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


# The smallest settings of each kind that fit a width of 32. Layers of a GPT-NeoX, which glmchat leaves to transformers.
PEFT_SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "lora_alpha": 8, "total_step": 10},
    "BEFT": {},
    "C3A": {"block_size": 8},
    "DEFT": {},
    "DELORA": {"r": 4},
    "FOURIERFT": {"n_frequency": 10},
    "GLORA": {"r": 4},
    "GRALORA": {"r": 8, "alpha": 16},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": ["dense_h_to_4h"]},
    "LILY": {"r": 4},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LOHA": {"r": 4, "alpha": 8},
    "LOKR": {"r": 4, "alpha": 8},
    "MISS": {"r": 4},
    "OFT": {"r": 4, "oft_block_size": 0},
    "PEANUT": {},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4, "variant": "road_1"},
    "TINYLORA": {},
    "TRAINABLE_TOKENS": {"token_indices": [40, 77], "target_modules": ["embed_in"]},
    "UNILORA": {},
    "VBLORA": {"num_vectors": 4, "vector_length": 8, "r": 2},
    "VERA": {"r": 4, "target_modules": ["query_key_value"]},
    "WAVEFT": {"n_frequency": 10},
}
VIRTUAL_TOKENS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")


def write_neox(folder: Path, **settings: Any) -> Path:
    """A tiny GPT-NeoX with random weights."""
    torch.manual_seed(1)
    config = GPTNeoXConfig(
        **{
            "vocab_size": 272, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 64, "max_position_embeddings": 128, "initializer_range": 0.3, **settings,
        }
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder


def write_kind(base: Path, folder: Path, peft_type: str, seed: int = 1, safe: bool = True, **settings: Any) -> Any:
    """An adapter of any kind for the tiny GPT-NeoX in `base`, saved by PEFT; returns PEFT's model."""
    chosen: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if peft_type in VIRTUAL_TOKENS:
        chosen |= {"num_virtual_tokens": 5}
    else:
        chosen |= {"target_modules": ["query_key_value", "dense_h_to_4h"], **PEFT_SETTINGS.get(peft_type, {})}
    config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](**{**chosen, **settings})
    base_model = GPTNeoXForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base_model, config)
        randomise(model, seed)
        model.save_pretrained(folder, safe_serialization=safe)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    return model.eval()
