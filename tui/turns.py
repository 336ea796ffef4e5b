"""What the transcript shows, turn by turn, and where each turn's lines come from.

A turn is laid out in pieces (a block, a part of a long block, a header). A piece is drawn when it comes into view and
keeps its lines; until then its height is an estimate. So a resize, or a conversation of thousands of messages, costs
what is visible.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style

from glmchat.core.language import tr
from glmchat.core.text import show_controls
from glmchat.tui.blocks import Block, BlockSplitter
from glmchat.tui.markdown import Line, draw, text_lines
from glmchat.tui.theme import Palette

FOLD_AFTER = 24  # lines of a question; a longer one is folded
FOLD_TO = 12
KEPT = 1_000  # drawn lines of a turn; a long answer that streams by would otherwise keep all of them
COMPACT_ROWS = 12  # of the view; below, nothing is spent on air
_INDENT = 2

Role = Literal["user", "assistant", "notice", "warning", "error", "rule", "welcome"]
State = Literal["done", "waiting", "streaming"]
_SPACED = ("heading", "code", "table", "rule", "math")


@dataclass(slots=True)
class Turn:
    """One entry. `note` is a quiet line below it ("stopped"); `label` names the speaker; `hint` follows a notice."""

    key: str
    role: Role
    text: str = ""
    label: str = ""
    note: str = ""
    hint: str = ""
    state: State = "done"
    unseen: bool = False  # the model no longer gets it


@dataclass(slots=True)
class Piece:
    """A block with or without an empty line above it, or what `make` draws (a header, a question)."""

    estimate: int
    make: Callable[[], list[Line]] | None = None
    block: Block | None = None
    gap: bool = False
    lines: list[Line] | None = None

    @property
    def height(self) -> int:
        return self.estimate if self.lines is None else len(self.lines)


class TurnLayout:
    """The pieces of one turn at one width and in one palette."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.folded = True
        self.phase = 0  # of the waiting sign
        self._width = 80
        self._palette: Palette | None = None
        self._compact = False
        self._room = 0
        self._splitter: BlockSplitter | None = None
        self._pieces: list[Piece] | None = None
        self._final = 0  # pieces that no further text changes
        self._taken = 0  # blocks of the splitter that have a piece
        self._tops = [0]  # where each piece begins, as far as it is known
        self._drawn: deque[Piece] = deque()  # final pieces that hold their lines, the longest drawn first
        self._kept = 0  # lines in these

    # Size and style

    def fit(self, width: int, palette: Palette, room: int) -> None:
        """Draw for another size or palette from now on. room: rows of the view; few make the drawing compact."""
        compact = room < COMPACT_ROWS
        centred = room if self.turn.role == "welcome" else 0
        if (width, palette, compact, centred) != (self._width, self._palette, self._compact, self._room):
            self._width, self._palette, self._compact, self._room = width, palette, compact, centred
            self.redraw()

    def redraw(self) -> None:
        self._pieces = None
        self._tops = [0]
        self._drawn.clear()
        self._kept = 0
        self._final = self._taken = 0

    @property
    def height(self) -> int:
        if self._pieces is None and self.turn.role in ("user", "assistant"):
            # Not even split yet: two cells of Chinese to a character are forgiven in an estimate.
            lines = self.turn.text.count("\n") + len(self.turn.text) // max(1, self._width - _INDENT) + 4
            return min(lines, FOLD_TO + 4) if self.turn.role == "user" and self.folded else lines
        return self.tops[-1]

    @property
    def tops(self) -> list[int]:
        """Where each piece begins, and the height."""
        pieces, tops = self.pieces, self._tops
        for index in range(len(tops) - 1, len(pieces)):
            tops.append(tops[index] + pieces[index].height)
        return tops

    @property
    def pieces(self) -> list[Piece]:
        if self._pieces is None:
            self._pieces = []
            self._build()
        return self._pieces

    @property
    def palette(self) -> Palette:
        assert self._palette is not None, "fit() comes first"
        return self._palette

    def realise(self, top: int, bottom: int) -> bool:
        """Draw the pieces between two lines of this turn. True if a height changed."""
        tops, pieces = self.tops, self.pieces
        first = index = max(0, bisect_right(tops, top) - 1)
        changed: int | None = None
        while index < len(pieces) and tops[index] < bottom:
            piece = pieces[index]
            if piece.lines is None:
                piece.lines = self.draw(piece)
                if len(piece.lines) != piece.estimate:
                    changed = index if changed is None else changed
                if index < self._final:
                    self._drawn.append(piece)
                    self._kept += len(piece.lines)
            index += 1
        if self._kept > KEPT:
            self._release(pieces[first:index])
        if changed is not None:
            del self._tops[changed + 1 :]
        return changed is not None

    def _release(self, in_view: list[Piece]) -> None:
        """Let go of the lines of pieces that were drawn long ago; they keep their height."""
        seen = {id(piece) for piece in in_view}
        for _ in range(len(self._drawn) // 2):
            piece = self._drawn.popleft()
            if id(piece) in seen:
                self._drawn.append(piece)
            elif piece.lines is not None:
                self._kept -= len(piece.lines)
                piece.estimate, piece.lines = len(piece.lines), None

    def locate(self, y: int) -> tuple[int, int]:
        """Line of the turn -> (piece, line in the piece)."""
        tops = self.tops
        index = min(bisect_right(tops, y) - 1, len(self.pieces) - 1)
        return index, y - tops[index]

    def line(self, piece: int, line: int) -> Line | None:
        lines = self.pieces[piece].lines if 0 <= piece < len(self.pieces) else None
        return lines[line] if lines is not None and 0 <= line < len(lines) else None

    def redraw_tops(self) -> None:
        """A piece was drawn from outside."""
        self._tops = [0]

    # Content

    def feed(self, text: str) -> None:
        """More of a streamed answer."""
        self.turn.text += text
        if self.turn.state == "waiting":
            self.turn.state = "streaming"
            self.redraw()
        if self._splitter is not None:
            self._splitter.feed(text)

    def update(self) -> None:
        """Bring the pieces up to what was fed. Only what is not final is made again."""
        if self._pieces is not None:
            del self._pieces[self._final :]
            del self._tops[self._final + 1 :]
            self._build()

    def finish(self) -> None:
        if self.turn.state != "done":
            if self.turn.state == "waiting":
                self.redraw()  # without its waiting sign
            self.turn.state = "done"
            if self._splitter is not None:
                self._splitter.close()
            self.update()

    def code_of(self, piece: int) -> str:
        """The whole code block that a piece belongs to."""
        block = self.pieces[piece].block
        if block is None:
            return ""
        parts = [p.block for p in self.pieces if p.block is not None and p.block.first is block.first]
        return "\n".join(part.text for part in parts)

    def code_blocks(self) -> list[str]:
        firsts = [
            i for i, p in enumerate(self.pieces) if p.block is not None and p.block.kind == "code" and not p.block.part
        ]
        return [self.code_of(index) for index in firsts]

    # Drawing

    def _build(self) -> None:
        assert self._pieces is not None
        match self.turn.role:
            case "assistant":
                self._build_answer(self._pieces)
            case "user":
                self._pieces.append(Piece(3, self._question))
            case "rule":
                self._pieces.append(Piece(3, self._rule))
            case "welcome":
                self._pieces.append(Piece(8, self._welcome))
            case _:
                self._pieces.append(Piece(2, self._notice))

    def _build_answer(self, pieces: list[Piece]) -> None:
        if not pieces:
            pieces.append(Piece(1, self._header))
            self._final = 1
        if self._splitter is None:
            self._splitter = BlockSplitter()
            self._splitter.feed(self.turn.text)
            if self.turn.state == "done":
                self._splitter.close()
        before = self._splitter.blocks[self._taken - 1] if self._taken else None
        for block in self._splitter.blocks[self._taken :]:
            pieces.append(self._piece(block, before))
            before = block
        self._taken = len(self._splitter.blocks)
        self._final = len(pieces)
        for block in self._splitter.tail():
            pieces.append(self._piece(block, before))
            before = block
        pieces.append(Piece(1, self._footer))

    def _piece(self, block: Block, before: Block | None) -> Piece:
        width = max(1, self._width - _INDENT)
        gap = before is not None and not block.part and _gap(before, block)

        cells = sum(len(line) // width + 1 for line in block.lines)
        return Piece(cells + gap + (block.kind == "code"), block=block, gap=gap)

    def draw(self, piece: Piece) -> list[Line]:
        if piece.block is None:
            return piece.make() if piece.make is not None else []
        margin = Segment(" " * _INDENT, self.palette.body)
        drawn = draw(piece.block, max(1, self._width - _INDENT), self.palette)
        lines = [line.after(margin, "") for line in drawn]
        return [Line([], 0, ""), *lines] if piece.gap else lines

    def _header(self) -> list[Line]:
        p = self.palette
        ink = p.quiet if self.turn.unseen else p.accented
        label = [
            Segment("● ", ink),
            Segment(set_cell_size(self.turn.label, min(cell_len(self.turn.label), self._width - 2)), p.quiet),
        ]
        lines = [Line(label, self._width, "", "")]
        if self.turn.state == "waiting":
            dots = "".join("•" if i == self.phase % 3 else "·" for i in range(3))
            lines.append(Line([Segment(f"  {dots}", p.quiet)], self._width, "", ""))
        return lines

    def _footer(self) -> list[Line]:
        if not self.turn.note:
            return [Line([], 0, "")]
        drawn = text_lines(show_controls(self.turn.note), max(1, self._width - _INDENT), self.palette.quiet)
        margin = Segment(" " * _INDENT, self.palette.body)
        return [
            *([] if self._compact else [Line([], 0, "")]),
            *(Line([margin, *line.segments], self._width, "", "") for line in drawn),
            Line([], 0, ""),
        ]

    def _question(self) -> list[Line]:
        p = self.palette
        ink = p.question if not self.turn.unseen else p.style(p.muted, p.surface)
        text = show_controls(self.turn.text.replace("\r\n", "\n").replace("\r", "\n")).strip("\n")
        inner = max(1, self._width - _INDENT - 1)
        drawn = text_lines(text, inner, ink)
        bar = Segment("▌ ", p.question_bar)
        lines: list[Line] = []
        hidden = len(drawn) - FOLD_TO if len(drawn) > FOLD_AFTER and self.folded else 0
        for line in drawn[: len(drawn) - hidden]:
            fill = Segment(" " * (self._width - _INDENT - sum(s.cell_length for s in line.segments)), ink)
            lines.append(Line([bar, *line.segments, fill], 2, line.text, line.joint))
        if len(drawn) > FOLD_AFTER:
            words = tr("… {n} more lines (click or Enter to unfold)", n=hidden) if hidden else tr("fold again")
            words = set_cell_size(words, self._width - _INDENT)
            quiet = p.style(p.muted, p.surface, dim=not p.muted)
            lines.append(Line([bar, Segment(words, quiet)], self._width, "", "", "", (0, self._width, "fold", "")))
        if p.surface and not self._compact:
            edge = Style(color=p.surface, bgcolor=p.background or None)
            corner = Style(color=p.surface, bgcolor=p.background or None)
            rest = max(0, self._width - 1)
            # Half rows above and below make the panel breathe without costing a line of text each.
            lines.insert(0, Line([Segment("▄", corner), Segment("▄" * rest, edge)], self._width, "", ""))
            lines.append(Line([Segment("▀", corner), Segment("▀" * rest, edge)], self._width, "", ""))
        else:
            lines.append(Line([], 0, ""))
        if self.turn.note:
            lines.append(
                Line(
                    [Segment("  " + set_cell_size(self.turn.note, max(0, self._width - 2)), p.quiet)],
                    self._width,
                    "",
                    "",
                )
            )
        return lines

    def _rule(self) -> list[Line]:
        p = self.palette
        label = f" {self.turn.text} " if self.turn.text else ""
        if cell_len(label) > self._width - 4:
            label = set_cell_size(label, max(0, self._width - 4))
        side = (self._width - cell_len(label)) // 2
        line = p.style(p.border or p.faint, dim=not p.border)
        rest = self._width - side - cell_len(label)
        segments = [Segment("─" * side, line), Segment(label, p.quiet), Segment("─" * rest, line)]
        return [Line([], 0, ""), Line(segments, self._width, "", ""), Line([], 0, "")]

    def _notice(self) -> list[Line]:
        p = self.palette
        sign, color = {"warning": ("▲", p.warning), "error": ("■", p.error)}.get(self.turn.role, ("·", p.muted))
        ink = p.style(color, bold=self.turn.role == "error") if self.turn.role != "notice" else p.quiet
        width = max(1, self._width - _INDENT)
        mark, blank = Segment(f"{sign} ", ink), Segment("  ", p.body)
        drawn = text_lines(show_controls(self.turn.text), width, p.body if self.turn.role != "notice" else p.quiet)
        lines = [line.after(blank if index else mark, "") for index, line in enumerate(drawn)]
        if self.turn.hint:
            lines += [line.after(blank, "") for line in text_lines(show_controls(self.turn.hint), width, p.quiet)]
        return [*lines, Line([], 0, "")]

    def _welcome(self) -> list[Line]:
        """The empty conversation: a name, the model, the keys worth knowing. `text` holds "key<tab>what" lines."""
        p = self.palette
        entries = [line.partition("\t")[::2] for line in self.turn.text.split("\n") if line]
        keys = max((cell_len(key) for key, _ in entries), default=0)
        body = [
            [Segment(key + " " * (keys - cell_len(key) + 3), p.accented), Segment(what, p.quiet)]
            for key, what in entries
        ]
        title = [Segment("● ", p.accented), Segment("glmchat", p.strong)]
        if self.turn.label:
            title.append(Segment(f"  {self.turn.label}", p.quiet))
        rows = [title, [], *body] if not self._compact else [title, *body]
        widest = max(sum(s.cell_length for s in row) for row in rows)
        side = max(0, (self._width - widest) // 2)
        found = [Line([Segment(" " * side, p.body), *row], self._width, "", "") for row in rows]
        if self.turn.hint:
            found.append(Line([], 0, ""))
            found += [
                line.after(Segment(" " * side, p.body), "")
                for line in text_lines(self.turn.hint, max(8, widest), p.quiet)
            ]
        above = max(0, (self._room - len(found)) * 2 // 5)  # a little above the middle looks like the middle
        return [*[Line([], 0, "")] * above, *found, Line([], 0, "")]


def _gap(before: Block, block: Block) -> bool:
    """Does an empty line stand between two blocks? As it was written, and always around what needs air."""
    if block.gap:
        return True
    if before.kind == "heading":
        return False
    return block.kind in _SPACED or before.kind in _SPACED or (before.kind == "item") != (block.kind == "item")
