"""What may be typed next: commands with what they do, or names, above the prompt."""

from __future__ import annotations

from rich.cells import cell_len
from rich.text import Text
from textual import events
from textual.message import Message
from textual.widget import Widget

from glmchat.tui.completing import Suggestion
from glmchat.tui.theme import PALETTES, Palette

_MOST = 7


class Suggestions(Widget):
    """Shows suggestions, one of them chosen. Hidden when there is nothing to suggest."""

    class Taken(Message):
        def __init__(self, suggestion: Suggestion) -> None:
            super().__init__()
            self.suggestion = suggestion

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.palette: Palette = PALETTES["dark"]
        self.found: list[Suggestion] = []
        self.at = 0
        self.display = False

    @property
    def chosen(self) -> Suggestion | None:
        return self.found[self.at] if self.found else None

    def suggest(self, found: list[Suggestion]) -> None:
        if found != self.found:
            self.found, self.at = found, 0
        self.display = bool(found)
        self.styles.height = min(len(found), _MOST)
        self.refresh()

    def move(self, step: int) -> None:
        if self.found:
            self.at = (self.at + step) % len(self.found)
            self.refresh()

    @property
    def _first(self) -> int:
        return max(0, min(self.at - _MOST // 2, len(self.found) - _MOST))

    def render(self) -> Text:
        p = self.palette
        rows: list[Text] = []
        shown = self.found[self._first : self._first + _MOST]
        widest = max((cell_len(f"{s.shown} {s.argument}".rstrip()) for s in shown), default=0)
        column = min(widest + 2, max(12, self.size.width // 2))
        for index, one in enumerate(shown, self._first):
            on = index == self.at
            row = Text.assemble(("▸ " if on else "  ", p.accented))
            row.append(one.shown, p.accented if on else p.body)
            if one.argument:
                row.append(f" {one.argument}", p.quiet)
            row.truncate(column + 1)
            row.append(" " * max(1, column + 2 - row.cell_len))
            row.append(one.summary, p.body if on else p.quiet)
            row.truncate(max(1, self.size.width), overflow="ellipsis")
            rows.append(row)
        return Text("\n").join(rows)

    def on_click(self, event: events.Click) -> None:
        index = self._first + event.y
        if index < len(self.found):
            self.post_message(self.Taken(self.found[index]))
