"""Questions about the cells of one drawn line: which characters, which word, which link, where a word was found."""

from __future__ import annotations

from collections.abc import Iterator

from rich.cells import cell_len, split_graphemes
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip

from glmchat.tui.transcript.markdown import Line


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
