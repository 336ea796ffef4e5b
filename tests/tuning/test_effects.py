"""A LoRA that is read back is told from any other by its own products, on bases of every type."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import documents, learn, plain
from safetensors.torch import load_file, save_file
from tiny_checkpoints import build

from glmchat.engine import Engine
from glmchat.tuning.effects import effects_in, first_other

Tensors = dict[str, torch.Tensor]
BASES = [("llama", "float32"), ("llama", "bfloat16"), ("chatglm2", "bfloat16"), ("gguf", "float32"),
         ("gguf", "bfloat16")]  # fmt: skip


def flipped(tensors: Tensors, config: dict[str, Any]) -> None:
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    tensors[name] = -tensors[name]


def swapped(tensors: Tensors, config: dict[str, Any]) -> None:
    """The same layer of two depths."""
    names = [name for name in tensors if name.endswith("lora_B.weight")]
    one = names[0]
    other = next(name for name in names[1:] if tensors[name].shape == tensors[one].shape
                 and name.split("layers.")[1].split(".", 1)[1] == one.split("layers.")[1].split(".", 1)[1])  # fmt: skip
    tensors[one], tensors[other] = tensors[other], tensors[one]


def scaled(tensors: Tensors, config: dict[str, Any]) -> None:
    config["lora_alpha"] *= 1.01


def in_other_order(tensors: Tensors, config: dict[str, Any]) -> None:
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    tensors[name] = tensors[name].roll(1, 0)


@pytest.fixture(scope="module", params=BASES, ids=lambda base: "-".join(base))
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(base, type, what the trained model adds, the adapter's folder) of a run of a few steps."""
    family, dtype = request.param
    place = tmp_path_factory.mktemp("learned")
    base = build(family, place / "base")
    settings = plain(rows_per_step=2, epochs=2, dtype=dtype)
    result, _ = learn(place / "run", base, documents("llama", 6), settings)
    assert result.probe is not None and result.probe.effects
    return base, dtype, result.probe.effects, result.adapter


def read(base: Path, dtype: str, adapter: Path) -> dict[str, list[float]]:
    engine = Engine.load(base, dtype=dtype, threads=1)
    engine.attach(adapter, "one")
    engine.activate({"one": 1.0})
    return effects_in(engine.model)


def test_what_the_engine_reads_adds_what_was_learned(learned: Any) -> None:
    base, dtype, effects, adapter = learned
    assert first_other(effects, read(base, dtype, adapter)) is None


@pytest.mark.parametrize("change", [flipped, swapped, scaled, in_other_order])
def test_a_wrong_adapter_is_found(
    learned: Any, tmp_path: Path, change: Callable[[Tensors, dict[str, Any]], None]
) -> None:
    """One tensor of the other sign, two layers in each other's place, a scale that is 1 % too large, rows in another
    order: most of it moves logits of bfloat16 by less than their rounding."""
    base, dtype, effects, adapter = learned
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert first_other(effects, read(base, dtype, tmp_path)) is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_lengths_of_a_dora_are_compared_too(tmp_path: Path, dtype: str) -> None:
    base = build("llama", tmp_path / "base")
    settings = plain(rows_per_step=2, epochs=2, dtype=dtype, dora=True)
    result, _ = learn(tmp_path / "run", base, documents("llama", 6), settings)
    assert result.probe is not None
    assert first_other(result.probe.effects, read(base, dtype, result.adapter), result.probe.near) is None


def test_a_layer_that_only_one_has_is_another(learned: Any) -> None:
    effects = dict(learned[2])
    name = next(iter(effects))
    fewer = {other: value for other, value in effects.items() if other != name}
    assert first_other(effects, fewer) == name == first_other(fewer, effects)
