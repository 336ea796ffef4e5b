"""What may be typed next: commands with what they do, above the prompt."""

from __future__ import annotations

from rich.cells import cell_len
from rich.text import Text
from textual import events
from textual.message import Message
from textual.widget import Widget

from glmchat.tui.commands import Command, summary, usage
from glmchat.tui.theme import PALETTES, Palette

_MOST = 7


class Suggestions(Widget):
    """Shows commands, one of them chosen. Hidden when there is nothing to suggest."""

    class Taken(Message):
        def __init__(self, command: Command) -> None:
            super().__init__()
            self.command = command

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.palette: Palette = PALETTES["dark"]
        self.commands: list[Command] = []
        self.at = 0
        self.display = False

    @property
    def chosen(self) -> Command | None:
        return self.commands[self.at] if self.commands else None

    def suggest(self, commands: list[Command]) -> None:
        if commands != self.commands:
            self.commands, self.at = commands, 0
        self.display = bool(commands)
        self.styles.height = min(len(commands), _MOST)
        self.refresh()

    def move(self, step: int) -> None:
        if self.commands:
            self.at = (self.at + step) % len(self.commands)
            self.refresh()

    @property
    def _first(self) -> int:
        return max(0, min(self.at - _MOST // 2, len(self.commands) - _MOST))

    def render(self) -> Text:
        p = self.palette
        rows: list[Text] = []
        shown = self.commands[self._first : self._first + _MOST]
        widest = max((cell_len(usage(c)) for c in shown), default=0)
        column = min(widest + 2, max(12, self.size.width // 2))
        for index, command in enumerate(shown, self._first):
            on = index == self.at
            row = Text.assemble(("▸ " if on else "  ", p.accented))
            row.append(f"/{command.name}", p.accented if on else p.body)
            if command.argument:
                row.append(f" {command.argument}", p.quiet)
            row.truncate(column + 1)
            row.append(" " * max(1, column + 2 - row.cell_len))
            row.append(summary(command), p.body if on else p.quiet)
            row.truncate(max(1, self.size.width), overflow="ellipsis")
            rows.append(row)
        return Text("\n").join(rows)

    def on_click(self, event: events.Click) -> None:
        index = self._first + event.y
        if index < len(self.commands):
            self.post_message(self.Taken(self.commands[index]))
