"""Documents of random tokens for tiny models, and a run over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_checkpoints import prompt_of

from glmchat.tuning.examples import Example, Place, Segment
from glmchat.tuning.settings import Settings
from glmchat.tuning.trainer import Result, train


def documents(family: str, count: int, *, longest: int = 24, seed: int = 3, words: int = 200) -> list[Example]:
    """The family's own beginning, then an answer of random words that is learned."""
    noise = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        start = prompt_of(family)
        length = int(torch.randint(2, longest - len(start), (1,), generator=noise))
        answer = torch.randint(5, words, (length,), generator=noise).tolist()
        parts = (Segment("prompt", 0, len(start)), Segment("answer", len(start), len(start) + length))
        learned = (False,) * len(start) + (True,) * length
        made.append(Example((*start, *answer), learned, parts, Place("data.json", number + 1)))
    return made


def pairs(family: str, count: int, *, longest: int = 24, seed: int = 3) -> list[Example]:
    """Two answers each behind the family's own beginning, the better one first."""
    better, worse = (documents(family, count, longest=longest, seed=one) for one in (seed, seed + 1))
    made = []
    for first, other in zip(better, worse, strict=True):
        start = len(first.ids)
        moved = (Segment(part.part, start + part.start, start + part.end) for part in other.segments)
        made.append(
            Example(
                (*first.ids, *other.ids),
                (*first.learned, *other.learned),
                (*first.segments, *moved),
                first.place,
                start,
            )
        )
    return made


def rows_of(options: dict[str, Any], count: int) -> list[Example]:
    """What the method of a run learns from."""
    return pairs("llama", count) if options.get("method") == "dpo" else documents("llama", count)


def plain(**changes: Any) -> Settings:
    """Exact arithmetic, nothing random but the first numbers of A."""
    given = {"dtype": "float32", "threads": 1, "rank": 4, "alpha": 8.0, "warmup": 0.0, "schedule": "linear"}
    return Settings(**{**given, **changes})


def learn(
    folder: Path,
    model: Path,
    data: Sequence[Example],
    settings: Settings,
    stop: Callable[[], bool] = lambda: False,
    **more: Any,
) -> tuple[Result, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    result = train(model, data, settings, folder, events.append, stop, **more)
    return result, events


def losses(events: Sequence[dict[str, Any]]) -> list[float]:
    return [event["loss"] for event in events if event["kind"] == "step"]
