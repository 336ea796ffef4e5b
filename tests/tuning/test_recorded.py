"""Losses and gradients that the original ChatGLM code recorded, and fifty steps as plain torch takes them.

Covers tuning/forward.py, tuning/products.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from learning import REFERENCE, documents, learn, losses, plain, recorded_rows
from safetensors.torch import load_file
from tiny_checkpoints import build
from torch.nn import functional

from glmchat.tuning.forward import flatten, load_base, loss_of
from glmchat.tuning.lora import LoraShape, attach, prepare, trainable
from glmchat.tuning.order import order_of

VARIANTS = sorted(
    path.parent.name for path in REFERENCE.glob("*/golden.json") if "train_loss" in json.loads(path.read_text())
)


@pytest.mark.skipif(not VARIANTS, reason="../shared with the reference vectors is absent")
@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if "ptuning" not in name] or ["none"])
def test_loss_and_gradients_are_the_recorded_ones(variant: str, by_layer: bool) -> None:
    folder = REFERENCE / variant
    tensors, facts = load_file(folder / "golden.safetensors"), json.loads((folder / "golden.json").read_text())
    _, model, _ = load_base(folder, plain(), "cpu")
    prepare(model)
    norms = facts.get("grad_l2_norms", {})
    model.requires_grad_(bool(norms))
    flat = flatten(recorded_rows(tensors))
    loss = loss_of(model, flat, by_layer=by_layer) / len(flat.targets)
    assert float(loss.detach()) == pytest.approx(float(tensors["train.loss"]), abs=1e-4)
    if not norms:
        return
    torch.autograd.backward(loss)
    own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    compared = [name for name in norms if name in own]
    assert len(compared) >= len(own) - 1 > 10
    for name in compared:
        assert float(own[name].norm()) == pytest.approx(norms[name], rel=2e-3, abs=1e-5), name
    for name, expected in tensors.items():
        if name.startswith("grad."):
            found = own[name.removeprefix("grad.")]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["chatglm", "chatglm-early", "chatglm2", "chatglm3"])
def test_fifty_steps_are_those_of_plain_torch_with_the_whole_mask(tmp_path: Path, family: str) -> None:
    """transformers has no class for these: one row after the other through the model's own forward, which builds the
    mask of a whole prompt, with torch's cross entropy and AdamW."""
    folder, data = build(family, tmp_path / "base"), documents(family, 20)
    targets = ("query_key_value", "dense_h_to_4h")
    settings = plain(epochs=5, rows_per_step=2, learning_rate=3e-3, targets=targets, schedule="linear")
    _, events = learn(tmp_path / "run", folder, data, settings)

    _, model, _ = load_base(folder, settings, "cpu")
    prepare(model)
    shape = LoraShape(settings.rank, settings.alpha, targets=targets)
    parameters = list(trainable(attach(model, shape, settings.seed)).values())
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0, eps=settings.eps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda done: 1 - done / 50)
    expected = []
    for epoch in range(1, 6):
        order = order_of(len(data), settings.seed, epoch)
        for start in range(0, len(order), 2):
            rows = [data[number] for number in order[start : start + 2]]
            total = torch.zeros(())
            for row in rows:
                logits = model(torch.tensor(row.ids))
                labels = torch.tensor(row.labels[1:])
                total = total + functional.cross_entropy(logits[:-1], labels, ignore_index=-100, reduction="sum")
            loss = total / sum(sum(row.learned[1:]) for row in rows)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimiser.step()
            schedule.step()
            expected.append(float(loss.detach()))
    assert len(expected) == 50
    torch.testing.assert_close(torch.tensor(losses(events)), torch.tensor(expected), atol=1e-4, rtol=0)
    assert expected[-1] < expected[0]
