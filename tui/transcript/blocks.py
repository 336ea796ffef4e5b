"""Markdown in pieces: a stream of text becomes a list of blocks, each final as soon as the next one begins.

The splitter reads lines, so the blocks do not depend on how the text was cut into pieces, and a whole text is split in
one linear pass. It decides only where blocks begin and end (CommonMark's block structure, GitHub's tables); what stands
in a block is `markdown.py`'s matter. Long blocks are split so that nothing on the screen is ever rendered as a whole:
code after 64 lines, tables after 64 rows, text after 8,000 characters.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from typing import Literal

from glmchat.core.text import show_controls

CHUNK_LINES = 64
CHUNK_CHARACTERS = 8_000

Kind = Literal["text", "heading", "rule", "code", "table", "item", "quote", "math", "plain"]

_FENCE = re.compile(r"^( {0,3})(`{3,}(?!.*`)|~{3,})[ \t]*(.*)$")
_HEADING = re.compile(r"^ {0,3}#{1,6}(?:[ \t]|$)")
_SETEXT = re.compile(r"^ {0,3}(?:=+|-+)[ \t]*$")
_RULE = re.compile(r"^ {0,3}(?:(?:-[ \t]*){3,}|(?:_[ \t]*){3,}|(?:\*[ \t]*){3,})$")
_ITEM = re.compile(r"^( {0,3})([-*+]|\d{1,9}[.)])(?:([ \t]+)(?=\S)|[ \t]*$)")
_QUOTE = re.compile(r"^ {0,3}>")
_DELIMITER = re.compile(r"^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$")
_INNER_FENCE = re.compile(r"^([ \t]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*)(`{3,}(?!.*`)|~{3,})[ \t]*(.*)$")
_INDENTED = re.compile(r"^(?: {4}| {0,3}\t)")
_MATH = {"$$": "$$", "\\[": "\\]"}


@dataclass(slots=True)
class Block:
    """One block or a part of a long one. `head` is the first part, when this one is a later part.

    before: the lines of the two parts above this one, which say whether code begins inside a string or a comment.
    The later parts of code that stands in an item have the item as their head.
    """

    kind: Kind
    lines: list[str] = field(default_factory=list)
    gap: bool = False  # an empty line stood before it
    info: str = ""  # of a code block
    number: int = 0  # of an ordered list's item
    part: int = 0
    last: bool = False  # no further part follows
    growing: bool = False  # not final: `tail()` made it
    head: Block | None = None
    before: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def first(self) -> Block:
        return self.head or self


class BlockSplitter:
    """Feed text in any pieces. `blocks` are final; `tail()` is what the rest looks like now."""

    __slots__ = (
        "_container", "_counted", "_fence", "_fence_indent", "_gap", "_indent", "_indented", "_inner", "_math_end",
        "_open", "_partial", "_size", "blocks", "last",
    )  # fmt: skip

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.last: Kind | None = None  # kind of the newest final block, also if another splitter made it
        self._counted = 0  # the number of that block, if it is an item of an ordered list
        self._partial = ""  # the line that has not ended yet
        self._open: Block | None = None
        self._gap = False
        self._fence = ""  # the marker that opened the code block we are in
        self._fence_indent = 0
        self._container = 0  # blanks before everything in that code block, where it began in an item
        self._indented = False  # the open block is code by its indentation
        self._indent = 0  # of the open item's content
        self._inner: re.Match[str] | None = None  # the line that opened a code block in the open item
        self._math_end = ""
        self._size = 0  # characters in the open block

    def feed(self, text: str) -> None:
        """More of the source. Control characters are drawn from here on, never obeyed."""
        text = self._partial + text
        # A carriage return may be half of a line end: it waits for what follows.
        held = "\r" if text.endswith("\r") else ""
        text = text[: len(text) - len(held)].replace("\r\n", "\n")
        *lines, rest = text.split("\n")
        for line in lines:
            self._line(_shown(line))
        while len(rest) > CHUNK_CHARACTERS:
            self._line(_shown(rest[:CHUNK_CHARACTERS]), forced=True)
            rest = rest[CHUNK_CHARACTERS:]
        self._partial = rest + held

    def close(self) -> None:
        """No more text: the rest becomes final."""
        if self._partial:
            partial, self._partial = self._partial, ""
            self._line(_shown(partial))
        self._end()

    def fork(self) -> BlockSplitter:
        """Another splitter that goes on from here; its `blocks` are those that come from now on."""
        fork = copy.copy(self)
        fork.blocks = []
        if self._open is not None:
            fork._open = copy.copy(self._open)
            fork._open.lines = list(self._open.lines)
        return fork

    def tail(self) -> list[Block]:
        """The blocks of what is not final yet, as if the text ended here. The splitter is left as it is."""
        if not self._partial and self._open is None:
            return []
        ahead = self.fork()
        if self._fence and self._partial.strip(" ") in (self._fence[:1], self._fence[:2], self._fence):
            ahead._partial = ""  # the closing fence is on its way, it is not code
        ahead.close()
        for block in ahead.blocks:
            block.growing = True
        return ahead.blocks

    # One line at a time

    def _line(self, line: str, forced: bool = False) -> None:
        block = self._open
        if self._fence:
            self._in_fence(line)
        elif block is not None and block.kind == "math":
            self._in_math(line)
        elif block is not None and block.kind == "item" and self._inner and self._size >= CHUNK_CHARACTERS:
            self._spill(block, self._inner, line)
        elif forced or len(line) > CHUNK_CHARACTERS:
            self._end()
            self._long(line)
        elif block is not None and self._continues(block, line):
            self._add(line)
        else:
            self._end()
            self._begin(line)

    def _continues(self, block: Block, line: str) -> bool:
        blank = not line.strip()
        match block.kind:
            case "text":
                if blank:
                    return False
                if (
                    len(block.lines) == 1
                    and _DELIMITER.match(line)
                    and "|" in block.lines[0]
                    and _same_width(block.lines[0], line)
                ):
                    block.kind = "table"
                    return True
                if _SETEXT.match(line):
                    block.last = True
                    return True
                if block.last:  # the underline of a heading ended it
                    return False
                item = _ITEM.match(line)
                # Only an item that has text, and 1 if it counts, interrupts a paragraph (CommonMark 5.3).
                interrupts = item and item[3] and (not item[2][:-1].isdigit() or item[2][:-1] == "1")
                return not (
                    interrupts or _HEADING.match(line) or _FENCE.match(line) or _QUOTE.match(line)
                    or _RULE.match(line) or _math(line)
                )  # fmt: skip
            case "plain":
                return not blank and self._size < CHUNK_CHARACTERS and not _FENCE.match(line)
            case "table":
                return not blank and "|" in line and not _FENCE.match(line)
            case "quote":
                return bool(_QUOTE.match(line)) and self._size < CHUNK_CHARACTERS
            case "item":
                return self._in_item(block, line, blank)
            case "code":  # indented: a fenced one is `_in_fence`'s
                return blank or bool(_INDENTED.match(line))
            case _:
                return False

    def _in_item(self, block: Block, line: str, blank: bool) -> bool:
        if self._inner:
            if _closes(line.strip(), self._inner[2]):
                self._inner = None
            return True
        if self._size >= CHUNK_CHARACTERS:
            return False
        if blank:
            return True
        indent = len(line) - len(line.lstrip(" "))
        after_blank = not block.lines[-1].strip()
        inside = indent >= self._indent or (line.startswith("\t") and indent == 0)
        if not inside:
            starts = _ITEM.match(line) or _HEADING.match(line) or _FENCE.match(line) or _QUOTE.match(line)
            if after_blank or starts or _RULE.match(line) or _math(line):
                return False
        self._inner = _INNER_FENCE.match(line)
        return True

    def _spill(self, item: Block, fence: re.Match[str], line: str) -> None:
        """Code that makes an item too long goes on below it, as a part of the same code block."""
        self._end()
        self._fence, self._container = fence[2], len(fence[1].expandtabs(4))
        self._fence_indent = self._container
        self._open = Block("code", info=fence[3].strip(), part=1, head=item)
        self._size = 0
        self._in_fence(line)

    def _begin(self, line: str) -> None:
        if not line.strip():
            self._gap = True
            return
        if fence := _FENCE.match(line):
            self._fence, self._fence_indent, self._container = fence[2], len(fence[1]), 0
            self._new("code", info=fence[3].strip())
        elif _HEADING.match(line):
            self._new("heading", line)
            self._end()
        elif _RULE.match(line):
            self._new("rule", line)
            self._end()
        elif item := _ITEM.match(line):
            digits = item[2][:-1]
            number = int(digits) if digits else 0
            if digits and self._counted:
                number = self._counted + 1  # models write "1." at every item; a list counts
            self._new("item", line, number=number)
            self._indent = len(item[1]) + len(item[2]) + min(len(item[3] or " "), 4)
            self._inner = _INNER_FENCE.match(line)
        elif _QUOTE.match(line):
            self._new("quote", line)
        elif end := _math(line):
            self._new("math", line)
            self._math_end = end
            if end in line.strip()[2:]:
                self._math_end = ""
                self._end()
        elif _INDENTED.match(line):
            self._new("code", _unindented(line))
            self._indented = True
        else:
            self._new("text", line)

    def _in_fence(self, line: str) -> None:
        indent = len(line) - len(line.lstrip(" "))
        if _closes(line.strip(), self._fence) and indent < self._container + 4:
            self._fence = ""
            self._end()
            return
        self._add(line[min(self._fence_indent, indent) :])

    def _in_math(self, line: str) -> None:
        self._add(line)
        if self._math_end in line or len(self._open.lines if self._open else ()) > CHUNK_LINES:
            self._math_end = ""
            self._end()

    def _long(self, line: str) -> None:
        """A line too long for Markdown's inline rules (whose worst case is not linear) is shown as it is."""
        for start in range(0, len(line), CHUNK_CHARACTERS):
            self._new("plain", line[start : start + CHUNK_CHARACTERS])
            self._end()

    # Blocks

    def _new(self, kind: Kind, *lines: str, info: str = "", number: int = 0) -> None:
        self._open = Block(kind, list(lines), gap=self._gap, info=info, number=number)
        self._gap = False
        self._size = sum(map(len, lines))

    def _add(self, line: str) -> None:
        block = self._open
        if block is None:
            self._begin(line)
            return
        block.lines.append(_unindented(line) if self._indented else line)
        self._size += len(line) + 1
        if block.kind in ("code", "table"):
            if len(block.lines) >= CHUNK_LINES or self._size >= 2 * CHUNK_CHARACTERS:
                self._finish(block)
                before = (*block.before[-CHUNK_LINES:], *block.lines)
                self._open = Block(block.kind, info=block.info, part=block.part + 1, head=block.first, before=before)
                self._size = 0
        elif block.kind == "text" and self._size >= 2 * CHUNK_CHARACTERS:
            self._end()

    def _end(self) -> None:
        block, self._open = self._open, None
        if block is None:
            return
        block.last = True
        if (block.kind == "item" and not self._inner) or self._indented:
            while len(block.lines) > 1 and not block.lines[-1].strip():
                block.lines.pop()
                self._gap = True
        self._indented, self._inner = False, None
        self._finish(block)

    def _finish(self, block: Block) -> None:
        self.blocks.append(block)
        self.last, self._counted = block.kind, block.number


