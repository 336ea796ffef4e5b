"""What is selected in the transcript: cells from one place to another, and the text they stand for."""

from __future__ import annotations

from rich.cells import cell_len

from glmchat.tui.transcript.cells import cut, word_at
from glmchat.tui.transcript.markdown import Line
from glmchat.tui.transcript.page import Page, Position


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
