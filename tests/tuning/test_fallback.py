"""Networks of which we have no layers of our own: transformers computes them, and they learn as PEFT has them learn.

Covers tuning/forward.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learning import documents, learn, losses, peft_losses, plain

from glmchat.core.errors import Usage
from glmchat.engine.models.transformers_model import Fallback
from glmchat.tuning.forward import flatten, load_base, loss_of
from glmchat.tuning.lora import LoraShape, attach, prepare

SIZES = {"vocab_size": 272, "hidden_size": 64, "num_hidden_layers": 2}
# What is odd about each: queries, keys and values in one matrix; layers that remember a state instead of keys, and take
# the matrices of some layers instead of calling these, which PEFT lets pass without learning them.
ODD: dict[str, tuple[str, ...]] = {"falcon": ("query_key_value", "dense_4h_to_h"), "mamba": ("in_proj", "x_proj")}
PEERS = {**ODD, "mamba": ("in_proj",)}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name: str, folder: Path) -> Path:
    from transformers import FalconConfig, FalconForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(7)
    if name == "falcon":
        config = FalconConfig(**SIZES, num_attention_heads=4, alibi=False, max_position_embeddings=128,
                              tie_word_embeddings=True)  # fmt: skip
        FalconForCausalLM(config).save_pretrained(folder)
    else:
        MambaForCausalLM(MambaConfig(**SIZES, state_size=8)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ODD)
def test_twenty_steps_are_those_of_peft_and_trainer(tmp_path: Path, family: str) -> None:
    folder, data = build(family, tmp_path / "base"), documents("llama", 20)
    settings = plain(epochs=4, rows_per_step=4, learning_rate=3e-3, targets=PEERS[family])
    learn(tmp_path / "first", folder, data, plain(steps=1, learning_rate=1e-30, targets=PEERS[family]))
    _, events = learn(tmp_path / "ours", folder, data, settings)
    first = tmp_path / "first" / "adapter" / "adapter_model.safetensors"
    theirs = peft_losses(folder, data, settings, tmp_path / "out", first)
    assert len(theirs) == len(losses(events)) == 20
    torch.testing.assert_close(torch.tensor(losses(events)), torch.tensor(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ODD)
def test_layers_computed_twice_give_the_same_gradients_and_keep_less(tmp_path: Path, family: str) -> None:
    _, model, _ = load_base(build(family, tmp_path / "base"), plain(), "cpu")
    assert isinstance(model, Fallback)
    prepare(model)
    layers = attach(model, LoraShape(rank=4, targets=ODD[family]), seed=0)
    model.train()
    flat = flatten(documents("llama", 4))
    found = []
    for by_layer in (False, True, False):
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = loss_of(model, flat, by_layer=by_layer)
        torch.autograd.backward(loss)
        grads = [layer.lora_B.grad.clone() for layer in layers.values() if layer.lora_B.grad is not None]
        found.append((float(loss.detach()), grads, sum(kept.values())))
        for layer in layers.values():
            layer.lora_A.grad = layer.lora_B.grad = None
    for value, grads, _ in found[1:]:
        assert value == found[0][0]
        assert len(grads) == len(layers)
        assert all(torch.equal(one, other) for one, other in zip(grads, found[0][1], strict=True))
    assert found[1][2] < found[0][2]


def test_a_type_that_cannot_compute_its_layers_twice_is_refused_with_what_else_helps(tmp_path: Path) -> None:
    _, model, _ = load_base(build("falcon", tmp_path / "base"), plain(), "cpu")
    assert isinstance(model, Fallback)
    setattr(model.inner, "supports_gradient_checkpointing", False)  # noqa: B010 (some types of transformers have it)
    with pytest.raises(Usage, match="cannot compute their layers twice") as raised:
        loss_of(model, flatten(documents("llama", 2)), by_layer=True)
    assert "--row-tokens" in str(raised.value.hint)


@pytest.mark.parametrize("dora", [False, True])
def test_a_network_that_takes_a_matrix_instead_of_calling_its_layer_learns_all_the_same(
    tmp_path: Path, dora: bool
) -> None:
    """Mamba as it learns takes other ways than Mamba as it answers: what the one learned, the other says."""
    _, model, _ = load_base(build("mamba", tmp_path / "base"), plain(), "cpu")
    prepare(model)
    layers = attach(model, LoraShape(rank=4, targets=("in_proj", "x_proj", "out_proj"), dora=dora), seed=0)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.normal_(0, 0.2)
    flat = flatten(documents("llama", 3))
    with torch.no_grad():
        answers = float(loss_of(model.eval(), flat))
    learns = loss_of(model.train(), flat)
    assert float(learns.detach()) == pytest.approx(answers, rel=1e-5)
    torch.autograd.backward(learns)
    assert all(layer.lora_B.grad is not None and layer.lora_B.grad.abs().sum() > 0 for layer in layers.values())