def _math(line: str) -> str:
    """The closing sign, if a displayed formula begins here; one with text behind it on its line is no such."""
    stripped = line.strip()
    end = _MATH.get(stripped[:2], "")
    closed = stripped.find(end, 2) if end else -1
    return "" if 0 <= closed < len(stripped) - len(end) else end


def _closes(stripped: str, marker: str) -> bool:
    """Is this the end of a code block that `marker` opened?"""
    return len(stripped) >= len(marker) and stripped == marker[0] * len(stripped)


def _unindented(line: str) -> str:
    """A line of indented code without its indentation."""
    return _INDENTED.sub("", line) if _INDENTED.match(line) else line.lstrip(" ")


def _same_width(header: str, delimiter: str) -> bool:
    return cells(header) == cells(delimiter)


def cells(row: str) -> int:
    """How many cells a table's row has."""
    return len(split_row(row))


def split_row(row: str) -> list[str]:
    """The cells of one row: `\\|` is a bar in a cell, outer bars are decoration."""
    row = row.strip()
    if row.startswith("|"):
        row = row[1:]
    parts: list[str] = []
    current = ""
    escaped = False
    for character in row:
        if character == "|" and not escaped:
            parts.append(current.strip())
            current = ""
        else:
            current = current[:-1] + "|" if character == "|" else current + character
        escaped = character == "\\" and not escaped
    if current.strip():
        parts.append(current.strip())
    return parts


def _shown(line: str) -> str:
    return show_controls(line, keep=frozenset("\t"))
