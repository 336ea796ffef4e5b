"""Questions about the cells of one drawn line: which characters, which word, which link, where a word was found."""

from __future__ import annotations

from collections.abc import Iterator

from rich.cells import cell_len, split_graphemes
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip

from glmchat.tui.transcript.page import Page, Position
from glmchat.tui.transcript.wrapping import Line


def cut(text: str, start: int, end: int) -> str:
    """The characters between two cells."""
    if text.isascii():
        return text[start : max(start, end)]
    found = ""
    position = 0
    for a, b, cells in split_graphemes(text)[0]:
        if position >= start and position < end:
            found += text[a:b]
        position += cells
    return found


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
        return "".join(parts).strip("\n")
