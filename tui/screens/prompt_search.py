"""Ctrl+R: earlier prompts, narrowed down as one types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList
from textual.widgets.option_list import Option

from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.tui.steady import SteadyScreen


class PromptSearch(SteadyScreen, ModalScreen[str | None]):
    """prompts: newest first. Returns the chosen one, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,ctrl+q", "leave", show=False)]

    def __init__(self, prompts: Sequence[str]) -> None:
        super().__init__()
        self._prompts = prompts
        self._found: list[str] = []

    def compose(self) -> ComposeResult:
        with Vertical(id="panel"):
            yield Input(placeholder=tr("part of an earlier prompt"), compact=True)
            yield OptionList()

    def on_mount(self) -> None:
        panel = self.query_one("#panel")
        panel.border_title = tr("Earlier prompts")
        panel.border_subtitle = tr("Enter takes one · Esc closes")
        self.query_one(Input).focus()
        self._narrow("")

    def _narrow(self, query: str) -> None:
        wanted = query.casefold()
        self._found = [prompt for prompt in self._prompts if wanted in prompt.casefold()][:100]
        listing = self.query_one(OptionList)
        listing.clear_options()
        listing.add_options(
            [Option(Text(one_line(prompt, 200), no_wrap=True, overflow="ellipsis")) for prompt in self._found]
        )
        if self._found:
            listing.highlighted = 0

    def on_input_changed(self, event: Input.Changed) -> None:
        self._narrow(event.value)

    def on_input_submitted(self) -> None:
        at = self.query_one(OptionList).highlighted
        self.dismiss(self._found[at] if at is not None and at < len(self._found) else None)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._found[event.option_index])

    def on_key(self, event: events.Key) -> None:
        listing = self.query_one(OptionList)
        if event.key in ("ctrl+r", "down", "up") and self.focused is not listing:
            listing.action_cursor_up() if event.key == "up" else listing.action_cursor_down()
            event.stop()

    def action_leave(self) -> None:
        self.dismiss(None)
