"""How the content of a KV cache came to be: which forward pass computed which positions.

The same position computed in a batch of other rows may differ in its last bits, and a sampled answer may then part from
what it was. So each answer tells the passes behind its prompt, and a replay repeats them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glmchat.core.errors import Usage
from glmchat.core.language import tr


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
        self._done: list[Pass] = []

    def add(self, start: int, end: int, kind: str) -> None:
        last = self._done[-1] if self._done else None
        if last is not None and kind == last.kind == "decode":
            self._done[-1] = replace(last, end=end)
        else:
            self._done.append(Pass(start, end, kind))

    def cut(self, length: int, ids: Sequence[int]) -> None:
        """The cache keeps its first `length` positions; ids: what stood in all of them."""
        while self._done and self._done[-1].start >= length:
            self._done.pop()
        if self._done and self._done[-1].end > length:
            last = self._done[-1]
            dropped = (*ids[length : last.end], *last.dropped) if last.kind == "prefill" else ()
            self._done[-1] = replace(last, end=length, dropped=tuple(dropped))

    def to_json(self) -> list[list[Any]]:
        return [one.to_json() for one in self._done]


def parse_passes(data: Iterable[Any], length: int) -> list[Pass]:
    """Passes from JSON. Raises Usage if they do not make up exactly `length` positions."""
    found: list[Pass] = []
    at = 0
    try:
        for start, end, kind, *rest in data:
            dropped = tuple(int(i) for i in rest[0]) if rest else ()
            if start != at or not start < end <= length or kind not in ("prefill", "decode"):
                raise ValueError
            found.append(Pass(start, end, kind, dropped))
            at = end
    except (TypeError, ValueError):
        at = -1
    if at != length or not found or found[-1].dropped:
        raise Usage(tr("the record of this answer is damaged"), hint=tr("it cannot be replayed"), code="replay.record")
    return found
