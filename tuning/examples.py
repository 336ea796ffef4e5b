"""One document of the training data as the model sees it: the line between what reads data and what learns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Part = Literal["prompt", "answer", "stop"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row of data stands, so that whatever is said of it names it."""

    file: str
    line: int  # from 1; of a row of an array the line on which it begins

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring tokens with one role: [start, end) of `Example.ids`."""

    part: Part
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of one document, and which of them are learned.

    learned[i]: token i is predicted from those before it, and its loss counts (labels[i] = ids[i], else -100).
    Positions and masks are not here: a model derives them from the ids, as it does in a chat (ChatGLM-6B from its mask
    and begin tokens). second: of a pair, where its worse answer begins, behind its question once more; 0: no pair.
    """

    ids: tuple[int, ...]
    learned: tuple[bool, ...]
    segments: tuple[Segment, ...]
    place: Place
    second: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of its documents: one, or the two of a pair."""
        return (self.second, len(self.ids) - self.second) if self.second else (len(self.ids),)

    def documents(self) -> Iterator[tuple[tuple[int, ...], tuple[bool, ...]]]:
        """Ids and learned of each."""
        for start, end in pairwise((0, *((self.second,) if self.second else ()), len(self.ids))):
            yield self.ids[start:end], self.learned[start:end]

    @property
    def labels(self) -> list[int]:
        return [token if counts else -100 for token, counts in zip(self.ids, self.learned, strict=True)]
