"""What may be typed next: commands with what they do, or names, above the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text
from textual import events
from textual.message import Message
from textual.widget import Widget

from glmchat.chat.commands import table
from glmchat.core.text import one_line
from glmchat.tui.steady import Steady
from glmchat.tui.theme import PALETTES, Palette

if TYPE_CHECKING:  # the store's rooms are loaded by the thread that reads it
    from glmchat.chat.compare.columns import StoreNames

_MOST = 7  # rows
_NAMES = 40  # that are suggested at once
_NAMING = ("model", "adapter", "compare")  # commands


@dataclass(frozen=True, slots=True)
class Suggestion:
    """text: what the prompt becomes; shown, argument and summary: how it is listed."""

    text: str
    shown: str
    argument: str = ""
    summary: str = ""


class Suggestions(Steady, Widget):
    """Shows suggestions, one of them chosen. Hidden when there is nothing to suggest."""

    class Taken(Message):
        def __init__(self, suggestion: Suggestion) -> None:
            super().__init__()
            self.suggestion = suggestion

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.palette: Palette = PALETTES["dark"]
        self.offered: list[Suggestion] = []
        self.at = 0
        self.display = False

    @property
    def chosen(self) -> Suggestion | None:
        return self.offered[self.at] if self.offered else None

    def suggest(self, offered: list[Suggestion]) -> None:
        if offered != self.offered:
            self.offered, self.at = offered, 0
        self.display = bool(offered)
        self.styles.height = min(len(offered), _MOST)
        self.refresh()

    def move(self, step: int) -> None:
        if self.offered:
            self.at = (self.at + step) % len(self.offered)
            self.refresh()

    @property
    def _first(self) -> int:
        return max(0, min(self.at - _MOST // 2, len(self.offered) - _MOST))

    def render(self) -> Text:
        p = self.palette
        rows: list[Text] = []
        shown = self.offered[self._first : self._first + _MOST]
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
            row.truncate(max(1, self.size.width), overflow="ellipsis", pad=True)
            if on:
                row.stylize(p.selected)
            rows.append(row)
        return Text("\n").join(rows)

    def on_click(self, event: events.Click) -> None:
        index = self._first + event.y
        if index < len(self.offered):
            self.post_message(self.Taken(self.offered[index]))


def suggestions_for(text: str, names: StoreNames | None) -> list[Suggestion]:
    """For a prompt that holds `text`; empty where nothing is to be completed. names: of the store, as last read."""
    commands = [
        Suggestion(f"/{c.name} " if c.argument else f"/{c.name}", f"/{c.name}", table.argument(c), table.summary(c))
        for c in table.completions(text)
    ]
    return commands or (_names(text, names) if names is not None and wants_names(text) else [])


def wants_names(text: str) -> bool:
    """Whether the last word is a name of the store: behind `/model`, `/adapter` and `/compare`."""
    if not text.startswith("/") or text.startswith("//") or "\n" in text or " " not in text:
        return False
    command = table.BY_NAME.get(text[1:].split(" ", 1)[0].lower())
    return command is not None and command.name in _NAMING


def _names(text: str, names: StoreNames) -> list[Suggestion]:
    from glmchat.chat.compare.columns import completions

    before, _, word = text.rpartition(" ")
    if table.BY_NAME[text[1:].split(" ", 1)[0].lower()].name == "adapter":
        words = [name[1:] for name in completions(f"+{word}", names)]
    else:
        words = completions(word, names)
    return [Suggestion(f"{before} {name}", one_line(name, 60)) for name in words[:_NAMES] if name != word]
