"""AdamW as torch has it, and one that remembers in half of the bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from glmchat.tuning.pieces import own_of
from glmchat.tuning.settings import Settings


def optimiser_of(parameters: Sequence[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """AdamW over float32 tensors, its moments in the type that the settings name."""
    given: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }
    if settings.moments == "bfloat16":
        return HalfAdamW(list(parameters), **given)
    # One tensor after the other: all at once would hold another copy of every weight that learns.
    return torch.optim.AdamW(list(parameters), **given, foreach=False)


class HalfAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) whose two moments lie in bfloat16, computed in float32.

    A second moment moves by a thousandth of itself in a step, which bfloat16 rounds away; so moments are rounded up or
    down at random, in proportion to what is lost, and stay right on average. The noise is a function of the step: all
    processes and all repetitions of a run draw the same.
    """

    def __init__(self, parameters: Any, **settings: Any) -> None:
        super().__init__(parameters, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._move(parameter, group, number)

    def _move(self, parameter: torch.Tensor, group: dict[str, Any], number: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        done, (beta, slow) = int(state["step"]), group["betas"]
        grad = parameter.grad
        assert grad is not None
        average, square = own_of(state["exp_avg"]), own_of(state["exp_avg_sq"])
        parameter, grad = own_of(parameter), own_of(grad)
        noise = torch.Generator(parameter.device).manual_seed(done * 1_000_003 + number)
        first = average.float().lerp_(grad.float(), 1 - beta)
        second = square.float().mul_(slow).addcmul_(grad, grad, value=1 - slow)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        length = (second / (1 - slow**done)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(first, length, value=-group["lr"] / (1 - beta**done))
        average.copy_(rounded(first, noise))
        square.copy_(rounded(second, noise))


def rounded(value: torch.Tensor, noise: torch.Generator) -> torch.Tensor:
    """float32 -> bfloat16, up or down by chance: right on average. value is overwritten."""
    bits = value.view(torch.int32)
    bits += torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=noise)
    bits &= -(1 << 16)
    return value.to(torch.bfloat16)
