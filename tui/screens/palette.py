"""Lists that one picks from by typing or by looking: the themes."""

from __future__ import annotations

from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import OptionList

from glmchat.core.language import tr
from glmchat.core.settings import THEMES
from glmchat.tui.steady import SteadyScreen
from glmchat.tui.theme import remember_theme
from glmchat.tui.widgets.rows import Rows


class ThemeScreen(SteadyScreen, ModalScreen[None]):
    """The window is drawn in the theme under the cursor at once; Enter keeps it, Esc brings back the one before."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,ctrl+q", "leave", show=False)]

    def compose(self) -> ComposeResult:
        with Vertical(id="panel", classes="themes"):
            yield Rows(*THEMES)

    def on_mount(self) -> None:
        self._before = self.palette.name
        panel = self.query_one("#panel")
        panel.border_title, panel.border_subtitle = tr("Themes"), tr("Enter keeps it · Esc goes back")
        listing = self.query_one(Rows)
        listing.highlighted = THEMES.index(self._before) if self._before in THEMES else 0
        listing.focus()

    def _show(self, name: str) -> None:
        app: Any = self.app
        if name != app.palette.name:
            app.change_theme(name)

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        self._show(THEMES[event.option_index])

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self._show(THEMES[event.option_index])
        remember_theme(THEMES[event.option_index])
        self.dismiss()

    def action_leave(self) -> None:
        self._show(self._before)
        self.dismiss()
