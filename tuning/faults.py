"""Steps that must not be taken: what was not finite, where it began, and which rows it came from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from glmchat.core.errors import Failed
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.tuning.examples import Example
from glmchat.tuning.forward import flatten, layers_of
from glmchat.tuning.methods.base import Method
from glmchat.tuning.order import Step


def require_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise Failed unless the first step reached every tensor that is to learn.

    A has a gradient of zeros as long as B is zero, which it is at the beginning.
    """
    for name, value in parameters.items():
        if value.grad is None or (".lora_A" not in name and not bool(value.grad.any())):
            raise Failed(
                tr("{name} got no gradient in the first step, so it would never learn", name=one_line(name, 160)),
                hint=tr("leave its layer out of the targets"),
                code="tune.gradient",
            )


def bad_step(
    method: Method,
    dataset: Sequence[Example],
    step: Step,
    loss: float,
) -> Failed:
    """The error for a step whose loss or gradient is not finite, or whose loss is exactly 0."""
    if loss == 0:
        where, rows = "", step.documents
    elif math.isfinite(loss):
        where, rows = _last_gradient(method.parameters), step.documents
    else:
        where, rows = _first_layer(method, dataset, step)
    places = ", ".join(str(dataset[number].place) for number in rows[:4]) + (" …" if len(rows) > 4 else "")
    what = "0" if loss == 0 else str(loss)
    said = {"step": step.number, "loss": what, "places": one_line(places, 200)}
    if math.isfinite(loss) and loss != 0:
        sentence = tr("step {step}: the loss is {loss} but its gradient is not finite; rows: {places}", **said)
    else:
        sentence = tr("step {step}: the loss is {loss}; rows: {places}", **said)
    if where:
        sentence = tr("{what}; first in {layer}", what=sentence, layer=one_line(where, 120))
    return Failed(
        sentence,
        hint=tr("nothing was registered and the last checkpoint is whole: try a lower learning rate, or float32"),
        code="tune.not_finite",
    )


@torch.no_grad()
def _first_layer(method: Method, dataset: Sequence[Example], step: Step) -> tuple[str, tuple[int, ...]]:
    """The first module whose output is not finite, and the documents with which it is not."""
    found: list[str] = []
    hooks = []
    model = method.model

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor) and not bool(first.isfinite().all()):
                found.append(name)

        return hook

    for name, module in model.named_modules():
        if name and not list(module.children()):
            hooks.append(module.register_forward_hook(watch(name)))
    for name, module in layers_of(model):
        hooks.append(module.register_forward_hook(watch(name)))
    device = next(model.parameters()).device
    rows, first = [], ""
    try:
        for number in step.documents:
            found.clear()
            loss = method.loss(flatten([dataset[number]], device))
            if found or not bool(loss.isfinite()):
                rows.append(number)
                first = first or (found[0] if found else "the head")
    finally:
        for hook in hooks:
            hook.remove()
    return first, tuple(rows) or step.documents


def _last_gradient(parameters: Mapping[str, nn.Parameter]) -> str:
    """Gradients come from the last layer to the first: the last one that is not finite is where it began."""
    wrong = [name for name, p in parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all())]
    return wrong[-1] if wrong else ""
