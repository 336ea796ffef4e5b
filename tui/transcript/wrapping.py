"""Styled text to rows of a given width: words wrap at spaces, Chinese wraps anywhere but before closing punctuation.

Widths are cells as the terminal counts them; a grapheme (an emoji with joiners, a letter with its marks) is never cut.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.cells import cell_len, split_graphemes
from rich.segment import Segment
from rich.style import Style

Span = tuple[str, Style]
Action = tuple[int, int, str, str]

_CLOSING = "，。！？；：、）】》〉」』”’…％,.!?;:)\\]}%"
_OPENING = "（【《〈「『“‘(\\[{"
_WIDE = (  # scripts that break between any two characters: Han, kana, bopomofo, Hangul, full-width forms
    "\u2e80-\u2fff\u3003-\u3007\u3012-\u303f\u3040-\u30ff\u3100-\u318f\u31a0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\uff01-\uff60\uffe0-\uffe6"
)
# The cells of a tab while it is drawn. Noncharacters (Unicode 23.7), so no text that was written holds them.
_TAB, _TAB_REST = "\ufdd0", "\ufdd1"
_TAB_CELLS = _TAB + _TAB_REST
_AS_BLANKS = str.maketrans({_TAB: " ", _TAB_REST: " "})
_AS_TABS = str.maketrans({_TAB: "\t", _TAB_REST: ""})
_SPACE = rf"\s{_TAB}{_TAB_REST}"
_ATOM = re.compile(rf"[{_SPACE}]+|[{_OPENING}]*[{_WIDE}][{_CLOSING}]*|[^{_SPACE}{_WIDE}]+[{_CLOSING}]*|\S")
TAB_STOPS = 4  # cells


@dataclass(slots=True)
class Line:
    """One row of the transcript, without the margin.

    lead: cells of decoration at its left. text: what copying gives, cell for cell after the lead (tabs as `spread_tabs`
    leaves them). joint: what stands between it and the next row when both are copied. mark: what copying the lead
    gives ("- " for a drawn bullet). action: what a click does, as (from cell, to cell, name, argument).
    """

    segments: list[Segment]
    lead: int
    text: str
    joint: str = "\n"
    mark: str = ""
    action: Action | None = None

    def after(self, head: Segment, mark: str) -> Line:
        """The same line moved right behind `head`."""
        cells = head.cell_length
        action = self.action and (self.action[0] + cells, self.action[1] + cells, *self.action[2:])
        return Line([head, *self.segments], self.lead + cells, self.text, self.joint, mark + self.mark, action)


class Row(NamedTuple):
    """Offsets into the text, and what joins this row to the next: "\\n", or the blanks that the wrap swallowed."""

    start: int
    end: int
    joint: str


def spread_tabs(text: str, column: int = 0) -> str:
    """Each tab as as many characters as it takes cells; `blanks` draws them, `tabs` makes one tab of them again."""
    if "\t" not in text:
        return text
    lines = []
    for line in text.split("\n"):
        first, *others = line.split("\t")
        spread = first
        cells = column + cell_len(first)
        for part in others:
            stop = TAB_STOPS - cells % TAB_STOPS
            spread += _TAB + _TAB_REST * (stop - 1) + part
            cells += stop + cell_len(part)
        lines.append(spread)
        column = 0
    return "\n".join(lines)


def blanks(text: str) -> str:
    """What a terminal shows of a text with spread tabs."""
    return text.translate(_AS_BLANKS) if _TAB in text or _TAB_REST in text else text


def tabs(text: str) -> str:
    """What was written of a text with spread tabs."""
    return text.translate(_AS_TABS)


def rows(text: str, width: int, *, words: bool = True) -> list[Row]:
    """Where `text` is cut so that no row is wider than `width` cells (a single wider grapheme stands alone).

    words=False cuts at the edge (code). Every character is in exactly one row or in the swallowed space.
    """
    width = max(1, width)
    rows: list[Row] = []
    offset = 0
    for line in text.split("\n"):
        if len(line) <= width and (line.isascii() or cell_len(line) <= width):
            rows.append(Row(offset, offset + len(line), "\n"))
        elif words:
            rows.extend(_word_rows(line, width, offset))
        else:
            rows.extend(_edge_rows(line, width, offset))
        offset += len(line) + 1
    return rows


def _edge_rows(line: str, width: int, offset: int) -> Iterator[Row]:
    start = 0
    for end in _cuts(line, width):
        yield Row(offset + start, offset + end, "")
        start = end
    yield Row(offset + start, offset + len(line), "\n")


def _cuts(text: str, width: int) -> list[int]:
    """Offsets at which a text without spaces is cut; the rest after the last one fits."""
    if text.isascii():
        return list(range(width, len(text), width))
    cuts: list[int] = []
    used = 0
    for start, _end, cells in split_graphemes(text)[0]:
        if used + cells > width and used:
            cuts.append(start)
            used = 0
        used += cells
    return cuts


def _word_rows(line: str, width: int, offset: int) -> Iterator[Row]:
    start = 0  # of the row being filled
    used = 0  # its cells
    end = 0  # its end without trailing space
    for match in _ATOM.finditer(line):
        atom = match.group()
        at = match.start()
        cells = len(atom) if atom.isascii() else cell_len(atom)
        if atom[0].isspace() or atom[0] in _TAB_CELLS:
            if at == 0 and cells > width // 2:
                start = end = match.end()  # an indentation that leaves no room for words is dropped
            else:
                used += cells
            continue
        if used + cells <= width:
            used += cells
            end = match.end()
            continue
        if end > start:
            yield Row(offset + start, offset + end, line[end:at])
        start = at
        if cells <= width:
            used, end = cells, match.end()
            continue
        for cut in _cuts(atom, width):
            yield Row(offset + start, offset + at + cut, "")
            start = at + cut
        end = match.end()
        used = cell_len(line[start:end])
    yield Row(offset + start, offset + max(end, start), "\n")


def slices(spans: Sequence[Span], wrapped: Sequence[Row]) -> Iterator[list[Segment]]:
    """The segments of each row, in order."""
    index = 0
    position = 0  # offset of spans[index] in the text
    for row in wrapped:
        segments: list[Segment] = []
        while index < len(spans) and position + len(spans[index][0]) <= row.start:
            position += len(spans[index][0])
            index += 1
        i, p = index, position
        while i < len(spans) and p < row.end:
            text, style = spans[i]
            part = text[max(0, row.start - p) : row.end - p]
            if part:
                segments.append(Segment(blanks(part), style))
            p += len(text)
            i += 1
        yield segments
