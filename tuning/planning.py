"""The plan of a run: what it will need and how long it takes, measured on the base itself before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from glmchat.tuning import predict, state, timing
from glmchat.tuning.forward import flatten
from glmchat.tuning.order import fullness, worst_of
from glmchat.tuning.settings import Settings
from glmchat.tuning.setup import Setup

PROBED = 64  # tokens that whoever reads a result back compares
Within = tuple[float, Callable[[int], Settings]]  # minutes, and the settings of a run of so many steps


def plan(setup: Setup, folder: Path, within: Within | None = None, beginning: float = 0.0) -> dict[str, Any]:
    """The plan as the run tells it. Memory by arithmetic, then two passes over the pass that needs most: what fails for
    memory fails now. Behind it the setup is as the run wants it: cut into pieces where processes share it so, with its
    layers computed twice where that was chosen, and as many steps as `within` has room for.

    folder: of the run, whose disk has to have room. beginning: seconds that a process which reads the result back needs
    before it loads the base. Raises DoesNotFit or Failed.
    """
    method, sharing = setup.method, setup.sharing
    worst = worst_of(setup.steps, setup.lengths)
    # First: torch imports much for its first update.
    update = timing.of_update(list(method.parameters.values()))
    growth = predict.measure(method, opening(setup), _all_lengths(setup))
    sharing.cut(setup.learner, method, setup.settings)
    growth = replace(growth, learning=sharing.learning_bytes(growth.learning))
    lengths = [length for number in worst for length in setup.dataset[number].lengths]
    wanted, memory = setup.settings.checkpointing, setup.settings.memory
    sides = 2 if method.learns_pairs else 1
    found = predict.choose(growth, lengths, wanted, memory, setup.device, sides=sides)
    setup.learner.by_layer = found.by_layer
    disk = method.disk(setup.settings.keep)
    state.require_room(folder, folder / state.CHECKPOINTS, disk)
    costs = replace(_costs(setup, worst, beginning), update=update)
    if within is not None:
        _fit(setup, costs, *within)
    found = predict.timed(found, costs.speed, _seconds(setup, costs))
    learning, numbers = method.count()
    steps, settings = setup.steps, setup.settings
    return {
        "kind": "plan",
        "steps": len(steps),
        "documents": len(setup.lengths),
        "epochs": sum(len(step.documents) for step in steps) / len(setup.lengths),
        "passes": sum(len(step.passes) for step in steps),
        "row_tokens": settings.row_tokens,
        "full": fullness(steps, setup.lengths, settings.row_tokens),
        "tokens": sum(setup.lengths[number] for step in steps for number in step.documents),
        "learned": sum(setup.learned),
        "learning": learning,
        "numbers": numbers,
        "layers": method.layers,
        "checkpointing": found.by_layer,
        "dtype": str(method.dtype).removeprefix("torch."),
        "makes": method.makes,
        "moments": settings.moments,
        "stored": str(method.stored).removeprefix("torch."),
        "disk": disk,
        "threads": setup.threads,
        "kernel": setup.kernel,
        "processes": sharing.processes,
        "sharing": sharing.kind,
        "prediction": found.to_json(),
    }


def _all_lengths(setup: Setup) -> set[int]:
    """Of passes, and of documents that are judged, one a pass."""
    passes = {sum(setup.lengths[number] for number in each) for step in setup.steps for each in step.passes}
    return passes.union(len(example.ids) for example in setup.evaluation)


def _costs(setup: Setup, worst: Sequence[int], beginning: float) -> timing.Costs:
    def run(numbers: Sequence[int]) -> None:
        setup.sharing.rehearse(setup.flat(numbers))

    setup.seed(0)
    found = timing.of_passes(run, worst, timing.usual_pass(setup.steps, setup.lengths), setup.lengths)
    mean = sum(setup.learned) // len(setup.learned)
    with setup.sharing.reading(), setup.method.in_force():
        answers = setup.sampler.seconds(mean) if setup.sampler is not None else 0.0
    return replace(
        found,
        evaluation=_seconds_of_evaluation(setup),
        answers=answers,
        checkpoint=timing.of_checkpoint(list(setup.method.parameters.values())),
        ending=beginning + setup.loading + 2 * (found.each_pass + found.each_token * PROBED),
    )


def _seconds_of_evaluation(setup: Setup) -> float:
    """From one of its rows, of a usual length."""
    if not setup.evaluation:
        return 0.0
    rows = sorted(setup.evaluation, key=lambda example: len(example.ids))
    usual = flatten([rows[len(rows) // 2]], setup.device)
    with torch.no_grad():
        seconds = timing.second(lambda: setup.learner(usual))
    return seconds / len(usual.ids) * sum(len(example.ids) for example in rows)


def _seconds(setup: Setup, costs: timing.Costs) -> float:
    return costs.seconds(setup.steps, setup.lengths, setup.settings, setup.sharing.processes)


def _fit(setup: Setup, costs: timing.Costs, minutes: float, settings_of: Callable[[int], Settings]) -> None:
    """As many steps as the minutes have room for, by what was measured."""
    for _ in range(4):  # what is done between the steps grows with them by leaps
        steps = max(1, int(len(setup.steps) * 60 * minutes / max(_seconds(setup, costs), 1e-9)))
        steps = int(setup.sharing.summed(torch.tensor(steps * setup.main)))  # each measured; the main one's holds
        setup.plan_steps(settings_of(steps))


def opening(setup: Setup) -> list[int]:
    """The beginning of a document, up to the first token that is learned: that may be the one that a ChatGLM-6B cannot
    do without."""
    example = setup.dataset[min(range(len(setup.lengths)), key=lambda number: setup.lengths[number])]
    first = next((at for at, counts in enumerate(example.learned) if counts), len(example.ids) - 1)
    return list(example.ids[: first + 1])
