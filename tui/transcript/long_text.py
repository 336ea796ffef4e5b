"""Markdown text that may be very long, as blocks: those looked at lately are kept, the others are split again.

An answer of 200,000 tokens has tens of thousands of blocks, of which a reader sees a screenful. A stretch of them is
remembered as the place where it begins in the text and the state of the splitter there: that is enough to have its
blocks again.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol

from glmchat.tui.transcript.blocks import Block, BlockSplitter, Kind

STRETCH_BLOCKS = 64
STRETCH_CHARACTERS = 16_000
KEPT_STRETCHES = 6


class HasText(Protocol):
    """What holds the whole text, so that it is not held twice."""

    text: str


@dataclass(slots=True)
class _Stretch:
    start: int  # in the text
    splitter: BlockSplitter  # as it was there
    first: int  # the number of its first block
    blocks: list[Block] | None  # None: to be split again


class LongText:
    """The blocks of `holder.text`, by number. `feed` follows the holder's text as it grows at its end."""

    def __init__(self, holder: HasText) -> None:
        self._holder = holder
        self._fed = 0
        self._splitter = BlockSplitter()
        # The last stretch is still growing; its list of blocks is the splitter's.
        self._stretches = [_Stretch(0, self._splitter.fork(), 0, self._splitter.blocks)]
        self._recent: dict[int, None] = {}  # stretches that are over and have their blocks, the latest used at the end

    def __len__(self) -> int:
        """Blocks that no further text changes."""
        last = self._stretches[-1]
        return last.first + len(self._splitter.blocks)

    def feed(self, characters: int) -> None:
        """So many more characters of the holder's text, at most STRETCH_CHARACTERS."""
        self._splitter.feed(self._holder.text[self._fed : self._fed + characters])
        self._fed += characters
        last, blocks = self._stretches[-1], self._splitter.blocks
        if len(blocks) >= STRETCH_BLOCKS or (blocks and self._fed - last.start >= STRETCH_CHARACTERS):
            self._use(len(self._stretches) - 1)
            self._splitter.blocks = []
            self._stretches.append(
                _Stretch(self._fed, self._splitter.fork(), last.first + len(blocks), self._splitter.blocks)
            )

    @property
    def unread(self) -> int:
        """Characters of the holder's text that were not fed yet."""
        return len(self._holder.text) - self._fed

    def close(self) -> None:
        """No more text will come."""
        self._splitter.close()

    def tail(self) -> list[Block]:
        """What is not final yet, as blocks."""
        return self._splitter.tail()

    def block(self, number: int) -> Block:
        index = self._stretch_of(number)
        return self._blocks(index)[number - self._stretches[index].first]

    def before(self, number: int) -> Kind | None:
        """Of what kind the block above this one is. None: there is none."""
        stretch = self._stretches[self._stretch_of(number)]
        return stretch.splitter.last if number == stretch.first else self.block(number - 1).kind

    def _stretch_of(self, number: int) -> int:
        return bisect_right(self._stretches, number, key=attrgetter("first")) - 1

    def _blocks(self, index: int) -> list[Block]:
        stretch = self._stretches[index]
        if stretch.blocks is None:
            again = stretch.splitter.fork()
            again.feed(self._holder.text[stretch.start : self._stretches[index + 1].start])
            stretch.blocks = again.blocks
        if index < len(self._stretches) - 1:
            self._use(index)
        return stretch.blocks

    def _use(self, index: int) -> None:
        self._recent.pop(index, None)
        self._recent[index] = None
        if len(self._recent) > KEPT_STRETCHES:
            oldest = next(iter(self._recent))
            del self._recent[oldest]
            self._stretches[oldest].blocks = None
