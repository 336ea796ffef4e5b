"""Prefixes, virtual tokens and whole models that are read back are told from any others, on bases of every type.

Covers tuning/effects.py, tuning/methods/full.py, tuning/methods/prefix.py, jobs/read_back.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import documents, learn, plain
from safetensors.torch import load_file, save_file
from tiny_checkpoints import build
from transformers import AutoModelForCausalLM

from glmchat.engine import Engine
from glmchat.jobs.read_back import use
from glmchat.tuning.effects import effects_of_model, first_other

Change = Callable[[torch.Tensor, bool], torch.Tensor]
FRONTS = [("llama", "bfloat16", None, "prefix"), ("llama", "bfloat16", 4, "prompt"),
          ("chatglm", "bfloat16", 4, "prefix"), ("chatglm2", "bfloat16", None, "prefix"),
          ("gguf", "float32", None, "prefix")]  # fmt: skip
LAYERS = 2


def flipped(rows: torch.Tensor, is_prefix: bool) -> torch.Tensor:
    """The keys of one layer, or one virtual token, of the other sign."""
    signs = torch.ones(LAYERS * 2 if is_prefix else len(rows))
    signs[1] = -1
    return (parts(rows) * signs[:, None]).reshape(rows.shape) if is_prefix else rows * signs[:, None]


def swapped(rows: torch.Tensor, is_prefix: bool) -> torch.Tensor:
    """Two layers in each other's place, or two virtual tokens."""
    return parts(rows)[:, [2, 3, 0, 1]].reshape(rows.shape) if is_prefix else rows[[1, 0, *range(2, len(rows))]]


def scaled(rows: torch.Tensor, is_prefix: bool) -> torch.Tensor:
    return rows * 1.01


def in_other_order(rows: torch.Tensor, is_prefix: bool) -> torch.Tensor:
    return rows.roll(1, 0)


def parts(rows: torch.Tensor) -> torch.Tensor:
    """[length, layers and halves, numbers]."""
    return rows.reshape(len(rows), LAYERS * 2, -1)


@pytest.fixture(scope="module", params=FRONTS, ids=lambda one: "-".join(map(str, one)))
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(how an engine is loaded, the method, what was trained, the adapter's folder)."""
    family, dtype, bits, method = request.param
    place = tmp_path_factory.mktemp("learned")
    base = build(family, place / "base")
    settings = plain(rows_per_step=2, epochs=2, dtype=dtype, quant=bits, method=method, prefix_length=6)
    result, _ = learn(place / "run", base, documents(family if family.startswith("chatglm") else "llama", 6), settings)
    assert result.probe is not None
    return Engine.load(base, dtype=dtype, quant=bits, threads=1), method, result.probe, result.adapter


def test_what_the_engine_reads_is_what_was_learned_and_answers_alike(learned: Any) -> None:
    engine, _, probe, adapter = learned
    assert first_other(probe.effects, use(engine, str(adapter)), probe.near) is None
    assert torch.equal(engine.logits(probe.ids)[-1], probe.logits)  # one code in one type


@pytest.mark.parametrize("change", [flipped, swapped, scaled, in_other_order])
def test_another_prefix_is_found(learned: Any, tmp_path: Path, change: Change) -> None:
    engine, method, probe, adapter = learned
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    if (file := tmp_path / "pytorch_model.bin").exists():
        tensors = torch.load(file, weights_only=True)
        torch.save({name: change(rows, method == "prefix") for name, rows in tensors.items()}, file)
    else:
        file = tmp_path / "adapter_model.safetensors"
        save_file({name: change(r, method == "prefix").contiguous() for name, r in load_file(file).items()}, file)
    assert first_other(probe.effects, use(engine, str(tmp_path)), probe.near) is not None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(what was trained, the model's folder) of a base in bfloat16 all of whose weights learned."""
    place = tmp_path_factory.mktemp("whole")
    base = build("llama", place / "base")
    file = base / "model.safetensors"
    save_file({n: value.bfloat16() for n, value in load_file(file).items()}, file, metadata={"format": "pt"})
    settings = plain(method="full", rows_per_step=2, epochs=2, dtype="bfloat16", learning_rate=1e-3)
    result, _ = learn(place / "run", base, documents("llama", 6), settings)
    assert result.probe is not None
    return result.probe, result.adapter


def test_a_whole_model_is_compared_as_it_was_written(whole: Any) -> None:
    """And not with the float32 numbers behind the last step: no pass computed with those, and nobody will have them."""
    probe, folder = whole
    engine = Engine.load(folder, dtype="float32", threads=1)
    assert first_other(probe.effects, effects_of_model(engine.model), probe.near) is None
    assert torch.equal(engine.logits(probe.ids)[-1], probe.logits)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(torch.tensor([probe.ids])).logits[0, -1]
    assert torch.allclose(logits, probe.logits, atol=1e-4)


@pytest.mark.parametrize("fault", ["flipped", "swapped", "scaled", "not learned"])
def test_another_model_is_found(whole: Any, tmp_path: Path, fault: str) -> None:
    """In bfloat16 a matrix that is the base's moves the logits by next to nothing."""
    probe, folder = whole
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    one, other = (f"model.layers.{number}.mlp.up_proj.weight" for number in (0, 1))
    if fault == "swapped":
        tensors[one], tensors[other] = tensors[other], tensors[one]
    elif fault == "not learned":
        before = load_file(folder.parents[1] / "base" / "model.safetensors")[one]
        assert not torch.equal(before, tensors[one])
        tensors[one] = before
    else:
        tensors[one] = tensors[one] * (-1 if fault == "flipped" else 1.01)
    save_file(tensors, file, metadata={"format": "pt"})
    engine = Engine.load(tmp_path, dtype="float32", threads=1)
    assert first_other(probe.effects, effects_of_model(engine.model), probe.near) is not None
