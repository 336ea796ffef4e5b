"""What the keys of a dialog do: in its lower border where that is wide enough, else wrapped on lines of its own."""

from __future__ import annotations

from rich.cells import cell_len
from textual.widget import Widget
from textual.widgets import Static

_CORNERS = 6  # cells of a border that its subtitle cannot have


class KeyLine(Static):
    """The last child of a bordered panel. The screen calls `place` when it was resized."""

    DEFAULT_CSS = "KeyLine { height: auto; color: $chat-muted; display: none; }"

    def __init__(self) -> None:
        super().__init__("", id="keys", markup=False)
        self._words = ""

    def say(self, words: str) -> None:
        self._words = words
        self.place()

    def place(self) -> None:
        panel = self.parent
        if isinstance(panel, Widget):
            fits = not panel.outer_size.width or cell_len(self._words) <= panel.outer_size.width - _CORNERS
            panel.border_subtitle = self._words if fits else ""
            self.display = not fits
            self.update("" if fits else self._words)
