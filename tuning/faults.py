"""Steps that must not be taken: what was not finite, where it began, and which rows it came from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
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
from glmchat.tuning.pieces import whole_of

_HEARD = 8  # losses of steps, of which the median counts: some odd rows among them change nothing
_FAR = 3.0  # nats above the lowest median; and twice as high


class Guard:
    """Hears the loss of each step, and stops a run whose loss explodes: the median of the last steps is far above the
    lowest that it was. A function of the losses alone, so that a run which goes on hears as one that never stopped.
    """

    def __init__(self, heard: Mapping[str, Any] | None = None, *, far: float = _FAR) -> None:
        """heard: what `to_json` gave, of a run that goes on. far: how far above the lowest is too far, at least."""
        known = heard or {}
        self._far = far
        self._last = [float(loss) for loss in known.get("last", ())]
        self._lowest = float(known.get("lowest", math.inf))

    def to_json(self) -> dict[str, Any]:
        return {"last": self._last, **({"lowest": self._lowest} if math.isfinite(self._lowest) else {})}

    @property
    def is_high(self) -> bool:
        """The last step's loss is far too high: where this goes on it will be said, and what the step made of the
        numbers is not to take the place of an earlier checkpoint."""
        return bool(self._last) and self._last[-1] > self._limit

    @property
    def _limit(self) -> float:
        return self._lowest + max(self._far, self._lowest)

    def hear(self, step: int, loss: float, saved: int | None) -> None:
        """saved: the step of the last checkpoint. Raises Failed where the loss has exploded."""
        self._last = [*self._last, loss][-_HEARD:]
        if len(self._last) < _HEARD:
            return
        median = statistics.median(self._last)
        if median > self._limit:
            hint = tr("take a lower learning rate (--lr)")
            if saved is not None:
                hint = tr("the checkpoint of step {step} is from before; take a lower learning rate (--lr)", step=saved)
            raise Failed(
                tr("step {step}: the loss explodes: it was {low}, and is {high} (medians of {count} steps)", step=step,
                   low=f"{self._lowest:.3f}", high=f"{median:.3f}", count=_HEARD),
                hint=hint,
                code="tune.diverged",
            )  # fmt: skip
        self._lowest = min(self._lowest, median)


def require_gradients(
    parameters: Mapping[str, nn.Parameter],
    may_rest: Callable[[str], bool],
    grad_of: Callable[[nn.Parameter], torch.Tensor | None] = lambda value: value.grad,
) -> None:
    """Raise Failed unless the first step reached every tensor that is to learn. may_rest: with a gradient of zeros.
    grad_of: where the gradient is."""
    for name, value in parameters.items():
        grad = grad_of(value)
        if grad is None or not (may_rest(name) or bool(whole_of(grad).any())):
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
    saved: int | None = None,
) -> Failed:
    """The error for a step whose loss or gradient is not finite, or whose loss is exactly 0.

    saved: the step of the last checkpoint.
    """
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
    if loss == 0:
        hint = tr("nothing was registered: the base knows these rows by heart, or computes too coarsely; "
                  "take other rows, or --dtype float32")  # fmt: skip
    elif saved is None:
        hint = tr("nothing was registered: try a lower learning rate (--lr), or --dtype float32")
    else:
        hint = tr("nothing was registered, and the checkpoint of step {step} is whole: try a lower learning rate "
                  "(--lr), or --dtype float32", step=saved)  # fmt: skip
    return Failed(sentence, hint=hint, code="tune.not_finite")


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
    wrong = [
        name for name, p in parameters.items() if p.grad is not None and not bool(whole_of(p.grad).isfinite().all())
    ]
    return wrong[-1] if wrong else ""
