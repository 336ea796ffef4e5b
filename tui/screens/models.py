"""Choosing a model: what is on this machine, and what could be pulled."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from glmchat.chat import model_choice
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line
from glmchat.hub import catalogue
from glmchat.hub.installed import Installed
from glmchat.tui.theme import Palette


class ModelScreen(ModalScreen[Installed | None]):
    """Returns the chosen row, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,f4,ctrl+q", "leave", show=False)]

    def __init__(self, current: str | None) -> None:
        super().__init__()
        self._current = current
        self._rows = model_choice.pickable()

    def compose(self) -> ComposeResult:
        palette: Palette = self.app.palette  # type: ignore[attr-defined]
        with Vertical(id="panel"):
            if self._rows:
                yield OptionList(
                    *(Option(_row(row, row.name == self._current, palette)) for row in self._rows), id="models"
                )
            yield Static(_pullable(self._rows, palette), id="pullable")

    def on_mount(self) -> None:
        panel = self.query_one("#panel")
        panel.border_title = tr("Models on this machine") if self._rows else tr("No model is here yet")
        panel.border_subtitle = tr("Enter switches · Esc closes") if self._rows else tr("Esc closes")
        if self._rows:
            self.query_one(OptionList).focus()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._rows[event.option_index])

    def action_leave(self) -> None:
        self.dismiss(None)


def _row(row: Installed, current: bool, p: Palette) -> Text:
    text = Text.assemble(("● " if current else "  ", p.accented))
    text.append(one_line(row.name, 44), p.strong if current else p.body)
    facts = [
        f
        for f in (row.quant if row.quant != "none" else "", human_bytes(row.size_bytes), (row.revision or "")[:7])
        if f
    ]
    text.append("  " + " · ".join(facts), p.quiet)
    return text


def _pullable(here: list[Installed], p: Palette) -> Text:
    """What the catalogue offers besides."""
    names = {row.name for row in here}
    text = Text()
    for entry in catalogue.load():
        if entry.default and entry.reference not in names:
            size = sum(file.size or 0 for file in entry.files)
            text.append(f"  glmchat pull {entry.reference}", p.body)
            text.append(f"  {human_bytes(size)} · {'/'.join(entry.languages)}\n", p.quiet)
    if text:
        text = Text(tr("to pull in a shell:") + "\n", p.quiet) + text
    text.rstrip()
    return text
