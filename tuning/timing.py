"""How long a run will take: its passes, its updates, and what is done between the steps, from a few real ones.

Two passes are measured, the fullest and a usual one: short rows cost more for each of their tokens than long ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from glmchat.tuning.order import Step
from glmchat.tuning.settings import Settings

_TENSORS = 16  # of those that learn: on so many an update is measured
_NUMBERS = 4 << 20  # or on so many
_DISK = 200e6  # bytes a second of what is written, hashed and brought to the disk; slower than most


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds: of a pass, of each token in it, and of the first pass of a length besides; of an update; of one
    evaluation, of the answers to all questions, of a checkpoint; of what is done once behind all steps. speed: tokens a
    second of the fullest pass."""

    each_pass: float
    each_token: float
    speed: float
    each_new: float = 0.0
    update: float = 0.0
    evaluation: float = 0.0
    answers: float = 0.0
    checkpoint: float = 0.0
    ending: float = 0.0

    def seconds(self, steps: Sequence[Step], lengths: Sequence[int], settings: Settings, processes: int = 1) -> float:
        """Of all steps, and of what is due between and behind them. processes: that share the passes."""
        passes = [sum(lengths[number] for number in each) for step in steps for each in step.passes]
        between = (
            self.evaluation * _times(len(steps), settings.evaluate_every)
            + self.answers * _times(len(steps), settings.sample_every)
            + self.checkpoint * _times(len(steps), settings.save_every)
        )
        learning = self.each_pass * len(passes) + self.each_token * sum(passes) + self.each_new * len(set(passes))
        return learning / processes + self.update * len(steps) + between + self.ending


def _times(steps: int, every: int) -> int:
    """How often something is done: every so many steps, and behind the last."""
    return -(-steps // every) if every else 1


def of_passes(
    run: Callable[[Sequence[int]], None],
    fullest: Sequence[int],
    usual: Sequence[int],
    lengths: Sequence[int],
    clock: Callable[[], float] = time.perf_counter,
) -> Costs:
    """From two passes over each. The first over a usual one tells what a length costs that was not seen before: kernels
    are made for it. fullest, usual: numbers of documents."""
    most, some = (sum(lengths[number] for number in each) for each in (fullest, usual))
    long = second(lambda: run(fullest), clock)
    begun = clock()
    run(usual)
    new = clock() - begun
    short = second(lambda: run(usual), clock)
    each_new = max(0.0, new - short) if some < most else 0.0
    if some > 0.8 * most:  # too near to tell a pass from its tokens
        return Costs(0.0, long / most, most / long, each_new)
    each_token = min(long / most, max(0.0, (long - short) / (most - some)))
    return Costs(max(0.0, short - each_token * some), each_token, most / long, each_new)


def second(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the second of two."""
    run()
    begun = clock()
    run()
    return max(clock() - begun, 1e-9)


def usual_pass(steps: Sequence[Step], lengths: Sequence[int]) -> tuple[int, ...]:
    """The pass in the middle of all, by their tokens."""
    passes = sorted((each for step in steps for each in step.passes), key=lambda each: sum(lengths[n] for n in each))
    return passes[len(passes) // 2]


def of_update(parameters: Sequence[torch.Tensor]) -> float:
    """Seconds of one step of AdamW with its clipping, measured on copies of some of the tensors that learn; of a whole
    model's on as many numbers as fit anywhere."""
    numbers = sum(tensor.numel() for tensor in parameters)
    if numbers > _NUMBERS:
        return of_update([torch.zeros(_NUMBERS, device=parameters[0].device)]) * numbers / _NUMBERS
    some = parameters[:: max(1, len(parameters) // _TENSORS)][:_TENSORS]
    copies = [torch.zeros_like(tensor).requires_grad_() for tensor in some]
    optimiser = torch.optim.AdamW(copies)

    def update() -> None:
        for copy in copies:
            copy.grad = torch.zeros_like(copy)
        torch.nn.utils.clip_grad_norm_(copies, 1.0)
        optimiser.step()

    return second(update) * len(parameters) / len(some)


def of_checkpoint(parameters: Sequence[torch.Tensor]) -> float:
    """The tensors and two moments of each."""
    return 12 * sum(tensor.numel() for tensor in parameters) / _DISK
