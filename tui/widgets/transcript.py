"""The transcript: one scrolling view of lines, whatever the conversation's length.

Not made of widgets: it owns scrolling, selection, folding and search hits itself (HOUSE.md has the measurements). Text
that streams in is gathered and drawn twenty times a second; only the block that is still open is drawn again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import ClassVar, NamedTuple

from rich.cells import cell_len, split_graphemes
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.timer import Timer

from glmchat.tui.markdown import Line
from glmchat.tui.theme import PALETTES, Palette
from glmchat.tui.turns import Role, Turn, TurnLayout

MEASURE = 104  # cells; longer lines of prose are hard to read
_TICK = 1 / 20


class Position(NamedTuple):
    """A cell of the content; ordered as one reads."""

    turn: int
    piece: int
    line: int
    cell: int


class Hit(NamedTuple):
    """An occurrence of the searched text: cells of one line."""

    start: int
    end: int


class Clicked(Message):
    """Something clickable was clicked: "copy-code" with the code as argument, "open-link" with the target."""

    def __init__(self, name: str, key: str, argument: str) -> None:
        super().__init__()
        self.name, self.key, self.argument = name, key, argument


class Transcript(ScrollView, can_focus=True):
    """Shows turns. `feed` and `finish` stream into one; the view stays at the end unless it was scrolled up."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("home", "go_top", show=False),
        Binding("end", "go_end", show=False),
        Binding("pageup", "page_up", show=False),
        Binding("pagedown", "page_down", show=False),
    ]
    ALLOW_SELECT = False  # our own selection knows wrapped lines and decoration

    class Selected(Message):
        """Text was selected with the mouse."""

    class CurrentChanged(Message):
        """Another turn is the current one (or none)."""

    def __init__(self, palette: Palette | None = None, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._palette = palette or PALETTES["dark"]
        self._layouts: list[TurnLayout] = []
        self._index: dict[str, int] = {}
        self._tops: list[int] = [0]
        self._follow = True
        self._moving = False  # we scroll, not the user
        self._dirty: set[str] = set()
        self._timer: Timer | None = None
        self._ticks = 0
        self._anchor: Position | None = None  # where a selection began
        self._selection: tuple[Position, Position] | None = None
        self._drag = False
        self._query = ""
        self._current: str | None = None

    # Content

    @property
    def turns(self) -> list[Turn]:
        return [layout.turn for layout in self._layouts]

    def layout_of(self, key: str) -> TurnLayout | None:
        index = self._index.get(key)
        return None if index is None else self._layouts[index]

    def show(self, turns: Iterable[Turn], *, at_end: bool = True) -> None:
        """Replace everything; the view goes to the end, or stays where it is."""
        self._layouts = [TurnLayout(turn) for turn in turns]
        self._selection = None
        if self._current is not None:
            self._current = None
            self.post_message(self.CurrentChanged())
        self._follow = at_end
        self._reindex()
        self._arrange()

    def add(self, turn: Turn, *, follow: bool = True) -> None:
        """Append a turn. follow: scroll to it even if the view was scrolled up (a person has just sent it)."""
        self._layouts.append(TurnLayout(turn))
        self._index[turn.key] = len(self._layouts) - 1
        self._follow = self._follow or follow
        self._arrange()
        self._wake()

    def drop(self, *keys: str) -> None:
        self._layouts = [layout for layout in self._layouts if layout.turn.key not in keys]
        self._selection = None
        self._reindex()
        self._arrange()

    def insert(self, index: int, turn: Turn) -> None:
        """Put a turn before the one at `index`."""
        self._layouts.insert(index, TurnLayout(turn))
        self._selection = None
        self._reindex()
        self._arrange()

    def rename(self, key: str, new: str) -> None:
        """A turn gets its lasting key."""
        if (layout := self.layout_of(key)) is not None:
            layout.turn.key = new
            self._reindex()

    def change(self, key: str, **changes: object) -> None:
        """Set attributes of a turn and draw it again. An unknown key is ignored: the turn was removed meanwhile."""
        if (layout := self.layout_of(key)) is None:
            return
        for name, value in changes.items():
            setattr(layout.turn, name, value)
        layout.redraw()
        self._arrange()

    def feed(self, key: str, text: str) -> None:
        """More of an answer. Drawn at the next tick."""
        if (layout := self.layout_of(key)) is not None:
            layout.feed(text)
            self._dirty.add(key)
            self._wake()

    def finish(self, key: str, note: str = "") -> None:
        """The answer is whole."""
        if (layout := self.layout_of(key)) is not None:
            layout.turn.note = note
            layout.finish()
            self._dirty.discard(key)
            self._arrange()

    def last(self, role: Role) -> Turn | None:
        return next((layout.turn for layout in reversed(self._layouts) if layout.turn.role == role), None)

    # Theme and search

    def set_palette(self, palette: Palette) -> None:
        self._palette = palette
        self._arrange()

    def search(self, query: str) -> int:
        """Highlight every occurrence; the number of turns that hold it. "" ends the search."""
        self._query = query.casefold().strip()
        self.refresh()
        return len(self._turns_with_hits()) if self._query else 0

    def _turns_with_hits(self) -> list[int]:
        return [i for i, layout in enumerate(self._layouts) if self._query in layout.turn.text.casefold()]

    def go_to_hit(self, step: int) -> None:
        """Scroll to the next (1) or previous (-1) turn with a hit, around the end."""
        hits = self._turns_with_hits() if self._query else []
        if hits:
            here = self._index.get(self._current or "", len(self._layouts) if step < 0 else -1)
            further = [i for i in hits if (i - here) * step > 0]
            target = (further or (hits if step > 0 else hits[::-1]))[0] if step > 0 else (further or hits)[-1]
            self.make_current(self._layouts[target].turn.key)

    # The current turn (keyboard)

    @property
    def current(self) -> Turn | None:
        layout = self.layout_of(self._current) if self._current else None
        return layout.turn if layout else None

    def make_current(self, key: str | None) -> None:
        self._current = key
        if key is not None and (index := self._index.get(key)) is not None:
            top, bottom = self._tops[index], self._tops[index + 1]
            height = self.size.height
            if top < self.scroll_offset.y or bottom > self.scroll_offset.y + height:
                self._follow = False
                self._go(top if bottom - top >= height or top < self.scroll_offset.y else bottom - height)
        self.refresh()
        self.post_message(self.CurrentChanged())

    def move_current(self, step: int) -> bool:
        """To the next or previous question or answer. False at the end."""
        speakers = [i for i, layout in enumerate(self._layouts) if layout.turn.role in ("user", "assistant")]
        here = self._index.get(self._current or "", len(self._layouts))
        ahead = [i for i in speakers if (i - here) * step > 0]
        if not ahead:
            return False
        self.make_current(self._layouts[ahead[0] if step > 0 else ahead[-1]].turn.key)
        return True

    def toggle_fold(self, key: str) -> None:
        if (layout := self.layout_of(key)) is not None:
            layout.folded = not layout.folded
            layout.redraw()
            self._follow = False
            self._arrange()

    # Layout

    @property
    def measure(self) -> int:
        """The width of the text, without margins."""
        return max(1, min(MEASURE, self.scrollable_content_region.width - (4 if self.size.width >= 24 else 2)))

    @property
    def margin(self) -> int:
        return max(0, (self.scrollable_content_region.width - self.measure) // 2)

    def _reindex(self) -> None:
        self._index = {layout.turn.key: i for i, layout in enumerate(self._layouts)}

    def _arrange(self) -> None:
        """Bring layouts, virtual size and scroll position into agreement; draw what is in view."""
        if not self.is_mounted or self.size.width < 1 or self.size.height < 1:
            return
        self._moving = True
        try:
            top = None if self._follow else self._place(self.scroll_offset.y)
            for layout in self._layouts:
                layout.fit(self.measure, self._palette, self.size.height)
            self._measure_tops()
            height = self.size.height
            for _ in range(8):  # drawing changes heights, which changes what is in view
                if self._follow or top is None:
                    y = max(0, self._tops[-1] - height)
                else:
                    y = min(self._y_of(top), max(0, self._tops[-1] - height))
                if not self._realise(y, y + height):
                    break
            self.virtual_size = Size(self.size.width - self.scrollbar_size_vertical, self._tops[-1])
            self.scroll_to(y=y, animate=False, force=True)
        finally:
            self._moving = False
        self.refresh()

    def _measure_tops(self) -> None:
        self._tops = list(accumulate((layout.height for layout in self._layouts), initial=0))

    def _realise(self, top: int, bottom: int) -> bool:
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
            self._measure_tops()
        return changed

    def _place(self, y: int) -> Position | None:
        """What stands at line `y`."""
        if not self._layouts or y >= self._tops[-1]:
            return None
        index = min(bisect_right(self._tops, y) - 1, len(self._layouts) - 1)
        piece, line = self._layouts[index].locate(y - self._tops[index])
        return Position(index, piece, line, 0)

    def _y_of(self, place: Position) -> int:
        if place.turn >= len(self._layouts):
            return self._tops[-1]
        layout = self._layouts[place.turn]
        tops = layout.tops
        piece = min(place.piece, len(tops) - 1)
        return self._tops[place.turn] + min(tops[piece] + place.line, tops[-1])

    # Scrolling

    def _go(self, y: int) -> None:
        self.scroll_to(y=max(0, y), animate=False, force=True)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        if self._moving or not self.is_mounted:
            return
        self._follow = round(new_value) >= self.max_scroll_y
        y = round(new_value)
        if self._realise(y, y + self.size.height):
            # Something in view was not as high as estimated: put the same text back at the top.
            self._arrange()

    def on_resize(self, event: events.Resize) -> None:
        self._arrange()

    def on_mount(self) -> None:
        self._refresh_scrollbars()
        self._timer = self.set_interval(_TICK, self._tick, pause=True)
        self._arrange()

    def action_go_top(self) -> None:
        self._go(0)

    def action_go_end(self) -> None:
        self._follow = True
        self._arrange()

    def scroll_page(self, pages: float) -> None:
        self._go(self.scroll_offset.y + round(pages * max(1, self.size.height - 2)))

    def action_page_up(self) -> None:
        self.scroll_page(-1)

    def action_page_down(self) -> None:
        self.scroll_page(1)

    # Streaming

    def _wake(self) -> None:
        if self._timer is not None:
            self._timer.resume()

    def _tick(self) -> None:
        self._ticks += 1
        busy = False
        for key in list(self._dirty):
            if (layout := self.layout_of(key)) is not None:
                layout.update()
        moved = bool(self._dirty)
        self._dirty.clear()
        for layout in self._layouts[-2:]:
            if layout.turn.state == "waiting":
                busy = True
                if self._ticks % 6 == 0 and self.app.animation_level != "none":
                    layout.phase += 1
                    layout.redraw()
                    moved = True
            busy = busy or layout.turn.state == "streaming"
        if moved:
            self._arrange()
        if not busy and self._timer is not None:
            self._timer.pause()

    # Drawing

    def render_line(self, y: int) -> Strip:
        width = self.size.width
        blank = self._palette.body
        place = self._place(self.scroll_offset.y + y)
        if place is None:
            return Strip.blank(width, blank)
        layout = self._layouts[place.turn]
        line = layout.line(place.piece, place.line)
        if line is None:
            return Strip.blank(width, blank)
        margin = self.margin
        current = layout.turn.key == self._current
        head = Segment(
            "┃".rjust(margin) if current and margin else " " * margin, self._palette.accented if current else blank
        )
        segments = line.segments
        for start, end, style in self._overlays(place, line):
            segments = _painted(segments, start, end, style)
        strip = Strip([head, *segments]).adjust_cell_length(width, blank)
        if y == self.size.height - 1 and not self._follow and self.max_scroll_y > self.scroll_offset.y:
            sign = Segment(" ↓ End ", self._palette.style(self._palette.accent, self._palette.surface, bold=True))
            strip = Strip.join(
                [strip.crop(0, max(0, width - 9)), Strip([sign]), strip.crop(width - 2, width)]
            ).adjust_cell_length(width, blank)
        return strip

    def _overlays(self, place: Position, line: Line) -> Iterator[tuple[int, int, Style]]:
        if self._query and line.text:
            for hit in _hits(line, self._query):
                yield hit.start, hit.end, self._palette.found
        if self._selection is not None:
            first, last = self._selection
            here = (place.turn, place.piece, place.line)
            if first[:3] <= here <= last[:3]:
                start = first.cell if here == first[:3] else 0
                end = last.cell if here == last[:3] else line.lead + cell_len(line.text)
                start = max(start, line.lead)
                if end > start:
                    yield start, end, self._palette.selected

    # Mouse

    def _position(self, event: events.MouseEvent) -> Position | None:
        y = self.scroll_offset.y + event.y
        if y < 0:
            return Position(0, 0, 0, 0)
        place = self._place(y)
        if place is None:
            if not self._layouts:
                return None
            last = self._layouts[-1]
            return Position(len(self._layouts) - 1, len(last.pieces) - 1, 1_000_000, 0)
        return place._replace(cell=max(0, event.x - self.margin))

    def on_mouse_down(self, event: events.MouseDown) -> None:
        if event.button != 1:
            return
        self._selection = None
        self._anchor = self._position(event)
        self._drag = True
        self.capture_mouse()
        self.refresh()

    def on_mouse_move(self, event: events.MouseMove) -> None:
        if not self._drag or self._anchor is None:
            return
        if event.y < 0:
            self._go(self.scroll_offset.y - 1)
        elif event.y >= self.size.height:
            self._go(self.scroll_offset.y + 1)
        here = self._position(event)
        if here is not None and here != self._anchor:
            first, last = sorted((self._anchor, here))
            self._selection = (first, last._replace(cell=last.cell + (last == self._anchor)))
            self.refresh()

    def on_mouse_up(self, event: events.MouseUp) -> None:
        if not self._drag:
            return
        self._drag = False
        self.release_mouse()
        if self._selection is not None:
            self.post_message(self.Selected())
        elif (place := self._position(event)) is not None:
            self._click(place)

    def on_click(self, event: events.Click) -> None:
        """A double click selects a word, a triple click the line."""
        place = self._position(event)
        line = self._line(place) if place else None
        if event.chain < 2 or place is None or line is None:
            return
        if event.chain == 2:
            start, end = _word(line, place.cell)
        else:
            start, end = line.lead, line.lead + cell_len(line.text)
        if end > start:
            self._selection = (place._replace(cell=start), place._replace(cell=end))
            self.post_message(self.Selected())
            self.refresh()

    def _click(self, place: Position) -> None:
        line = self._line(place)
        layout = self._layouts[place.turn]
        if line is None:
            return
        if line.action and line.action[0] <= place.cell < line.action[1]:
            name = line.action[2]
            if name == "fold":
                self.toggle_fold(layout.turn.key)
                return
            argument = layout.code_of(place.piece) if name == "copy-code" and not line.action[3] else line.action[3]
            self.post_message(Clicked(name, layout.turn.key, argument))
        elif link := _link_at(line, place.cell):
            self.post_message(Clicked("open-link", layout.turn.key, link))
        elif layout.turn.role in ("user", "assistant"):
            self.make_current(layout.turn.key if self._current != layout.turn.key else None)

    def _line(self, place: Position) -> Line | None:
        return self._layouts[place.turn].line(place.piece, place.line)

    # Copying

    def clear_selection(self) -> None:
        self._selection = None
        self.refresh()

    @property
    def selected_text(self) -> str:
        """What the selection says: wrapped lines joined again, without bars, borders and padding."""
        if self._selection is None:
            return ""
        first, last = self._selection
        parts: list[str] = []
        joint = "\n"
        for place, line in self._lines_between(first, last):
            lead = line.lead
            start = first.cell - lead if place[:3] == first[:3] else 0
            end = last.cell - lead if place[:3] == last[:3] else cell_len(line.text)
            if not line.text and line.lead and not line.joint:
                continue  # decoration
            mark = line.mark if joint == "\n" and start <= 0 else ""
            if parts:
                parts.append(joint)
            parts.append(mark + _cut(line.text, max(0, start), end))
            joint = line.joint
        return "".join(parts).strip("\n")

    def _lines_between(self, first: Position, last: Position) -> Iterator[tuple[Position, Line]]:
        for t in range(first.turn, min(last.turn + 1, len(self._layouts))):
            layout = self._layouts[t]
            for p, piece in enumerate(layout.pieces):
                if (t, p) < first[:2] or (t, p) > last[:2]:
                    continue
                if piece.lines is None:
                    piece.lines = layout.draw(piece)
                    layout.redraw_tops()
                for i, line in enumerate(piece.lines):
                    if first[:3] <= (t, p, i) <= last[:3]:
                        yield Position(t, p, i, 0), line


def _cut(text: str, start: int, end: int) -> str:
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


def _hits(line: Line, query: str) -> Iterator[Hit]:
    text = line.text.casefold()
    if len(text) != len(line.text):  # folding changed lengths (ß): look for the text as it stands
        text = line.text
    at = text.find(query)
    while at >= 0:
        start = line.lead + cell_len(line.text[:at])
        yield Hit(start, start + cell_len(line.text[at : at + len(query)]))
        at = text.find(query, at + len(query))


def _painted(segments: list[Segment], start: int, end: int, style: Style) -> list[Segment]:
    strip = Strip(segments)
    before, middle, after = strip.crop(0, start), strip.crop(start, end), strip.crop(end, strip.cell_length)
    return [*before, *(Segment(s.text, (s.style or Style()) + style) for s in middle), *after]


def _word(line: Line, cell: int) -> tuple[int, int]:
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
    if words[index][2].isalnum() or words[index][2] == "_":
        while first > 0 and (words[first - 1][2].isalnum() or words[first - 1][2] == "_"):
            first -= 1
        while last + 1 < len(words) and (words[last + 1][2].isalnum() or words[last + 1][2] == "_"):
            last += 1
    return words[first][0], words[last][1]


def _link_at(line: Line, cell: int) -> str:
    position = 0
    for segment in line.segments:
        position += segment.cell_length
        if cell < position:
            return (segment.style and segment.style.link) or ""
    return ""
