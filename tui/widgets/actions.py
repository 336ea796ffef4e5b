"""What keys do: those of a dialog, of the turn one stands on, and those that exist now."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text
from textual import events
from textual.geometry import Size
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Static

from glmchat.core.language import tr
from glmchat.tui.steady import Steady
from glmchat.tui.theme import PALETTES, Palette
from glmchat.tui.transcript.wrapping import rows

_CORNERS = 6  # cells of a border that its subtitle cannot have
_SHORT = 20  # cells of "there Enter opens" and less: a key and what it does
_SEPARATORS = re.compile(r"[,;，；、·]\s*")

FEW_ROWS = 16  # below, keys take one row, as many as fit; the help has them all


def first_keys(words: str, width: int) -> str:
    """As many of the keys ("Enter loads · v verifies") as fit into so many cells, and a sign that there are more."""
    if cell_len(words) <= width:
        return words
    parts = words.split(" · ")
    while len(parts) > 1 and cell_len(" · ".join(parts)) + 4 > width:
        parts.pop()
    return " · ".join([*parts, "…"])


def key_rows(words: str, width: int, whole: int = _SHORT) -> list[str]:
    """Words wrapped so that no row ends between a key and what it does: what stands between two separators, with at
    most `whole` cells, is not broken."""
    cuts = [0, *(found.end() for found in _SEPARATORS.finditer(words)), len(words)]
    found, start = [], 0
    while start < len(words):
        end = start + rows(words[start:], width)[0].end
        begin = max(cut for cut in cuts if cut <= end)
        part = words[begin : min(cut for cut in cuts if cut >= end)]
        if start < begin < end < len(words) and cell_len(part.strip()) <= whole:
            end = begin
        found.append(words[start:end].rstrip())
        start = end + len(words[end:]) - len(words[end:].lstrip())
    return found


class KeyLine(Static):
    """In a dialog's lower border where that is wide enough, else wrapped on lines of its own; where rows are few, cut.

    The last child of a bordered panel. The screen calls `place` when it was resized.
    """

    DEFAULT_CSS = "KeyLine { height: auto; color: $chat-muted; display: none; }"

    def __init__(self) -> None:
        super().__init__("", id="keys", markup=False)
        self._words = self._brief = ""

    def say(self, words: str, brief: str = "") -> None:
        """brief: the keys that matter most, instead of lines of their own."""
        self._words, self._brief = words, brief
        self.place()

    def place(self) -> None:
        panel = self.parent
        if isinstance(panel, Widget):
            width = panel.outer_size.width - _CORNERS
            words = self._words
            if self._brief and cell_len(words) > width:
                words = first_keys(self._brief, width)
            elif self.screen.size.height < FEW_ROWS:
                words = first_keys(words, width)
            fits = not panel.outer_size.width or cell_len(words) <= width
            panel.border_subtitle = words if fits else ""
            self.display = not fits
            room = panel.content_size.width or width
            self.update("" if fits else "\n".join(key_rows(self._words, room, whole=room)))


def hint_line(hints: Sequence[tuple[str, str]], width: int, palette: Palette) -> Text:
    """Keys and what they do, as many whole ones as fit, the most useful first."""
    line = Text()
    for key, does in hints:
        one = Text.assemble(("  " if line else "", palette.faded), (key, palette.quiet), (f" {does}", palette.faded))
        if line.cell_len + one.cell_len > width:
            break
        line.append_text(one)
    return line


_GAP = 3  # cells between two


@dataclass(frozen=True, slots=True)
class Action:
    """act: what the chat screen does. keys: Textual's names of them; the first one is shown as `sign`."""

    act: str
    word: str
    sign: str
    keys: tuple[str, ...]
    roles: tuple[str, ...] = ("user", "assistant")


ACTIONS = (
    Action("copy", "copy", "y", ("y", "c")),
    Action("copy code", "code", "u", ("u",), ("assistant",)),
    Action("edit", "edit", "e", ("e",), ("user",)),
    Action("regen", "retry", "r", ("r",), ("assistant",)),
    Action("quote", "quote", "q", ("q",), ("assistant",)),
    Action("stats", "details", "s", ("s",), ("assistant",)),
    Action("previous", "", "‹", ("left", "less_than_sign")),
    Action("next", "versions", "›", ("right", "greater_than_sign")),
    Action("delete", "delete", "Del", ("delete",)),
    Action("leave", "close", "Esc", ()),
)


class TurnActions(Steady, Widget):
    """Hidden until `offer` is given something."""

    class Chosen(Message):
        def __init__(self, act: str) -> None:
            super().__init__()
            self.act = act

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.palette: Palette = PALETTES["dark"]
        self.actions: tuple[Action, ...] = ()
        self.display = False

    def offer(self, actions: tuple[Action, ...]) -> None:
        self.actions = actions
        self.display = bool(actions)
        self.refresh(layout=True)

    def places(self, width: int) -> list[tuple[int, int, Action]]:
        """(row, column, action), as many in a row as fit; where rows are few one row of them."""
        places, x, y = [], 0, 0
        is_low = self.screen.size.height < FEW_ROWS
        for action in self.actions:
            cells = cell_len(self._shown(action))
            if x and x + cells > width - (2 if is_low else 0):
                if is_low:
                    break
                x, y = 0, y + 1
            places.append((y, x, action))
            x += cells + (_GAP if action.word else 1)
        return places

    @staticmethod
    def _shown(action: Action) -> str:
        return f"{action.sign} {tr(action.word)}" if action.word else action.sign

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        return max((y for y, _, _ in self.places(width)), default=-1) + 1

    def render(self) -> Text:
        p = self.palette
        text = Text()
        row = column = 0
        for y, x, action in self.places(self.content_size.width):
            if y > row:
                text.append("\n")
                row, column = y, 0
            text.append(" " * (x - column))
            text.append(action.sign, p.accented)
            text.append(self._shown(action)[len(action.sign) :], p.quiet)
            column = x + cell_len(self._shown(action))
        if row == 0 and len(text) and len(self.places(self.content_size.width)) < len(self.actions):
            text.append(" …", p.quiet)
        return text

    def on_click(self, event: events.Click) -> None:
        at = event.get_content_offset(self)
        if at is None:
            return
        for y, x, action in self.places(self.content_size.width):
            if y == at.y and x <= at.x < x + cell_len(self._shown(action)):
                self.post_message(self.Chosen(action.act))
