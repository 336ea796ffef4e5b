"""The sampling panel: every setting with its value, its range and who set it. Changes hold from the next answer on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, Label, Static

from glmchat.chat.sampling_choice import PRESETS, WORDS, value_text
from glmchat.core.errors import GlmchatError
from glmchat.core.language import tr
from glmchat.tui.steady import Steady, SteadyScreen, error_text
from glmchat.tui.theme import Palette
from glmchat.tui.widgets.actions import KeyLine

if TYPE_CHECKING:
    from glmchat.chat.session import ChatSession


PRESET_WORDS: Mapping[str, str] = {
    "precise": "stays with the likeliest words: facts, code, extraction",
    "balanced": "for conversation",
    "creative": "for stories and ideas",
    "model": "what the model's authors recommend",
}

# Field -> (range, what it does).
EXPLAINED: Mapping[str, tuple[str, str]] = {
    "temperature": ("0 to 5", "0 always takes the likeliest token; 0.2 to 0.7 is steady, above 1 it drifts"),
    "top_p": ("0 to 1", "only the likeliest tokens that together reach this probability; 1 turns it off"),
    "top_k": ("0 and up", "only this many of the likeliest tokens; 0 turns it off"),
    "min_p": ("0 to 1", "only tokens at least this fraction as likely as the likeliest; 0 turns it off"),
    "repetition_penalty": ("0.1 to 10", "above 1 makes tokens already used less likely; 1 turns it off"),
    "max_tokens": ("1 and up, or none", "how long an answer may get; none is 2,048 or what is left of the context"),
    "seed": ("0 and up, or none", "the same seed and settings give the same answer; none uses a new one each time"),
    "stop": ("texts separated by |", "the answer ends before any of these texts"),
}

_GAP = "   "  # between two presets


class PresetLine(Steady, Static):
    """The presets by number, the one that holds marked; a click takes one."""

    _active: str | None = None

    def show(self, active: str | None) -> None:
        self._active = active
        p: Palette = self.app.palette  # type: ignore[attr-defined]
        text = Text()
        row = 0
        for number, (name, y, _start, _end) in enumerate(self._places(), 1):
            text.append("\n" * (y - row))
            row = y
            text.append(f"F{number + 4} ", p.style(p.user))
            text.append(_label(name), p.accented if name == active else p.body)
            text.append(_GAP)
        self.update(text)

    def _places(self) -> Iterator[tuple[str, int, int, int]]:
        """Each preset's row and cells; a label that does not fit begins a row."""
        row = start = 0
        for name in PRESETS:
            cells = 3 + cell_len(_label(name))
            if start and self.size.width and start + cells > self.size.width:
                row, start = row + 1, 0
            yield name, row, start, start + cells
            start += cells + len(_GAP)

    def on_resize(self) -> None:
        self.show(self._active)

    def on_click(self, event: events.Click) -> None:
        for name, row, start, end in self._places():
            if row == event.y and start <= event.x < end and isinstance(self.screen, SamplingScreen):
                self.screen.use_preset(name)


def _label(name: str) -> str:
    return tr("the model's own") if name == "model" else tr(name)


class SamplingScreen(SteadyScreen, ModalScreen[None]):
    AUTO_FOCUS = ""  # too early: focusing selects the value, and the values come later
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f2,ctrl+q", "leave", show=False),
        Binding("up", "app.focus_previous", show=False),
        Binding("down", "app.focus_next", show=False),
        Binding("f5", "preset('precise')", show=False),
        Binding("f6", "preset('balanced')", show=False),
        Binding("f7", "preset('creative')", show=False),
        Binding("f8", "preset('model')", show=False),
        Binding("ctrl+r", "reset", show=False),
    ]

    def __init__(self, session: ChatSession) -> None:
        super().__init__()
        self._session = session

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="panel", can_focus=False):
            yield PresetLine(id="presets")
            with Horizontal(classes="setting heads"):
                yield Label(tr("setting"), classes="name")
                yield Label(tr("value"), classes="value")
                yield Label(tr("from"), classes="origin")
            for name in EXPLAINED:
                with Horizontal(classes="setting"):
                    yield Label(name.replace("_", " "), classes="name")
                    yield Input(id=name, compact=True, select_on_focus=True)
                    yield Label("", id=f"from-{name}", classes="origin")
            yield Static("", id="explained")
            yield KeyLine()

    def on_mount(self) -> None:
        panel = self.query_one("#panel")
        panel.border_title = tr("Sampling, starting with the next answer")
        self.query_one(KeyLine).say(tr("Enter sets · Ctrl+R resets · Esc closes"))
        self._show()
        self.query_one("#temperature", Input).focus()

    def on_resize(self) -> None:
        self.call_after_refresh(self.query_one(KeyLine).place)

    def _show(self) -> None:
        chosen = self._session.sampling()
        for name in EXPLAINED:
            field = self.query_one(f"#{name}", Input)
            value = value_text(getattr(chosen.sampling, name))
            if field.value != value:
                field.value = value
            self.query_one(f"#from-{name}", Label).update(tr(WORDS[chosen.origins[name]]))
        settings = dict(self._session.settings.sampling)
        self.query_one(PresetLine).show(next((name for name, values in PRESETS.items() if values == settings), None))

    def show_error(self, error: GlmchatError) -> None:
        field = self.focused
        if isinstance(field, Input) and field.id and error.code.startswith("sampling."):
            self._explain(field.id, error.message)
        else:
            self.query_one("#explained", Static).update(error_text(error, self.palette))

    def _explain(self, name: str, problem: str = "") -> None:
        p = self.palette
        reach, what = EXPLAINED[name]
        text = Text.assemble((problem or tr(what), p.style(p.error) if problem else p.body))
        text.append("\n" + tr("range: {range}", range=tr(reach)), p.quiet)
        self.query_one("#explained", Static).update(text)

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        if isinstance(event.widget, Input) and event.widget.id:
            self._explain(event.widget.id)

    def on_descendant_blur(self, event: events.DescendantBlur) -> None:
        if isinstance(event.widget, Input) and self.is_current:
            self._set(event.widget)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self._set(event.input)
        self.app.action_focus_next()

    def _set(self, field: Input) -> None:
        name = field.id or ""
        chosen = self._session.sampling()
        if field.value.strip() != value_text(getattr(chosen.sampling, name)):
            self._session.set(name, field.value.strip())
            self._show()

    def use_preset(self, name: str) -> None:
        self._session.reset()
        for field, value in PRESETS[name].items():
            self._session.set(field, value)
        self._show()
        self.query_one("#explained", Static).update(
            Text(f"{_label(name)}: {tr(PRESET_WORDS[name])}", self.palette.body)
        )

    def action_preset(self, name: str) -> None:
        self.use_preset(name)

    def action_reset(self) -> None:
        if isinstance(self.focused, Input) and self.focused.id:
            self._reset(self.focused.id)

    def _reset(self, name: str) -> None:
        self._session.reset(name)
        self._show()

    def on_click(self, event: events.Click) -> None:
        """A click on where a value comes from resets it."""
        if event.widget is not None and (event.widget.id or "").startswith("from-"):
            self._reset((event.widget.id or "").removeprefix("from-"))

    def action_leave(self) -> None:
        try:
            if isinstance(self.focused, Input):
                self._set(self.focused)
        finally:
            self.dismiss()
