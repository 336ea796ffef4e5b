"""What is only read: keys and commands, made from the table; and what the next answer is made with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from glmchat.chat.commands.table import BY_NAME, COMMANDS, GROUPS, key_name, summary, usage
from glmchat.chat.in_force import context_rows, rows_in_force
from glmchat.core.errors import GlmchatError
from glmchat.core.language import tr
from glmchat.core.text import show_controls
from glmchat.tui.list_screen import ListScreen
from glmchat.tui.steady import SteadyScreen, error_text
from glmchat.tui.theme import Palette
from glmchat.tui.transcript.wrapping import rows
from glmchat.tui.widgets.actions import KeyLine, key_rows

if TYPE_CHECKING:
    from glmchat.chat.session import ChatSession

_CHANGES = {"set": "sampling", "model": "model", "adapter": "adapters", "policy": "full context"}  # by their keys

_KEYS: tuple[tuple[str, str], ...] = (
    ("Enter", "send"),
    ("Ctrl+J", "new line (also Shift+Enter, Alt+Enter)"),
    ("Esc, Ctrl+C", "stop the answer and keep what was written"),
    ("Esc Esc, Ctrl+C", "empty the prompt, while no answer is written; Ctrl+_ brings it back"),
    ("Ctrl+C", "copy, when text is selected"),
    ("↑ ↓", "earlier prompts, at the edge of the prompt; a queued message returns first"),
    ("Ctrl+R", "search earlier prompts"),
    ("Ctrl+B", "conversations; there Enter opens, r rename, p pin, d delete, o one-shots, / search"),
    ("PgUp PgDn Ctrl+Home Ctrl+End", "scroll the conversation, to its top and to its end"),
    (
        "Ctrl+↑ Ctrl+↓",
        "step through questions and answers; then y copy, u code, e edit, r retry, q quote, ‹ › versions, Del",
    ),
    ("F3 / Shift+F3", "next and previous search result"),
    ("Ctrl+P", "palette: commands, settings, themes, models, adapters, conversations, earlier prompts"),
    ("Ctrl+Z", "stop the window and its engine until `fg`; Ctrl+_ takes back what was typed"),
    ("Ctrl+Q", "quit (also Ctrl+D on an empty prompt)"),
)


class HelpScreen(SteadyScreen, ModalScreen[None]):
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,f1,enter,ctrl+q", "dismiss", show=False)]

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="panel", classes="wide"):
            yield Static(_Help(self.palette), id="help")

    def on_mount(self) -> None:
        self.query_one("#panel").border_title = tr("Keys and commands")
        self.query_one("#panel").border_subtitle = tr("Esc closes")
        self.query_one("#panel").focus()


class _Help:
    """The text, wrapped for whatever width it is drawn at."""

    def __init__(self, palette: Palette) -> None:
        self._palette = palette

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield help_text(self._palette, max(20, options.max_width))


def help_text(p: Palette, width: int) -> Text:
    """Three columns: what is typed, what it does (wrapped in its column), the key."""
    text = Text()
    column = min(28, max(12, width // 3))

    def table(title: str, entries: list[tuple[str, str, str]]) -> None:
        text.append(("\n" if text else "") + title + "\n", p.accented)
        for name, what, key in entries:
            shown = name if cell_len(name) < column - 2 else name + "\n" + " " * column
            text.append(shown + " " * max(0, column - cell_len(name)) * ("\n" not in shown), p.body)
            room = max(8, width - column)
            drawn = f"{what}  [{key}]" if key else what
            for index, row in enumerate(key_rows(drawn, room)):
                text.append(" " * column * bool(index) + row + "\n", p.quiet)

    table(tr("Keys"), [(key, tr(what), "") for key, what in _KEYS])
    for group in GROUPS:
        entries = []
        for command in COMMANDS:
            if command.group == group:
                also = " ".join(f"/{alias}" for alias in command.aliases)
                what = summary(command) + (f" ({also})" if also else "")
                entries.append((usage(command), what, key_name(command.key) if command.key else ""))
        table(tr(group), entries)
    text.append("\n" + tr("A line that begins with // is sent with one slash."), p.quiet)
    return text


class InfoScreen(ListScreen[str | None]):
    """What the next answer is made with. Returns the command whose key was pressed, to change it."""

    LEAVING = ListScreen.LEAVING | {"f9", "q"}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,f9,enter,ctrl+q", "leave", show=False),
        *(Binding(BY_NAME[name].key, f"change('{name}')", id=name, show=False) for name in _CHANGES),
    ]

    def __init__(self, session: ChatSession, draft: str) -> None:
        super().__init__()
        self._session = session
        self._draft = draft

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="panel", classes="wide"):
            yield Static("", id="info")
            yield KeyLine()

    def on_mount(self) -> None:
        panel = self.query_one("#panel")
        panel.border_title = tr("In force, starting with the next answer")
        self.query_one(KeyLine).say(
            " · ".join(f"{key_name(BY_NAME[name].key)} {tr(word)}" for name, word in _CHANGES.items())
            + " · "
            + tr("Esc closes")
        )
        panel.focus()
        self._show([(tr("the next request"), tr("counting"))])
        self.read_list(lambda: self._session.weigh(self._draft), lambda parts: self._show(context_rows(parts)))

    def on_resize(self) -> None:
        self.call_after_refresh(self.query_one(KeyLine).place)

    def show_error(self, error: GlmchatError) -> None:
        self.query_one("#info", Static).update(error_text(error, self.palette))

    def _show(self, counted: list[tuple[str, str]]) -> None:
        self.query_one("#info", Static).update(_Table((rows_in_force(self._session), counted), self.palette))

    def action_change(self, name: str) -> None:
        self.dismiss(name)

    def action_leave(self) -> None:
        self.dismiss(None)


class _Table:
    """Titles and values in two columns, wrapped for whatever width they are drawn at; a blank line between groups."""

    def __init__(self, groups: Sequence[list[tuple[str, str]]], palette: Palette) -> None:
        self._groups = groups
        self._palette = palette

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        p, width = self._palette, max(20, options.max_width)
        column = max(cell_len(title) for group in self._groups for title, _ in group) + 2
        text = Text()
        for group in self._groups:
            text.append("\n" if text else "")
            for title, value in group:
                text.append(title + " " * (column - cell_len(title)), p.quiet)
                for index, row in enumerate(rows(show_controls(value), max(12, width - column))):
                    text.append(" " * column * bool(index) + show_controls(value)[row.start : row.end] + "\n", p.body)
        text.right_crop(1)
        yield text
