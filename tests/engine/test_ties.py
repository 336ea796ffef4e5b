"""Whether head and embedding are one is decided by the tensors, as transformers decides it, in every kind of file.

Covers checkpoints/ties.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from glmchat.checkpoints.fit import spec_at
from glmchat.checkpoints.recipe import Recipe
from glmchat.checkpoints.weight_files import folder_config
from glmchat.engine import Engine
from glmchat.engine.quantize.plan import plan_quantise
from glmchat.engine.quantize.quantiser import execute

IDS = [1, 40, 77, 105, 9, 200, 31, 64, 12]
Tensors = dict[str, torch.Tensor]


def another_head(tensors: Tensors, embedding: str) -> None:
    tensors["lm_head.weight"] = tensors[embedding].flip(0).contiguous()


def one_other_number(tensors: Tensors, embedding: str) -> None:
    tensors["lm_head.weight"] = tensors[embedding].clone()
    tensors["lm_head.weight"][-1, -1] += 3


def a_repeated_head(tensors: Tensors, embedding: str) -> None:
    tensors["lm_head.weight"] = tensors[embedding].clone()


def a_head_alone(tensors: Tensors, embedding: str) -> None:
    tensors["lm_head.weight"] = tensors.pop(embedding)


def one_file(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def two_files(folder: Path, tensors: Tensors) -> None:
    (folder / "model.safetensors").unlink()
    parts = [{n: t for n, t in tensors.items() if (n == "lm_head.weight") is last} for last in (False, True)]
    table: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-00002.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        table |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def a_bin_file(folder: Path, tensors: Tensors) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


@pytest.fixture(params=["llama", "qwen2", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, builders: ModuleType) -> Path:
    if request.param != "gpt2":
        return Path(builders.write_folder(tmp_path / "m", model_type=request.param, num_hidden_layers=1))
    torch.manual_seed(2)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=272, n_embd=32, n_head=2, n_layer=1, n_positions=64))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "m")
    builders.tokenizer().save(str(tmp_path / "m" / "tokenizer.json"))
    return tmp_path / "m"


@pytest.mark.parametrize("write", [one_file, two_files, a_bin_file])
@pytest.mark.parametrize("change", [another_head, one_other_number, a_repeated_head, a_head_alone])
def test_the_tensors_say_whether_the_head_is_the_embedding(
    folder: Path, change: Callable[[Tensors, str], None], write: Callable[[Path, Tensors], None]
) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors, next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight"))))
    write(folder, tensors)
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = twin(torch.tensor([IDS])).logits[0]
    engine = Engine.load(folder, dtype="float32", threads=1)
    assert (engine.logits(IDS) - expected).abs().max() < 1e-4
    own = change in (another_head, one_other_number)
    assert (engine.model.tied is None) is own
    if write is not a_bin_file:
        spec = spec_at(folder)
        assert spec is not None
        assert (len(spec.ends()) == 2) is own
        assert folder_config(folder).get("tie_word_embeddings", True) is not own


def test_a_quantised_copy_keeps_the_trained_head(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    another_head(tensors, next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight"))))
    one_file(folder, tensors)
    expected = Engine.load(folder, dtype="float32", threads=1).logits(IDS)
    copy = execute(plan_quantise(folder, tmp_path / "copy", Recipe(8)))
    assert json.loads((copy / "config.json").read_text())["tie_word_embeddings"] is False
    found = Engine.load(copy, dtype="float32", threads=1).logits(IDS)
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_a_head_whose_file_is_still_to_come_counts_as_its_own(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    a_repeated_head(tensors, next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight"))))
    two_files(folder, tensors)
    assert folder_config(folder).get("tie_word_embeddings", True) is True
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert folder_config(folder)["tie_word_embeddings"] is False


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "glm", "glm4", "gpt2"])
@pytest.mark.parametrize("head", ["none", "different"])
def test_a_network_saved_without_its_head_is_the_one_that_transformers_makes_of_it(
    kind: str, head: str, tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModel

    sizes = {"vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}  # fmt: skip
    measures: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 272} if kind == "gpt2" else sizes
    measures |= {"sliding_window": None} if kind == "mistral" else {}
    torch.manual_seed(3)
    AutoModel.from_config(AutoConfig.for_model(kind, **measures, tie_word_embeddings=True)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = "wte.weight" if kind == "gpt2" else "embed_tokens.weight"
    assert embedding in tensors
    if head == "different":
        another_head(tensors, embedding)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        right = model(torch.tensor([IDS])).logits[0]
    engine = Engine.load(tmp_path, dtype="float32", threads=1)
    assert engine.family in ("llama", "glm", "gpt2")
    assert torch.allclose(engine.logits(IDS), right, atol=1e-4)
    spec = spec_at(tmp_path)
    assert spec is not None and spec.parameters() == engine.spec.parameters()
