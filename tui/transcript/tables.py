"""Tables: columns as wide as their text where there is room, cells wrapped where there is not, rows drawn in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style

from glmchat.tui.theme import Palette
from glmchat.tui.transcript.blocks import Block, split_row
from glmchat.tui.transcript.wrapping import Line, Span, rows, slices

Inline = Callable[[str, Palette, Style], list[Span]]
_GAP = 3  # cells between two columns
_LEAST = 4  # a column is never narrower, if its text is not


def table_lines(block: Block, width: int, palette: Palette, inline: Inline) -> list[Line]:
    """The lines of a table or of a later part of one; widths come from the first part, so that all parts agree."""
    head = block.first.lines
    aligns = [_align(cell) for cell in split_row(head[1])] if len(head) > 1 else []
    columns = max(1, len(aligns))
    widths = _fit(_natural(tuple(head), columns, palette, inline), width)
    if not widths:
        return _stacked(block, split_row(head[0])[:columns], columns, width, palette, inline)
    border = palette.style(palette.border or palette.faint)
    lines: list[Line] = []
    for index, source in enumerate(block.lines):
        if not block.part and index == 1:
            rule = "─┼─".join("─" * w for w in widths)
            lines.append(Line([Segment(rule, border)], cell_len(rule), source, "\n"))
            lines[-1].lead = 0
            continue
        style = palette.strong if not block.part and index == 0 else palette.body
        cells = [inline(cell, palette, style) for cell in split_row(source)[:columns]]
        cells += [[] for _ in range(columns - len(cells))]
        drawn = [
            _cell(spans, widths[c], aligns[c] if c < len(aligns) else "left", style) for c, spans in enumerate(cells)
        ]
        height = max(len(cell) for cell in drawn)
        for y in range(height):
            segments: list[Segment] = []
            for c, cell in enumerate(drawn):
                if c:
                    segments.append(Segment(" │ ", border))
                segments.extend(cell[y] if y < len(cell) else [Segment(" " * widths[c], style)])
            text = "".join(segment.text for segment in segments).rstrip().replace("│", "|")
            lines.append(Line(segments, 0, text, "\n"))
    return lines


@lru_cache(maxsize=16)  # each part of a long table, and each row that streams in, asks for the same first part
def _natural(head: tuple[str, ...], columns: int, palette: Palette, inline: Inline) -> list[int]:
    """How wide each column of a table's first part would be."""
    sample = [split_row(line)[:columns] for i, line in enumerate(head) if i != 1]
    styled = [[inline(cell, palette, palette.body) for cell in row] for row in sample]
    return [max([1, *(_cells(row[c]) for row in styled if c < len(row))]) for c in range(columns)]


def _stacked(block: Block, titles: list[str], columns: int, width: int, palette: Palette, inline: Inline) -> list[Line]:
    """A table with more columns than fit side by side: each row as a small list of title and value."""
    lines: list[Line] = []
    for index, source in enumerate(block.lines):
        if not block.part and index < 2:
            continue
        if lines:
            lines.append(Line([Segment("─" * width, palette.style(palette.border or palette.faint))], width, "", ""))
        for column, cell in enumerate(split_row(source)[:columns]):
            title = titles[column] if column < len(titles) else ""
            spans = [(f"{title}: ", palette.quiet), *inline(cell, palette, palette.body)]
            text = "".join(span[0] for span in spans)
            wrapped = rows(text, width)
            lines += [
                Line(segments, 0, text[row.start : row.end], row.joint)
                for row, segments in zip(wrapped, slices(spans, wrapped), strict=True)
            ]
    return lines


def _align(cell: str) -> str:
    if cell.endswith(":"):
        return "center" if cell.startswith(":") else "right"
    return "left"


def _cells(spans: Sequence[Span]) -> int:
    return sum(cell_len(text) for text, _ in spans)


def _fit(natural: list[int], width: int) -> list[int]:
    """Column widths within `width`; wide columns give way first. Empty if there is no room for the columns at all."""
    room = width - _GAP * (len(natural) - 1)
    if sum(natural) <= room:
        return natural
    if sum(min(n, _LEAST) for n in natural) > room:
        return []
    low, high = 1, max(natural)
    while low < high:  # the widest cap under which everything fits
        middle = (low + high + 1) // 2
        if sum(min(n, middle) for n in natural) <= room:
            low = middle
        else:
            high = middle - 1
    widths = [min(n, low) for n in natural]
    spare = room - sum(widths)
    for index, n in enumerate(natural):
        if spare > 0 and widths[index] < n:
            widths[index] += 1
            spare -= 1
    return widths


def _cell(spans: list[Span], width: int, align: str, style: Style) -> list[list[Segment]]:
    """The rows of one cell, each exactly `width` cells wide."""
    text = "".join(span[0] for span in spans)
    wrapped = rows(text, width)
    drawn: list[list[Segment]] = []
    for segments in slices(spans, wrapped):
        free = max(0, width - sum(segment.cell_length for segment in segments))
        left = {"left": 0, "right": free, "center": free // 2}[align]
        drawn.append(
            list(Segment.simplify([Segment(" " * left, style), *segments, Segment(" " * (free - left), style)]))
        )
    return drawn
