"""All turns of a conversation below each other: which line of the whole is which line of which turn."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

from glmchat.tui.theme import Palette
from glmchat.tui.transcript.turn_layout import TurnLayout
from glmchat.tui.transcript.turns import Turn
from glmchat.tui.transcript.wrapping import Line


class Position(NamedTuple):
    """A cell of the content; ordered as one reads."""

    turn: int
    piece: int
    line: int
    cell: int


class Page:
    """The turns in order, found by the turn's key, its number or a line of the whole."""

    def __init__(self, turns: Iterable[Turn] = ()) -> None:
        self._layouts = [TurnLayout(turn) for turn in turns]
        self._tops = [0]
        self._index: dict[str, int] = {}
        self._reindex()

    def __len__(self) -> int:
        return len(self._layouts)

    def __getitem__(self, index: int) -> TurnLayout:
        return self._layouts[index]

    def __iter__(self) -> Iterator[TurnLayout]:
        return iter(self._layouts)

    def find(self, key: str) -> TurnLayout | None:
        index = self._index.get(key)
        return None if index is None else self._layouts[index]

    def index(self, key: str | None) -> int | None:
        return self._index.get(key) if key is not None else None

    def insert(self, index: int, turn: Turn) -> None:
        self._layouts.insert(index, TurnLayout(turn))
        self._reindex()

    def drop(self, keys: Iterable[str]) -> None:
        gone = set(keys)
        self._layouts = [layout for layout in self._layouts if layout.turn.key not in gone]
        self._reindex()

    def rename(self, key: str, new: str) -> None:
        if (layout := self.find(key)) is not None:
            layout.turn.key = new
            self._reindex()

    def _reindex(self) -> None:
        self._index = {layout.turn.key: i for i, layout in enumerate(self._layouts)}

    # Lines

    @property
    def height(self) -> int:
        return self._tops[-1]

    def span(self, index: int) -> tuple[int, int]:
        """The first line of a turn, and the first below it."""
        return self._tops[index], self._tops[index + 1]

    def fit(self, width: int, palette: Palette, room: int) -> None:
        for layout in self._layouts:
            layout.fit(width, palette, room)
        self._measure()

    def _measure(self) -> None:
        self._tops = list(accumulate((layout.height for layout in self._layouts), initial=0))

    def realise(self, top: int, bottom: int) -> bool:
        """Draw the lines in view. True if anything moved."""
        changed = False
        index = max(0, bisect_right(self._tops, top) - 1)
        while index < len(self._layouts) and self._tops[index] < bottom:
            layout = self._layouts[index]
            start = self._tops[index]
            before = layout.height
            layout.realise(top - start, bottom - start)
            changed = changed or layout.height != before
            index += 1
        if changed:
            self._measure()
        return changed

    def place(self, y: int) -> Position | None:
        """What stands at line `y`."""
        if not self._layouts or y >= self._tops[-1]:
            return None
        index = min(bisect_right(self._tops, y) - 1, len(self._layouts) - 1)
        piece, line = self._layouts[index].locate(y - self._tops[index])
        return Position(index, piece, line, 0)

    def y_of(self, place: Position) -> int:
        if place.turn >= len(self._layouts):
            return self._tops[-1]
        layout = self._layouts[place.turn]
        return self._tops[place.turn] + min(layout.top(place.piece) + place.line, layout.height)

    def line(self, place: Position) -> Line | None:
        return self._layouts[place.turn].line(place.piece, place.line)

    def end(self) -> Position | None:
        """Behind everything."""
        return Position(len(self) - 1, self._layouts[-1].count - 1, 1_000_000, 0) if self._layouts else None

    def lines_between(self, first: Position, last: Position) -> Iterator[tuple[Position, Line]]:
        """Every line from one place to another, in view or not."""
        for turn in range(first.turn, min(last.turn + 1, len(self))):
            layout = self._layouts[turn]
            start = first.piece if turn == first.turn else 0
            stop = min(last.piece + 1, layout.count) if turn == last.turn else layout.count
            for piece in range(start, stop):
                for line, drawn in enumerate(layout.lines(piece)):
                    if first[:3] <= (turn, piece, line) <= last[:3]:
                        yield Position(turn, piece, line, 0), drawn
