"""The transcript: one scrolling view of lines, whatever the conversation's length.

Not made of widgets: it owns scrolling, selection, folding and search hits itself (docs/decisions/0004 has the
measurements). Text that streams in is gathered and drawn twenty times a second; only the block that is still open is
drawn again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.timer import Timer

from glmchat.tui.steady import Steady
from glmchat.tui.theme import PALETTES, Palette
from glmchat.tui.transcript.page import Page, Position, Selection, hits, link_at, painted
from glmchat.tui.transcript.turn_layout import TurnLayout
from glmchat.tui.transcript.turns import Role, Turn
from glmchat.tui.transcript.wrapping import Line

MEASURE = 104  # cells; longer lines of prose are hard to read
_TICK = 1 / 20


class Clicked(Message):
    """Something clickable was clicked: "copy-code" with the code as argument, "open-link" with the target."""

    def __init__(self, name: str, key: str, argument: str) -> None:
        super().__init__()
        self.name, self.key, self.argument = name, key, argument


class Transcript(Steady, ScrollView, can_focus=True):
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

    class Resized(Message):
        """The column of the text may be another one."""

    class CurrentChanged(Message):
        """Another turn is the current one (or none)."""

    def __init__(self, palette: Palette | None = None, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._palette = palette or PALETTES["dark"]
        self._page = Page()
        self._follow = True
        self._moving = False  # we scroll, not the user
        self._dirty: set[str] = set()
        self._timer: Timer | None = None
        self._ticks = 0
        self._selection = Selection()
        self._query = ""
        self._current: str | None = None

    # Content

    @property
    def turns(self) -> list[Turn]:
        return [layout.turn for layout in self._page]

    def layout_of(self, key: str) -> TurnLayout | None:
        return self._page.find(key)

    @property
    def is_at_end(self) -> bool:
        """Whether the view follows what is added."""
        return self._follow

    def show(self, turns: Iterable[Turn], *, at_end: bool = True) -> None:
        """Replace everything; the view goes to the end, or stays where it is."""
        self._page = Page(turns)
        self._selection.clear()
        if self._current is not None:
            self._current = None
            self.post_message(self.CurrentChanged())
        self._follow = at_end
        self._arrange()

    def add(self, turn: Turn, *, follow: bool = True) -> None:
        """Append a turn. follow: scroll to it even if the view was scrolled up (a person has just sent it)."""
        if turn.role == "user":
            self._fold_notices()
        self._page.insert(len(self._page), turn)
        self._follow = self._follow or follow
        self._arrange()
        self._wake()

    def _fold_notices(self) -> None:
        """What was said before a question makes room."""
        for layout in self._page:
            if layout.turn.role in ("notice", "warning", "error") and not layout.turn.past:
                layout.turn.past = True
                layout.redraw()

    def drop(self, *keys: str) -> None:
        self._page.drop(keys)
        self._selection.clear()
        self._arrange()

    def insert(self, index: int, turn: Turn) -> None:
        """Put a turn before the one at `index`."""
        self._page.insert(index, turn)
        self._selection.clear()
        self._arrange()

    def rename(self, key: str, new: str) -> None:
        """A turn gets its lasting key."""
        self._page.rename(key, new)

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

    def finish(self, key: str, note: str = "", *, text: str | None = None) -> None:
        """The answer is whole. text: the same text, held elsewhere too; then it is not held twice."""
        if (layout := self.layout_of(key)) is not None:
            layout.turn.note = note
            if text == layout.turn.text:
                layout.turn.text = text
            layout.finish()
            self._dirty.discard(key)
            self._arrange()

    def last(self, role: Role) -> Turn | None:
        return next((turn for turn in reversed(self.turns) if turn.role == role), None)

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
        return [i for i, layout in enumerate(self._page) if self._query in layout.turn.text.casefold()]

    def go_to_hit(self, step: int) -> None:
        """Scroll to the next (1) or previous (-1) turn with a hit, around the end."""
        hits = self._turns_with_hits() if self._query else []
        if hits:
            current = self._page.index(self._current)
            here = current if current is not None else (len(self._page) if step < 0 else -1)
            further = [i for i in hits if (i - here) * step > 0]
            target = (further or (hits if step > 0 else hits[::-1]))[0] if step > 0 else (further or hits)[-1]
            self.show_hit(self._page[target].turn.key)

    def show_hit(self, key: str) -> None:
        """Step onto a turn, and where it is longer than the view to its first line with a hit."""
        self.make_current(key)
        index, height = self._page.index(key), self.size.height
        found = self._page[index].first_with(self._query) if index is not None and self._query else None
        if index is None or found is None:
            return
        place = Position(index, *found, 0)
        for _ in range(4):  # what is drawn on the way may be higher than it was taken for
            y = self._page.y_of(place)
            if self.scroll_offset.y <= y < self.scroll_offset.y + height:
                break
            self._follow = False
            self._go(y - height // 3)

    # The current turn (keyboard)

    @property
    def current(self) -> Turn | None:
        layout = self.layout_of(self._current) if self._current else None
        return layout.turn if layout else None

    def make_current(self, key: str | None) -> None:
        self._current = key
        if (index := self._page.index(key)) is not None:
            top, bottom = self._page.span(index)
            height = self.size.height
            if top < self.scroll_offset.y or bottom > self.scroll_offset.y + height:
                self._follow = False
                self._go(top if bottom - top >= height or top < self.scroll_offset.y else bottom - height)
        self.refresh()
        self.post_message(self.CurrentChanged())

    def move_current(self, step: int) -> bool:
        """To the next or previous question or answer. False at the end."""
        speakers = [i for i, layout in enumerate(self._page) if layout.turn.role in ("user", "assistant")]
        current = self._page.index(self._current)
        here = len(self._page) if current is None else current
        ahead = [i for i in speakers if (i - here) * step > 0]
        if not ahead:
            return False
        self.make_current(self._page[ahead[0] if step > 0 else ahead[-1]].turn.key)
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

    @property
    def air(self) -> int:
        """Rows above a short conversation, which stands near the prompt."""
        return max(0, self.size.height - self._page.height)

    def _arrange(self) -> None:
        """Bring layouts, virtual size and scroll position into agreement; draw what is in view."""
        if not self.is_mounted or self.size.width < 1 or self.size.height < 1:
            return
        self._moving = True
        try:
            top = None if self._follow else self._page.place(self.scroll_offset.y)
            self._page.fit(self.measure, self._palette, self.size.height)
            height = self.size.height
            for _ in range(8):  # drawing changes heights, which changes what is in view
                y = max(0, self._page.height - height)
                if top is not None:
                    y = min(self._page.y_of(top), y)
                if not self._page.realise(y, y + height):
                    break
            self.virtual_size = Size(self.size.width - self.scrollbar_size_vertical, self._page.height)
            self.scroll_to(y=y, animate=False, force=True)
        finally:
            self._moving = False
        self.refresh()

    # Scrolling

    def _go(self, y: int) -> None:
        self.scroll_to(y=max(0, y), animate=False, force=True)

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        super().watch_scroll_y(old_value, new_value)
        if self._moving or not self.is_mounted:
            return
        self._follow = round(new_value) >= self.max_scroll_y
        y = round(new_value)
        if self._page.realise(y, y + self.size.height):
            # Something in view was not as high as estimated: put the same text back at the top.
            self._arrange()

    def on_resize(self, event: events.Resize) -> None:
        self._arrange()
        self.post_message(self.Resized())

    def on_mount(self) -> None:
        self._refresh_scrollbars()
        self._timer = self.set_interval(_TICK, self.tick, pause=True)
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

    def tick(self) -> None:
        """Draw what was fed since the last one."""
        self._ticks += 1
        busy = False
        for key in list(self._dirty):
            if (layout := self.layout_of(key)) is not None:
                layout.update()
        moved = bool(self._dirty)
        self._dirty.clear()
        for layout in list(self._page)[-2:]:
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
        line_number = self.scroll_offset.y + y - self.air
        place = self._page.place(line_number) if line_number >= 0 else None
        if place is None:
            return Strip.blank(width, blank)
        layout = self._page[place.turn]
        line = self._page.line(place)
        if line is None:
            return Strip.blank(width, blank)
        margin = self.margin
        current = layout.turn.key == self._current
        head = Segment(
            "┃".rjust(margin) if current and margin else " " * margin, self._palette.accented if current else blank
        )
        segments = line.segments
        for start, end, style in self._overlays(place, line):
            segments = painted(segments, start, end, style)
        strip = Strip([head, *segments]).adjust_cell_length(width, blank)
        if y == self.size.height - 1 and not self._follow and self.max_scroll_y > self.scroll_offset.y:
            sign = Segment(" ↓ End ", self._palette.style(self._palette.accent, self._palette.surface, bold=True))
            strip = Strip.join(
                [strip.crop(0, max(0, width - 9)), Strip([sign]), strip.crop(width - 2, width)]
            ).adjust_cell_length(width, blank)
        return strip

    def _overlays(self, place: Position, line: Line) -> Iterator[tuple[int, int, Style]]:
        if self._query and line.text:
            for start, end in hits(line, self._query):
                yield start, end, self._palette.hit_style
        if (cells := self._selection.cells(place, line)) is not None:
            yield *cells, self._palette.selected

    # Mouse

    def _position(self, event: events.MouseEvent) -> Position | None:
        y = self.scroll_offset.y + event.y - self.air
        if y < 0:
            return Position(0, 0, 0, 0)
        place = self._page.place(y)
        return self._page.end() if place is None else place._replace(cell=max(0, event.x - self.margin))

    def on_mouse_down(self, event: events.MouseDown) -> None:
        if event.button != 1:
            return
        self._selection.press(self._position(event))
        self.capture_mouse()
        self.refresh()

    def on_mouse_move(self, event: events.MouseMove) -> None:
        if not self._selection.dragging:
            return
        if event.y < 0:
            self._go(self.scroll_offset.y - 1)
        elif event.y >= self.size.height:
            self._go(self.scroll_offset.y + 1)
        if self._selection.drag(self._position(event)):
            self.refresh()

    def on_mouse_up(self, event: events.MouseUp) -> None:
        if not self._selection.dragging:
            return
        self._selection.dragging = False
        self.release_mouse()
        if self._selection.range is not None:
            self.post_message(self.Selected())
        elif (place := self._position(event)) is not None:
            self._click(place)

    def on_click(self, event: events.Click) -> None:
        """A double click selects a word, a triple click the line."""
        place = self._position(event)
        line = self._page.line(place) if place else None
        if event.chain < 2 or place is None or line is None:
            return
        if self._selection.take(place, line, word=event.chain == 2):
            self.post_message(self.Selected())
            self.refresh()

    def _click(self, place: Position) -> None:
        line = self._page.line(place)
        layout = self._page[place.turn]
        if line is None:
            return
        if line.action and line.action[0] <= place.cell < line.action[1]:
            name = line.action[2]
            if name == "fold":
                self.toggle_fold(layout.turn.key)
                return
            argument = line.action[3]
            if name == "copy-code":
                argument = layout.code_of(place.piece, int(argument))
            self.post_message(Clicked(name, layout.turn.key, argument))
        elif link := link_at(line, place.cell):
            self.post_message(Clicked("open-link", layout.turn.key, link))
        elif layout.turn.role in ("user", "assistant"):
            self.make_current(layout.turn.key if self._current != layout.turn.key else None)

    # Copying

    def clear_selection(self) -> None:
        self._selection.clear()
        self.refresh()

    @property
    def selected_text(self) -> str:
        return self._selection.text(self._page)
