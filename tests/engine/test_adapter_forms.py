"""Every form in which PEFT saves a LoRA gives PEFT's own logits on every kind of base, attached and merged.

Covers engine/adapters/low_rank.py, engine/adapters/merge.py.
"""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import adapter_builders as adapters
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
)

from glmchat.checkpoints.recipe import Recipe
from glmchat.core.errors import Usage
from glmchat.engine import Engine
from glmchat.engine.adapters.files import read_adapter
from glmchat.engine.adapters.merge import merge
from glmchat.engine.quantize.linear import QuantEmbedding, QuantLinear
from glmchat.engine.quantize.plan import plan_quantise
from glmchat.engine.quantize.quantiser import execute

IDS = [1, 40, 77, 105, 9, 200, 31, 64, 12]
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}  # left to transformers

# Settings of LoraConfig, in the words of a Llama. What `saved` holds is passed to save_pretrained.
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear"},
    "a-pattern": {"target_modules": r".*\.0\..*(up_proj|o_proj)"},
    "rank-stabilised": {"use_rslora": True, "r": 9},
    "ranks-and-alphas": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "a-rank-above-a-side": {"r": 80, "target_modules": ["q_proj", "v_proj", "embed_tokens"]},
    "some-layers": {"layers_to_transform": [1]},
    "exclusions": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "exclusions-as-text": {"target_modules": "all-linear", "exclude_modules": r".*\.0\.mlp\..*"},
    "dora": {"use_dora": True, "target_modules": "all-linear"},
    "all-biases": {"bias": "all"},
    "own-biases": {"bias": "lora_only"},
    "bias-of-b": {"lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "embedding-dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["lm_head"]},
    "head-dora": {"target_modules": ["lm_head"], "use_dora": True},
    "both-ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "both-ends-as-one": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "both-ends-as-one-dora": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_dora": True},
    "saved-norm": {"modules_to_save": ["norm"]},
    "saved-square-matrix": {"modules_to_save": ["o_proj"]},
    "saved-oblong-matrix": {"modules_to_save": ["up_proj"], "target_modules": "all-linear"},
    "saved-embedding": {"modules_to_save": ["embed_tokens"]},
    "saved-head": {"modules_to_save": ["lm_head"]},
    "saved-ends": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved-ends-as-one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "trained-rows": {"trainable_token_indices": [40, 200, 3]},
    "trained-rows-of-both-ends": {"trainable_token_indices": {"embed_tokens": [40, 9], "lm_head": [7, 271]}},
    "layers-of-the-vocabulary-kept": {"saved": {"save_embedding_layers": True}},
}
_GPT2 = {
    "q_proj": "c_attn", "v_proj": "mlp.c_proj", "embed_tokens": "wte", "norm": "ln_f", "o_proj": "attn.c_proj",
    "up_proj": "c_fc", "layers.0.self_attn.q_proj": "h.0.attn.c_attn",
    r".*\.0\..*(up_proj|o_proj)": r".*\.0\..*(c_fc|c_proj)",
}  # fmt: skip
BASES = ("untied", "tied", "int8", "int4", "gpt2", "scaled-embedding", "fallback")


@dataclass(frozen=True)
class Base:
    folder: Path
    engine: Engine
    twin: torch.nn.Module  # transformers' own, with the very weights that the engine computes with
    bare: torch.Tensor


def _write(name: str, folder: Path, builders: ModuleType) -> Path:
    torch.manual_seed(3)
    small = {"num_hidden_layers": 2, "intermediate_size": 96}
    if name == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=272, n_embd=64, n_head=4, n_layer=2, n_positions=64))
    elif name == "scaled-embedding":
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(vocab_size=272, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                             sliding_window=32, **small)
        )  # fmt: skip
    else:
        kept = {"rope_parameters": DYNAMIC} if name == "fallback" else {}
        plain = builders.write_folder(folder / "plain", tie_word_embeddings=name != "untied", **small, **kept)
        if not name.startswith("int"):
            return Path(plain)
        recipe = Recipe(int(name[-1]), ends=8)
        return execute(plan_quantise(plain, folder / name, recipe))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / name)
    (folder / name / "tokenizer.json").write_text(builders.tokenizer().to_str())
    return folder / name


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, builders: ModuleType) -> Base:
    home = tmp_path_factory.mktemp("base")
    folder = _write(request.param, home, builders)
    engine = Engine.load(folder, threads=1, dtype="float32")
    packed = request.param.startswith("int")
    twin = AutoModelForCausalLM.from_pretrained(home / "plain" if packed else folder, dtype=torch.float32).eval()
    for name, module in engine.model.named_modules() if packed else ():
        if isinstance(module, QuantLinear) and not name.endswith("embed_tokens.linear"):
            twin.get_submodule(name).weight.data = module.dequantise()
        elif isinstance(module, QuantEmbedding):
            twin.get_submodule(name).weight.data = module.linear.dequantise()
    twin.tie_weights()
    return Base(folder, engine, twin, engine.logits(IDS))


def trained(base: Base, form: str, folder: Path) -> torch.Tensor:
    """Save an adapter of this form with random numbers. Returns PEFT's logits of it."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **FORMS[form]}
    saved = settings.pop("saved", {})
    if isinstance(base.twin, GPT2LMHeadModel):
        words = {key: _translated(value) for key, value in settings.items()}
        settings = {**words, "fan_in_fan_out": "lm_head" not in str(settings.get("target_modules"))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base.twin), LoraConfig(**settings))
        adapters.randomise(model, 1)
        model.save_pretrained(folder, **saved)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    return adapters.peft_logits(model.eval(), IDS)


def _translated(value: Any) -> Any:
    if isinstance(value, dict):
        return {_GPT2.get(key, key): inner for key, inner in value.items()}
    if isinstance(value, list):
        return [_GPT2.get(each, each) for each in value]
    return _GPT2.get(value, value) if isinstance(value, str) else value


def differs(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_pefts_logits_attached_and_merged(base: Base, form: str, tmp_path: Path) -> None:
    expected = trained(base, form, tmp_path / "lora")
    engine = base.engine
    engine.attach(tmp_path / "lora", "lora")
    engine.activate({"lora": 1.0})
    assert differs(engine.logits(IDS), expected) < 1e-4
    assert form == "layers-of-the-vocabulary-kept" or differs(expected, base.bare) > 0.01
    engine.detach("lora")
    assert torch.equal(engine.logits(IDS), base.bare)

    if engine.model.spec.generation == "through transformers":
        with pytest.raises(Usage, match="only be checked while they run"):
            merge(read_adapter(tmp_path / "lora"), base.folder, tmp_path / "merged")
        return
    if FORMS[form].get("lora_bias") and "gpt2" not in base.folder.name:
        with pytest.raises(Usage, match=r"adds a bias to .* which has none"):
            merge(read_adapter(tmp_path / "lora"), base.folder, tmp_path / "merged")
        return
    merged = merge(read_adapter(tmp_path / "lora"), base.folder, tmp_path / "merged", dtype="float32")
    exact = 1e-2 if base.folder.name == "int4" else 1e-4  # the kernel keeps a group's minimum in float16, files do not
    assert differs(Engine.load(merged, threads=1, dtype="float32").logits(IDS), expected) < exact
    twin = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    assert differs(adapters.peft_logits(twin, IDS), expected) < exact
