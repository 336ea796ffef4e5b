"""How the processes of a run share its work: who computes which passes, and who holds which part of the numbers.

The base class is one process, or several that hold all of the model each and agree on gradients (torch's DDP).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from glmchat.core.errors import Failed, Usage
from glmchat.core.language import tr
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.quantize.linear import QuantLinear
from glmchat.tuning import faults, state
from glmchat.tuning.forward import Flat
from glmchat.tuning.methods.base import Method
from glmchat.tuning.optimiser import optimiser_of
from glmchat.tuning.order import Step
from glmchat.tuning.settings import Settings

_BACKENDS = ("gloo", "NCCL")  # in what torch says of a connection that broke


class Sharing:
    """kind: stands in a run's record. home: where the base is loaded. device: where passes are computed.

    in_step: each pass is one that all processes take part in, since it brings pieces of weights or gradients together;
    so all compute as many, and whoever reads the model does it with all the others. cuts_base: weights that do not
    learn lie in pieces, too.
    """

    kind = ""
    in_step = False
    cuts_base = False

    def __init__(self, accelerator: Any, device: str) -> None:
        self.accelerator, self.device = accelerator, device
        self.home = device
        self.processes, self.index = accelerator.num_processes, accelerator.process_index
        self.main: bool = accelerator.is_main_process

    def refuse_model(self, model: LanguageModel) -> None:
        """Raise Usage for a model whose numbers cannot be shared in this way."""
        if self.cuts_base and any(isinstance(module, QuantLinear) for module in model.modules()):
            raise Usage(
                tr("packed matrices are not cut into pieces: every process would hold all of this base"),
                hint=tr("share a packed base among plain processes (docs/tuning.md)"),
                code="tune.shards",
            )

    def cut(self, learner: nn.Module, method: Method, settings: Settings) -> None:
        """Make the optimiser, and leave to each process its part; the numbers that learn may be others from here on."""
        self.learner, self.method = learner, method
        self.call: Any = learner
        self.optimiser: Any = optimiser_of(list(method.parameters.values()), settings)

    def join(self) -> None:
        """Agree on gradients from here on. Behind what a run that goes on reads."""
        if self.processes > 1:
            self.call, self.optimiser = self.accelerator.prepare(self.learner, self.optimiser)

    def passes_of(self, step: Step) -> list[tuple[int, ...] | None]:
        """Those of this process; None: one for the others' sake, which counts nothing."""
        own: list[tuple[int, ...] | None] = [*step.passes[self.index :: self.processes]]
        rounds = -(-len(step.passes) // self.processes) if self.in_step else 1
        return own + [None] * (rounds - len(own))

    def rehearse(self, flat: Flat) -> None:
        """A whole pass that leaves nothing behind; before `join`."""
        self.learner(flat).backward()
        self.learner.zero_grad(set_to_none=True)

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def between(self, *, last: bool) -> Any:
        """Around a pass; last: gradients are brought together behind it."""
        return nullcontext() if last or self.processes == 1 else self.accelerator.no_sync(self.call)

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""
        return values if self.processes == 1 else self.accelerator.reduce(values.to(self.device)).cpu()

    def check_gradients(self) -> None:
        """Raise Failed unless each tensor that learns got one."""
        faults.require_gradients(self.method.parameters, self.method.may_rest)

    def norm(self, clip: float) -> float:
        """The length of the gradient, which is no longer than `clip` from here on (0: as it is)."""
        values = list(self.method.parameters.values())
        if clip:
            return float(self.accelerator.clip_grad_norm_(values, clip))
        grads = [value.grad for value in values if value.grad is not None]
        return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0

    def step(self) -> None:
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    def learning_bytes(self, needed: int) -> int:
        """Of what gradients and moments need in all, what this process holds."""
        return needed

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within it the model itself may be called, as `in_step` says; nothing of it is to be changed."""
        yield

    @contextmanager
    def whole(self, *, everything: bool = False, changes: bool = False) -> Iterator[None]:
        """Within it the main process has whole tensors where the model has those that learn. everything: and the
        others. changes: so has each process, and what it writes into them stays."""
        yield

    def lost(self, error: RuntimeError, saved: int | None) -> Failed | None:
        """The error for another process that is gone, where that is what torch tells. saved: the last checkpoint's."""
        if not isinstance(error, torch.distributed.DistError) and not any(word in str(error) for word in _BACKENDS):
            return None
        return Failed(
            tr("one of the {count} processes of this run is gone", count=self.processes),
            hint=tr("the same command begins it again")
            if saved is None
            else tr("the same command goes on from the checkpoint of step {step}", step=saved),
            code="tune.lost",
        )

    def agreed(self, number: int) -> int:
        """The main process's, where all have to go on with the same."""
        return number

    def moments(self) -> dict[str, torch.Tensor]:
        """As `state.moments`; {} in a process that only helps."""
        return state.moments(getattr(self.optimiser, "optimizer", self.optimiser), self.method.parameters)

    def restore(self, moments: dict[str, torch.Tensor]) -> None:
        """The other way round. Raises Damaged."""
        state.restore_moments(self.optimiser, self.method.parameters, moments)


def not_heard(name: str, value: str, hint: str) -> Usage:
    """The error for something in accelerate's configuration that a run would not do."""
    return Usage(
        tr("of accelerate's configuration, {name} has to be {value}", name=name, value=value),
        hint=hint,
        code="tune.shards",
    )
