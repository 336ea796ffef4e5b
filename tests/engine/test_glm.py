"""GLM-4 as transformers writes it, against transformers' own implementation and PEFT's, on random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapter_builders as adapters
import pytest
import torch

from glmchat.checkpoints import families
from glmchat.checkpoints.fit import spec_at
from glmchat.checkpoints.recipe import Recipe
from glmchat.core.errors import Damaged
from glmchat.engine import Engine
from glmchat.engine.quantize.plan import plan_quantise
from glmchat.engine.quantize.quantiser import execute

IDS = [3, 17, 99, 4, 5, 200, 31, 8] * 6
SMALL: dict[str, Any] = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "pad_token_id": None, "eos_token_id": [2],
}  # fmt: skip
GLM4 = {"model_type": "glm4", "architectures": ["Glm4ForCausalLM"], "head_dim": 16, "pad_token_id": 0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "glm": ("Glm", {}),
    "glm4": ("Glm4", {}),
    "without biases, tied": ("Glm4", {"attention_bias": False, "tie_word_embeddings": True}),
    "another base and part": ("Glm4", {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.25}}),
    "a head for every query": ("Glm", {"num_key_value_heads": 4}),
}


def write(folder: Path, case: str) -> Any:
    """A tiny model of transformers, saved by itself; norms and biases are random too."""
    import transformers

    name, changes = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = write(tmp_path, case)
    mine = Engine.load(tmp_path, dtype="float32", threads=1)
    assert mine.family == "glm"
    with torch.no_grad():
        wanted = theirs(torch.tensor([IDS])).logits[0]
    assert torch.allclose(mine.logits(IDS), wanted, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_measures_are_those_of_the_network(case: str, tmp_path: Path) -> None:
    theirs = write(tmp_path, case)
    spec = spec_at(tmp_path)
    assert spec is not None and spec.parameters() == sum(p.numel() for p in theirs.parameters())
    shapes = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert spec.shapes() == shapes


def test_a_lora_answers_as_peft_says(tmp_path: Path, builders: Any) -> None:
    base = builders.write_folder(tmp_path / "base", **GLM4)
    targets = ["q_proj", "o_proj", "gate_up_proj", "down_proj"]
    model = adapters.write_peft(base, tmp_path / "lora", target_modules=targets)
    engine = Engine.load(base, dtype="float32", threads=1)
    plain = engine.logits(IDS)
    engine.attach(tmp_path / "lora", "lora")
    engine.activate({"lora": 1.0})
    assert torch.allclose(engine.logits(IDS), adapters.peft_logits(model, IDS), atol=2e-4)
    engine.activate({})
    assert torch.equal(engine.logits(IDS), plain)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_folder_answers_as_transformers_reads_it(bits: int, tmp_path: Path, builders: Any) -> None:
    base = builders.write_folder(tmp_path / "base", **GLM4)
    execute(plan_quantise(base, tmp_path / "packed", Recipe(bits)))
    mine = Engine.load(tmp_path / "packed", dtype="float32", threads=1)
    wanted = adapters.peft_logits(adapters.theirs(tmp_path / "packed"), IDS)
    assert (mine.logits(IDS) - wanted).abs().max() < 5e-3 * wanted.abs().max()  # they multiply in float16


def test_other_scalings_of_positions_go_to_transformers(tmp_path: Path, builders: Any) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    folder = builders.write_folder(tmp_path, **GLM4)
    config = json.loads((folder / "config.json").read_text())
    assert families.parse(config).family == "glm"
    assert families.parse({**config, "rope_scaling": rope}).generation == "through transformers"


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"num_key_value_heads": 3}, "cannot share 3 key heads"), ({"partial_rotary_factor": 0.05}, "0 of 16 dimensions")],
)
def test_measures_that_cannot_be_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(Damaged, match=words):
        families.parse({"model_type": "glm4", "head_dim": 16, **changes})
