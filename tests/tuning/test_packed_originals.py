"""LoRA and prefixes on checkpoints that THUDM packed, beside the same weights unpacked by their format's definition.

Covers tuning/products.py, tuning/methods/prefix.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import REFERENCE, plain

from glmchat.tuning.examples import Example, Place
from glmchat.tuning.forward import flatten, load_base
from glmchat.tuning.methods import method_of

PACKED = ["v1_new_int8", "v2_int4"]


def unpacked(folder: Path, out: Path) -> Path:
    """As quantization.py of the original has it: bytes, or two signed nibbles in each, times the scale of their row."""
    config = json.loads((folder / "config.json").read_text())
    bits = config.pop("quantization_bit")
    stored = torch.load(folder / "pytorch_model.bin", weights_only=True)
    weights = {}
    for name, value in stored.items():
        if name.endswith("weight_scale"):
            continue
        if value.dtype == torch.int8:
            numbers = value if bits == 8 else torch.stack((value >> 4, (value << 4) >> 4), -1).flatten(1)
            value = numbers.float() * stored[f"{name}_scale"].float()[:, None]
        weights[name] = value.float()
    out.mkdir()
    (out / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    torch.save(weights, out / "pytorch_model.bin")
    return out


def gradients(folder: Path, asked: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one document, from the same drawn numbers each time."""
    settings = plain(**asked)
    checkpoint, model, _ = load_base(folder, settings, "cpu")
    method = method_of(checkpoint, model, settings)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in method.parameters.values():
            value.copy_(torch.randn(value.shape, generator=noise) * 0.05)
    spec = checkpoint.spec
    start = [5, 9, 17]
    if spec.bos_id is not None and not spec.causal:
        start += [spec.extra["gmask_id"], spec.bos_id]
    ids = (*start, 33, 7, 50)
    row = Example(ids, (False,) * len(start) + (True,) * 3, (), Place("drawn", 1))
    loss = method.loss(flatten([row]))
    torch.autograd.backward(loss)
    found = {name: value.grad for name, value in method.parameters.items() if value.grad is not None}
    assert len(found) == len(method.parameters)
    return float(loss.detach()), found


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="../shared with the reference vectors is absent")
@pytest.mark.parametrize("asked", [{}, {"method": "prefix", "prefix_length": 5}], ids=["lora", "prefix"])
@pytest.mark.parametrize("variant", PACKED)
def test_packed_originals_give_the_gradients_of_their_unpacked_weights(
    variant: str, asked: dict[str, Any], tmp_path: Path
) -> None:
    packed = gradients(REFERENCE / variant, asked)
    plainly = gradients(unpacked(REFERENCE / variant, tmp_path / "plain"), asked)
    assert packed[0] == pytest.approx(plainly[0], rel=1e-6)
    assert packed[1].keys() == plainly[1].keys()
    for name, gradient in plainly[1].items():
        torch.testing.assert_close(packed[1][name], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max()))
