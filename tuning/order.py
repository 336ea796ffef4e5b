"""Which documents make which step: a function of the lengths, the seed and the epoch, and of nothing else.

So any step can be gone to by its number, and a run that goes on reads nothing that it has read before.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.tuning.examples import Example
from glmchat.tuning.forward import learned_of
from glmchat.tuning.settings import EPOCHS, Settings

_STEPS_IN_ONE = 20  # at least, in an epoch of few rows
_MOST_EPOCHS = 20


@dataclass(frozen=True, slots=True)
class Step:
    """passes: the documents' numbers, as they lie behind each other in one pass; number counts from 1."""

    number: int
    epoch: int
    passes: tuple[tuple[int, ...], ...]

    @property
    def documents(self) -> tuple[int, ...]:
        return tuple(number for each in self.passes for number in each)


def order_of(documents: int, seed: int, epoch: int, *, shuffle: bool = True) -> list[int]:
    """The numbers of all documents as they come in this epoch (from 1)."""
    if not shuffle:
        return list(range(documents))
    noise = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    return torch.randperm(documents, generator=noise).tolist()


def steps_of(lengths: Sequence[int], settings: Settings) -> list[Step]:
    """All steps of a run. The last of an epoch may be small: its documents are not thrown away."""
    steps: list[Step] = []
    epochs = settings.epochs or (0 if settings.steps else EPOCHS)
    for epoch in range(1, epochs + 1) if epochs or not lengths else count(1):
        for group in _groups(order_of(len(lengths), settings.seed, epoch, shuffle=settings.shuffle), lengths, settings):
            steps.append(Step(len(steps) + 1, epoch, passes_of(group, lengths, settings.row_tokens)))
            if len(steps) == settings.steps:
                return steps
    return steps


def enough(lengths: Sequence[int], settings: Settings) -> Settings:
    """Where nobody says how much makes a step: few rows make small steps, and few steps more epochs, or nothing would
    be learned of them. 60 steps taught the starter model a style with 160 rows, 9 did not (benchmarks/tune_style.py).
    """
    if not settings.rows_per_step:
        small = max(1, sum(lengths) // _STEPS_IN_ONE)
        settings = replace(settings, tokens_per_step=min(settings.tokens_per_step, small))
    if settings.steps or settings.epochs:
        return settings
    one = max(1, len(steps_of(lengths, replace(settings, epochs=1))))
    epochs = min(_MOST_EPOCHS, max(EPOCHS, math.ceil(EPOCHS * _STEPS_IN_ONE / one)))
    # Another epoch's order may fill its steps better, and make fewer; by half at most.
    while one < 2 * _STEPS_IN_ONE and epochs < _MOST_EPOCHS:
        if len(steps_of(lengths, replace(settings, epochs=epochs))) >= EPOCHS * _STEPS_IN_ONE:
            break
        epochs += 1
    return replace(settings, epochs=epochs)


def _groups(order: Sequence[int], lengths: Sequence[int], settings: Settings) -> list[list[int]]:
    groups: list[list[int]] = []
    tokens = 0
    for number in order:
        rows, length = settings.rows_per_step, lengths[number]
        full = len(groups[-1]) >= rows if groups and rows else tokens + length > settings.tokens_per_step
        if not groups or full:
            groups.append([])
            tokens = 0
        groups[-1].append(number)
        tokens += length
    return groups


def passes_of(numbers: Sequence[int], lengths: Sequence[int], most: int) -> tuple[tuple[int, ...], ...]:
    """Documents put into passes of at most `most` tokens, the longest first into the first that has room."""
    passes: list[list[int]] = []
    room: list[int] = []
    for number in sorted(numbers, key=lambda n: (-lengths[n], n)):
        at = next((i for i, left in enumerate(room) if lengths[number] <= left), None)
        if at is None:
            passes.append([])
            room.append(max(most, lengths[number]))
            at = len(passes) - 1
        passes[at].append(number)
        room[at] -= lengths[number]
    return tuple(map(tuple, passes))


def worst_of(steps: Sequence[Step], lengths: Sequence[int]) -> tuple[int, ...]:
    """The pass that needs most memory: most tokens, and of such the one with the longest documents."""

    def size(numbers: tuple[int, ...]) -> tuple[int, int]:
        return sum(lengths[n] for n in numbers), sum(lengths[n] ** 2 for n in numbers)

    return max((each for step in steps for each in step.passes), key=size)


def fullness(steps: Sequence[Step], lengths: Sequence[int], most: int) -> float:
    """The share of the passes' `most` tokens that documents take, on average; a longer one alone fills its pass."""
    taken = [min(1.0, sum(lengths[n] for n in each) / most) for step in steps for each in step.passes]
    return sum(taken) / max(1, len(taken))


def rate_at(step: int, total: int, settings: Settings) -> float:
    """The learning rate of step `step` (from 1) of `total`, as transformers' schedules have it."""
    share = settings.warmup
    warm = math.ceil(share * total) if share < 1 else int(share)
    done = step - 1
    if done < warm:
        return settings.learning_rate * done / max(1, warm)
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (done - warm) / max(1, total - warm)
    if settings.schedule == "linear":
        return settings.learning_rate * max(0.0, 1 - progress)
    return settings.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


def read_through(dataset: Sequence[Example]) -> tuple[list[int], list[int], str]:
    """Tokens of each document, learned tokens of each, and the hash of all of them. Raises Usage where nothing is
    learned."""
    lengths, learned = [], []
    digest = hashlib.sha256()
    for example in dataset:
        lengths.append(len(example.ids))
        learned.append(learned_of(example))
        digest.update(struct.pack(f"<I{len(example.ids)}I", len(example.ids), *example.ids))
        digest.update(bytes(example.learned))
        digest.update(struct.pack("<I", example.second) if example.second else b"")
    if not sum(learned):
        raise Usage(
            tr("no token of the data is learned"),
            hint=tr("`--dry-run` shows three rows with every token and label"),
            code="tune.labels",
        )
    return lengths, learned, digest.hexdigest()
