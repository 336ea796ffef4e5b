"""A list whose chosen row is seen: a mark at its left, and a colour behind the whole row, whatever is written in it."""

from __future__ import annotations

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.strip import Strip
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from glmchat.tui.steady import Steady
from glmchat.tui.theme import TURNED, Palette

MARK = "▸ "


class Headed(Option):
    """A row below lines that head a group of them: these are not chosen with it."""

    def __init__(self, heading: Text, row: Text) -> None:
        super().__init__(Text("\n").join((heading, row)))
        self.heading = heading.plain.count("\n") + 1


class Rows(Steady, OptionList):
    """Rows are Rich text with styles of the palette, which paint their own background: the row's goes above them."""

    def _get_left_gutter_width(self) -> int:
        return len(MARK)

    def render_line(self, y: int) -> Strip:
        strip = super().render_line(y)
        number = self.scroll_offset.y + y
        chosen, first = False, False
        if number < len(self._lines):
            index, line = self._lines[number]
            option = self.get_option_at_index(index)
            heading = option.heading if isinstance(option, Headed) else 0
            if line < heading and index == self.highlighted:
                ground = Style(bgcolor=self.app.palette.background or None)  # type: ignore[attr-defined]
                strip = Strip([Segment(text, (style or Style()) + ground, c) for text, style, c in strip])
            chosen, first = index == self.highlighted and line >= heading and bool(strip.text.strip()), line == heading
        plain = next((segment.style for segment in strip if segment.style), Style())
        gutter = Segment(MARK if chosen and first else " " * len(MARK), Style(bgcolor=plain.bgcolor, meta=plain.meta))
        if not chosen:
            return Strip([gutter, *strip], len(MARK) + strip.cell_length)
        palette: Palette = self.app.palette  # type: ignore[attr-defined]
        over = TURNED if self.app.no_color else palette.selected
        ink = Style(color=palette.accent or None, bold=True)
        cells = [Segment(gutter.text, (gutter.style or Style()) + ink + over)]
        hit = palette.hit_style.bgcolor  # what was searched for keeps its ground: its ink is made for that
        for text, style, control in strip:
            own = style or Style()
            cells.append(Segment(text, own if hit and own.bgcolor == hit else own + over, control))
        return Strip(cells, len(MARK) + strip.cell_length)
