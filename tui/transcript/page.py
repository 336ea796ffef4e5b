"""All turns of a conversation below each other: which line of the whole is which line of which turn. The selection."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import NamedTuple

from rich.cells import cell_len, split_graphemes
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip

from glmchat.tui.theme import Palette
from glmchat.tui.transcript.turn_layout import TurnLayout
from glmchat.tui.transcript.turns import Turn
from glmchat.tui.transcript.wrapping import Line, tabs


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


def cut(text: str, start: int, end: int) -> str:
    """The characters between two cells."""
    if text.isascii():
        return text[start : max(start, end)]
    part = ""
    position = 0
    for a, b, cells in split_graphemes(text)[0]:
        if position >= start and position < end:
            part += text[a:b]
        position += cells
    return part


def hits(line: Line, query: str) -> Iterator[tuple[int, int]]:
    """Where a casefolded query stands in the line: from cell, to cell."""
    text = line.text.casefold()
    if len(text) != len(line.text):  # folding changed lengths (ß): look for the text as it stands
        text = line.text
    at = text.find(query)
    while at >= 0:
        start = line.lead + cell_len(line.text[:at])
        yield start, start + cell_len(line.text[at : at + len(query)])
        at = text.find(query, at + len(query))


def painted(segments: list[Segment], start: int, end: int, style: Style) -> list[Segment]:
    """The same with a style laid over some cells."""
    strip = Strip(segments)
    before, middle, after = strip.crop(0, start), strip.crop(start, end), strip.crop(end, strip.cell_length)
    return [*before, *(Segment(s.text, (s.style or Style()) + style) for s in middle), *after]


def word_at(line: Line, cell: int) -> tuple[int, int]:
    """The cells of the word under a cell."""
    words: list[tuple[int, int, str]] = []
    position = line.lead
    for a, b, cells in split_graphemes(line.text)[0]:
        words.append((position, position + cells, line.text[a:b]))
        position += cells
    index = next((i for i, (a, b, _) in enumerate(words) if a <= cell < b), None)
    if index is None:
        return 0, 0
    first = last = index
    if _in_word(words[index][2]):
        while first > 0 and _in_word(words[first - 1][2]):
            first -= 1
        while last + 1 < len(words) and _in_word(words[last + 1][2]):
            last += 1
    return words[first][0], words[last][1]


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def link_at(line: Line, cell: int) -> str:
    position = 0
    for segment in line.segments:
        position += segment.cell_length
        if cell < position:
            return (segment.style and segment.style.link) or ""
    return ""


class Selection:
    """Knows wrapped lines and decoration, so that copying gives what was said."""

    def __init__(self) -> None:
        self.range: tuple[Position, Position] | None = None
        self.dragging = False
        self._anchor: Position | None = None

    def clear(self) -> None:
        self.range = None

    def press(self, place: Position | None) -> None:
        self.range, self._anchor, self.dragging = None, place, True

    def drag(self, place: Position | None) -> bool:
        """The mouse went on to another place. True if that changed anything."""
        if place is None or self._anchor is None or place == self._anchor:
            return False
        first, last = sorted((self._anchor, place))
        self.range = (first, last._replace(cell=last.cell + (last == self._anchor)))
        return True

    def take(self, place: Position, line: Line, *, word: bool) -> bool:
        """Select the word or the line at a place. False if nothing stands there."""
        start, end = word_at(line, place.cell) if word else (line.lead, line.lead + cell_len(line.text))
        if end > start:
            self.range = (place._replace(cell=start), place._replace(cell=end))
        return end > start

    def cells(self, place: Position, line: Line) -> tuple[int, int] | None:
        """Which cells of a line are selected: from, to."""
        if self.range is None:
            return None
        first, last = self.range
        here = place[:3]
        if not first[:3] <= here <= last[:3]:
            return None
        start = max(first.cell if here == first[:3] else 0, line.lead)
        end = last.cell if here == last[:3] else line.lead + cell_len(line.text)
        return (start, end) if end > start else None

    def text(self, page: Page) -> str:
        """What the selection says: wrapped lines joined again, without bars, borders and padding."""
        if self.range is None:
            return ""
        first, last = self.range
        parts: list[str] = []
        joint = "\n"
        for place, line in page.lines_between(first, last):
            start = first.cell - line.lead if place[:3] == first[:3] else 0
            end = last.cell - line.lead if place[:3] == last[:3] else cell_len(line.text)
            if not line.text and line.lead and not line.joint:
                continue  # decoration
            mark = line.mark if joint == "\n" and start <= 0 else ""
            if parts:
                parts.append(joint)
            parts.append(mark + cut(line.text, max(0, start), end))
            joint = line.joint
        return tabs("".join(parts)).strip("\n")
