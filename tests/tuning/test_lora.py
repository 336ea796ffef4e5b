"""LoRA that learns, beside PEFT's: the same outputs and gradients, counted as the guide counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_checkpoints import build
from torch import nn

from glmchat.core.errors import Usage
from glmchat.tuning.forward import load_base
from glmchat.tuning.lora import LoraLinear, LoraShape, attach, change_norm, count, prepare, targets_of
from glmchat.tuning.settings import Settings


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_outputs_and_gradients_are_those_of_peft(dora: bool, rslora: bool, bias: bool, dropout: float) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    base = nn.Linear(12, 20, bias=bias).requires_grad_(False)
    theirs = nn.Sequential(nn.Linear(12, 20, bias=bias))
    theirs[0].load_state_dict(base.state_dict())
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, use_dora=dora, use_rslora=rslora, target_modules=["0"])
    theirs = inject_adapter_in_model(config, theirs)
    ours = LoraLinear(base, LoraShape(rank=4, alpha=6, dropout=dropout, dora=dora, rslora=rslora))
    peer = theirs[0]
    with torch.no_grad():
        ours.lora_B.normal_(0, 0.3)
        peer.lora_A["default"].weight.copy_(ours.lora_A)
        peer.lora_B["default"].weight.copy_(ours.lora_B)
        if dora:
            ours.lora_magnitude.mul_(1.3)
            peer.lora_magnitude_vector["default"].weight.copy_(ours.lora_magnitude)
    x = torch.randn(7, 12)
    torch.manual_seed(5)
    y = ours(x)
    torch.manual_seed(5)  # the same inputs are left out
    expected = theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.lora_A.grad, peer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.lora_B.grad, peer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-4)
    if dora:
        theirs_m = peer.lora_magnitude_vector["default"].weight.grad
        torch.testing.assert_close(ours.lora_magnitude.grad, theirs_m, rtol=1e-4, atol=1e-4)


def test_the_numbers_of_the_lora_guide_are_counted(tmp_path: Path) -> None:
    """chatglm-6b of the revision that the guide pins, on the meta device: no weights are needed to count."""
    import random_checkpoints

    from glmchat.engine.families import family_of

    config = random_checkpoints.CONFIGS["chatglm-6b-early"]
    family, spec = family_of(config)
    with torch.device("meta"):
        model = family.build(spec)
    prepare(model)
    layers = attach(model, LoraShape(rank=8, alpha=32, targets=("query_key_value",)), seed=0)
    assert count(model, layers) == (3_670_016, 6_258_876_416)


def test_targets_are_named_by_their_ends_by_a_pattern_or_all_at_once(tmp_path: Path) -> None:
    _, model, _ = load_base(build("llama", tmp_path / "m"), Settings(dtype="float32", threads=1), "cpu")
    everything = targets_of(model, "all-linear")
    assert len(everything) == 7 * model.spec.layers and not any("lm_head" in name for name in everything)
    assert targets_of(model, ("q_proj",)) == [name for name in everything if name.endswith("q_proj")]
    assert targets_of(model, r".*layers\.0\..*_proj") == [name for name in everything if ".0." in name]
    for wrong in (("q_proj", "query"), r"nothing", "("):
        with pytest.raises(Usage):
            targets_of(model, wrong)


@pytest.mark.parametrize("family", ["llama", "gguf", "chatglm", "gpt2", "fallback"])
def test_before_the_first_step_nothing_is_added(tmp_path: Path, family: str) -> None:
    _, model, _ = load_base(build(family, tmp_path / "m"), Settings(dtype="float32", threads=1), "cpu")
    prepare(model)
    layers = attach(model, LoraShape(rank=2), seed=0)
    assert layers and change_norm(layers) == 0
    layer = next(iter(layers.values()))
    x = torch.randn(3, layer.in_features)
    assert torch.equal(layer(x), layer.base(x))
    with torch.no_grad():
        layer.lora_B.fill_(0.5)
    assert change_norm(layers) == pytest.approx(
        float((layer.shape.scale * layer.lora_B @ layer.lora_A).norm()), rel=1e-4
    )
