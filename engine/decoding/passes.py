"""Which pass computed which position of a cache.

The same position computed in a batch of other rows may differ in its last bits, and a sampled answer may then part from
what it was. So each answer tells the passes behind its prompt, and a replay repeats them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Pass:
    """Positions `start` to `end` (not with it), computed in one step ("prefill") or one by one ("decode").

    dropped: ids of the last rows of a prefill that were cut off again; they were part of its batch.
    """

    start: int
    end: int
    kind: str
    dropped: tuple[int, ...] = ()

    def to_json(self) -> list[Any]:
        return [self.start, self.end, self.kind, *([list(self.dropped)] if self.dropped else [])]


class Passes:
    """The passes that made what a cache holds now, in order and without gaps."""

    def __init__(self) -> None:
        self.done: list[Pass] = []

    def copy(self) -> Passes:
        copied = Passes()
        copied.done = list(self.done)
        return copied

    def add(self, start: int, end: int, kind: str) -> None:
        last = self.done[-1] if self.done else None
        if last is not None and kind == last.kind == "decode":
            self.done[-1] = replace(last, end=end)
        else:
            self.done.append(Pass(start, end, kind))

    def cut(self, length: int, ids: Sequence[int]) -> None:
        """The cache keeps its first `length` positions; ids: what stood in all of them."""
        while self.done and self.done[-1].start >= length:
            self.done.pop()
        if self.done and self.done[-1].end > length:
            last = self.done[-1]
            dropped = (*ids[length : last.end], *last.dropped) if last.kind == "prefill" else ()
            self.done[-1] = replace(last, end=length, dropped=tuple(dropped))

    def to_json(self) -> list[list[Any]]:
        return [one.to_json() for one in self.done]
