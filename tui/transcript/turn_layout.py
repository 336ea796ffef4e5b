"""The lines of one turn, of which only those near the view are kept.

A turn is laid out in pieces: a header, each block of the text (`long_text.py`), a footer; or all of it as one. A piece
is drawn when it comes into view. Until then its height is an estimate, and after lines have gone it keeps the height
they had. So a resize, a conversation of thousands of messages, or an answer of a whole book costs what is visible.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right

from rich.segment import Segment

from glmchat.tui.theme import Palette
from glmchat.tui.transcript import turns
from glmchat.tui.transcript.blocks import Block, Kind
from glmchat.tui.transcript.long_text import STRETCH_CHARACTERS, LongText
from glmchat.tui.transcript.markdown import codes, draw
from glmchat.tui.transcript.turns import COMPACT_ROWS, FOLD_TO, INDENT, Look, Turn
from glmchat.tui.transcript.wrapping import Line

MOST_LINES = 1_000  # drawn lines of a turn; a long answer that streams by would otherwise keep all of them
_LONG = 50_000  # characters; a longer text is not split anew for another width before it is looked at
_SPACED = ("heading", "code", "table", "rule", "math")


class TurnLayout:
    """The pieces of one turn at one width and in one palette."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.folded = True  # of a question
        self.phase = 0  # of the waiting sign
        self._look: Look | None = None
        self._heights = array("l")  # of every piece; empty: not laid out yet
        self._tops = array("l", [0])  # where each piece begins, as far as it is known
        self._drawn: dict[int, list[Line]] = {}  # the longest drawn first
        self.drawn_lines = 0  # in these
        self._text: LongText | None = None  # the blocks of an answer
        self._tail: list[Block] = []  # what more text may change
        self._guess: int | None = None  # the height of what is not laid out

    # Size and style

    def fit(self, width: int, palette: Palette, room: int) -> None:
        """Draw for another size or palette from now on. room: rows of the view; few make the drawing compact."""
        look = Look(width, palette, room < COMPACT_ROWS, room if self.turn.role == "welcome" else 0)
        if look == self._look:
            return
        before, self._look = self._look, look
        if before is not None and before.width != width:
            self._wrap_again(before.width)
        self.redraw()

    def _wrap_again(self, before: int) -> None:
        """Another width: other heights. Of a very long text the new ones are guessed from those that were seen."""
        if len(self.turn.text) < _LONG:
            self._forget()
        else:
            self._heights = array("l", (max(1, height * before // self.look.width) for height in self._heights))

    def _forget(self) -> None:
        self._text, self._heights, self._guess = None, array("l"), None
        self._tail.clear()

    def redraw(self) -> None:
        """What was drawn is not right any more."""
        self._tops = array("l", [0])
        self._drawn.clear()
        self.drawn_lines = 0
        if self.turn.role != "assistant":
            self._forget()

    @property
    def look(self) -> Look:
        assert self._look is not None, "fit() comes first"
        return self._look

    # Pieces

    @property
    def is_split(self) -> bool:
        """Whether its text was read yet: an answer far from the view is not."""
        return self._text is not None

    @property
    def height(self) -> int:
        if not self._heights and self.turn.role in ("user", "assistant"):
            return self._guessed()
        return self._all_tops()[-1]

    def _guessed(self) -> int:
        """Of a turn that is not even split yet: two cells of Chinese to a character are forgiven in an estimate."""
        if self._guess is None:
            text = self.turn.text
            lines = text.count("\n") + len(text) // max(1, self.look.width - INDENT) + 4
            self._guess = min(lines, FOLD_TO + 4) if self.turn.role == "user" and self.folded else lines
        return self._guess

    @property
    def count(self) -> int:
        """How many pieces there are."""
        self._lay_out()
        return len(self._heights)

    def top(self, piece: int) -> int:
        """Where a piece begins; of one that is no more, where the turn ends."""
        tops = self._all_tops()
        return tops[min(piece, len(tops) - 1)]

    def _all_tops(self) -> array[int]:
        """Where each piece begins, and the height."""
        self._lay_out()
        heights, tops = self._heights, self._tops
        for index in range(len(tops) - 1, len(heights)):
            tops.append(tops[index] + heights[index])
        return tops

    def realise(self, top: int, bottom: int) -> bool:
        """Draw the pieces between two lines of this turn. True if a height changed."""
        tops = self._all_tops()
        first = index = max(0, bisect_right(tops, top) - 1)
        changed: int | None = None
        while index < len(self._heights) and tops[index] < bottom:
            if index not in self._drawn:
                lines = self._drawn[index] = self._draw(index)
                self.drawn_lines += len(lines)
                if len(lines) != self._heights[index]:
                    self._heights[index] = len(lines)
                    changed = index if changed is None else changed
            index += 1
        if self.drawn_lines > MOST_LINES:
            self._let_go(range(first, index))
        if changed is not None:
            del self._tops[changed + 1 :]
        return changed is not None

    def _let_go(self, in_view: range) -> None:
        """Forget half of the lines, those that were drawn long ago."""
        for piece in [piece for piece in self._drawn if piece not in in_view]:
            self.drawn_lines -= len(self._drawn.pop(piece))
            if self.drawn_lines <= MOST_LINES // 2:
                break

    def locate(self, y: int) -> tuple[int, int]:
        """Line of the turn -> (piece, line in the piece)."""
        tops = self._all_tops()
        index = min(bisect_right(tops, y) - 1, len(self._heights) - 1)
        return index, y - tops[index]

    def line(self, piece: int, line: int) -> Line | None:
        """A line of a piece that is in view."""
        lines = self._drawn.get(piece, ())
        return lines[line] if 0 <= line < len(lines) else None

    def lines(self, piece: int) -> list[Line]:
        """All lines of a piece, in view or not."""
        return self._drawn.get(piece) or self._draw(piece)

    def first_with(self, query: str) -> tuple[int, int] | None:
        """(piece, line) of the first line that holds a casefolded query. Only pieces that may hold it are drawn."""
        for piece in range(self.count):
            here = self._block(piece)
            if here is not None and query not in "\n".join(here[0].lines).casefold():
                continue
            for number, line in enumerate(self.lines(piece)):
                if query in line.text.casefold():
                    return piece, number
            if here is not None:
                return piece, 0  # broken over two lines, or not drawn as it is written
        return None

    # Content

    def feed(self, text: str) -> None:
        """More of a streamed answer; `update` lays it out."""
        self.turn.text += text
        self._guess = None
        if self.turn.state == "waiting":
            self.turn.state = "streaming"
            self.redraw()

    def update(self) -> None:
        """Lay out what was fed. Only what is not final is drawn again."""
        if self._text is not None:
            self._cut(1 + len(self._text))
            self._read()

    def finish(self) -> None:
        """The answer is whole."""
        if self.turn.state != "done":
            if self.turn.state == "waiting":
                self.redraw()  # without its waiting sign
            self.turn.state = "done"
            self.update()

    def _lay_out(self) -> None:
        if self._heights:
            return
        if self.turn.role == "assistant":
            self._text = LongText(self.turn)
            self._heights.append(1)
            self._read()
        else:
            self._heights.append({"user": 2, "rule": 3, "welcome": 8}.get(self.turn.role, 2))

    def _read(self) -> None:
        """Pieces for all blocks of the text that have none yet, and for what stands below the last of them."""
        text = self._text
        assert text is not None
        count = len(text)
        while unread := text.unread:
            text.feed(min(unread, STRETCH_CHARACTERS))
            self._estimate(text, count)
            count = len(text)
        if self.turn.state == "done":
            text.close()
            self._estimate(text, count)
        self._tail = text.tail()
        self._heights.extend(self._likely(block) + 1 for block in self._tail)
        self._heights.append(1)

    def _estimate(self, text: LongText, count: int) -> None:
        for number in range(count, len(text)):
            block = text.block(number)
            self._heights.append(self._likely(block) + _gap(text.before(number), block))

    def _likely(self, block: Block) -> int:
        width = max(1, self.look.width - INDENT)
        return sum(len(line) // width + 1 for line in block.lines) + (block.kind == "code")

    def _cut(self, count: int) -> None:
        """Keep the first pieces only."""
        for piece in [piece for piece in self._drawn if piece >= count]:
            self.drawn_lines -= len(self._drawn.pop(piece))
        del self._heights[count:]
        del self._tops[count + 1 :]

    def _block(self, piece: int) -> tuple[Block, Kind | None] | None:
        """The block of a piece, and of what kind the one above it is. None for header and footer."""
        text, number = self._text, piece - 1
        if text is None or not 0 <= number < len(text) + len(self._tail):
            return None
        if number < len(text):
            return text.block(number), text.before(number)
        at = number - len(text)
        above = self._tail[at - 1].kind if at else (text.block(number - 1).kind if number else None)
        return self._tail[at], above

    def code_of(self, piece: int, number: int = -1) -> str:
        """The whole code that a piece shows a part of; of a piece with several, the one of this number."""
        here = self._block(piece)
        first = piece - here[0].part if here is not None and here[0].kind == "code" else piece
        head = self._block(first)
        pieces = codes(head[0]) if head is not None else []
        if not pieces:
            return ""
        lines = list(pieces[number])
        if number in (-1, len(pieces) - 1):
            for index in range(first + 1, self.count):
                further = self._block(index)
                if further is None or further[0].kind != "code" or not further[0].part:
                    break
                lines += further[0].lines
        return "\n".join(lines)

    # Drawing

    def _draw(self, piece: int) -> list[Line]:
        turn, look = self.turn, self.look
        match turn.role:
            case "assistant":
                return self._draw_answer(piece)
            case "user":
                return turns.question(turn, look, self.folded)
            case "rule":
                return turns.rule(turn, look)
            case "welcome":
                return turns.welcome(turn, look)
            case _:
                return turns.notice(turn, look, self.folded)

    def _draw_answer(self, piece: int) -> list[Line]:
        look = self.look
        here = self._block(piece)
        if here is None:
            return turns.footer(self.turn, look) if piece else turns.header(self.turn, look, self.phase)
        block, above = here
        margin = Segment(" " * INDENT, look.palette.body)
        lines = [line.after(margin, "") for line in draw(block, max(1, look.width - INDENT), look.palette)]
        return [Line([], 0, ""), *lines] if _gap(above, block) else lines


def _gap(above: Kind | None, block: Block) -> bool:
    """Does an empty line stand above a block? As it was written, and always around what needs air."""
    if above is None or block.part:
        return False
    if block.gap:
        return True
    if above == "heading":
        return False
    return block.kind in _SPACED or above in _SPACED or (above == "item") != (block.kind == "item")
