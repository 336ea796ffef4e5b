"""Documents that lie behind each other give what each gives alone: the loss, and every gradient.

Covers tuning/forward.py, engine/models/documents.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from learning import documents
from tiny_checkpoints import NAMES, build

from glmchat.engine.engine import Engine
from glmchat.tuning.examples import Example
from glmchat.tuning.forward import flatten, learned_of, load_base, loss_of
from glmchat.tuning.lora import LoraLinear, LoraShape, attach, prepare, trainable
from glmchat.tuning.settings import Settings

FLOAT32 = Settings(dtype="float32", threads=1)


def model_of(folder: Path, dora: bool = False) -> tuple[torch.nn.Module, dict[str, LoraLinear]]:
    """With a LoRA on every layer, whose B is not zero any more."""
    _, model, _ = load_base(folder, FLOAT32, "cpu")
    prepare(model)
    layers = attach(model, LoraShape(rank=3, dora=dora), seed=1)
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.copy_(0.05 * torch.randn(layer.lora_B.shape, generator=noise))
    return model, layers


def gradients(
    model: torch.nn.Module, layers: dict[str, LoraLinear], groups: Sequence[Sequence[Example]], by_layer: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """Of the sum of the losses of all groups, a pass each."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for group in groups:
        loss = loss_of(model, flatten(group), by_layer=by_layer)  # type: ignore[arg-type]
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in trainable(layers).items() if p.grad is not None}


@pytest.mark.parametrize("family", NAMES)
def test_documents_in_one_pass_are_what_each_is_alone(tmp_path: Path, family: str) -> None:
    model, layers = model_of(build(family, tmp_path / "model"))
    data = documents(family, 7)
    alone, singly = gradients(model, layers, [[each] for each in data])
    for order in (data, data[::-1]):
        for by_layer in (False, True):
            together, at_once = gradients(model, layers, [order], by_layer)
            assert together == pytest.approx(alone, rel=1e-5)
            assert singly.keys() == at_once.keys() == trainable(layers).keys()
            for name, value in singly.items():
                assert float(value.norm()) > 0, name
                torch.testing.assert_close(at_once[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max() + 1))


@pytest.mark.parametrize("family", NAMES)
def test_without_an_adapter_the_loss_is_that_of_the_engine(tmp_path: Path, family: str) -> None:
    folder = build(family, tmp_path / "model")
    _, model, _ = load_base(folder, FLOAT32, "cpu")
    prepare(model)
    attach(model, LoraShape(rank=2), seed=1)
    engine = Engine.load(folder, dtype="float32", threads=1)
    for example in documents(family, 3):
        with torch.no_grad():
            loss = float(loss_of(model, flatten([example]))) / learned_of(example)
        assert loss == pytest.approx(engine.loss(example.ids, example.labels), rel=2e-5)


def test_a_pass_without_a_label_has_a_loss_of_nothing_and_gradients_of_zero(tmp_path: Path) -> None:
    model, layers = model_of(build("llama", tmp_path / "model"))
    example = documents("llama", 1)[0]
    silent = Example(example.ids, (False,) * len(example.ids), (), example.place)
    total, found = gradients(model, layers, [[silent]])
    assert total == 0
    assert not any(bool(value.any()) for value in found.values())
