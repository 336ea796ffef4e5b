"""A dialog with a list that takes time to read: it opens at once, a thread reads, and keys typed meanwhile wait.

`FoldersScreen` lists what a program works on in a folder of its own: one is opened, or deleted after a question.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.screen import ModalScreen, ScreenResultType
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from glmchat.core.errors import GlmchatError
from glmchat.core.language import tr
from glmchat.core.run_folder import Run
from glmchat.tui.steady import SteadyScreen, error_text
from glmchat.tui.widgets.actions import KeyLine
from glmchat.tui.widgets.rows import Rows

T = TypeVar("T")
Folder = TypeVar("Folder", bound=Run)


class ListScreen(SteadyScreen, ModalScreen[ScreenResultType]):
    """Leaving is possible at any time. Every other key is pressed when the list stands, since it speaks of a row."""

    LEAVING: ClassVar[frozenset[str]] = frozenset({"escape", "ctrl+q", "ctrl+c"})

    class Read(Message):
        """number: which reading it was. show: draws what was read; called by the handler, where widgets may be used."""

        def __init__(self, number: int, show: Callable[[], None] | None, error: GlmchatError | None = None) -> None:
            super().__init__()
            self.number, self.show, self.error = number, show, error

    def __init__(self) -> None:
        super().__init__()
        self.reading = False
        self._reads = 0
        self._early_keys: list[str] = []

    def read_list(self, read: Callable[[], T], show: Callable[[T], None]) -> None:
        """read: runs in a thread and touches no widget; an error of the tree is shown. A later reading takes over."""
        self.reading = True
        self._reads += 1
        number = self._reads

        def run() -> None:
            try:
                rows = read()
            except GlmchatError as error:
                self.post_message(self.Read(number, None, error))
            else:
                self.post_message(self.Read(number, lambda: show(rows)))

        self.run_worker(run, thread=True, group="list")

    async def on_list_screen_read(self, news: Read) -> None:
        if news.number != self._reads:
            return
        self.reading = False
        keys, self._early_keys = self._early_keys, []
        if news.show is not None:
            news.show()
        for key in keys:
            if self.reading:  # an earlier one had the list read again
                self._early_keys.append(key)
            elif self.is_current and not await self._press(key, priority=True):
                await self._press(key)
        if news.error is not None:
            raise news.error

    async def _press(self, key: str, *, priority: bool = False) -> bool:
        """At once, one after the other: as an event each key would go its own way through the widgets."""
        return await self.app._check_bindings(key, priority)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """While the list is read only leaving acts; the keys of the others come to `on_key`."""
        if self.reading and action != "leave":
            return False
        return super().check_action(action, parameters)

    def on_key(self, event: events.Key) -> None:
        if self.reading and event.key not in self.LEAVING:
            self._early_keys.append(event.key)
            event.stop()
            event.prevent_default()


class FoldersScreen(ListScreen[Folder | None]):
    """Returns the one to be opened."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,ctrl+q,ctrl+c", "leave", show=False),
        Binding("d,delete", "remove", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._folders: list[Folder] = []
        self._asked: str | None = None  # the one that is to be deleted, until it is confirmed

    def head(self) -> str:
        raise NotImplementedError

    def none(self) -> str:
        """What is said where there are none."""
        raise NotImplementedError

    def rows(self) -> list[tuple[Folder, Text]]:
        """The newest first, each with its line. Called in a thread."""
        raise NotImplementedError

    def question(self, folder: Folder) -> str:
        """Before it is deleted."""
        raise NotImplementedError

    def compose(self) -> ComposeResult:
        with Vertical(id="panel", classes="wide"):
            yield Rows(id="runs")
            yield Static("", id="work")
            yield KeyLine()

    def on_mount(self) -> None:
        self.query_one("#panel").border_title = self.head()
        self.query_one(OptionList).focus()
        self.read_list(self.rows, self._list)

    def on_resize(self) -> None:
        self.call_after_refresh(self.query_one(KeyLine).place)

    def _list(self, rows: list[tuple[Folder, Text]]) -> None:
        options = self.query_one(OptionList)
        before, self._folders = options.highlighted, [folder for folder, _ in rows]
        options.clear_options()
        options.add_options(Option(line) for _, line in rows)
        if rows:
            options.highlighted = min(before or 0, len(rows) - 1)
        self._say("" if rows else self.none())

    def _chosen(self) -> Folder | None:
        at = self.query_one(OptionList).highlighted
        return self._folders[at] if at is not None and at < len(self._folders) else None

    def _say(self, line: str) -> None:
        self.query_one("#work", Static).update(Text(line, self.palette.body))
        words = tr("Enter opens it · d deletes it · Esc closes") if self._folders else tr("Esc closes")
        self.query_one(KeyLine).say(tr("Enter confirms · Esc cancels") if self._asked else words)

    def show_error(self, error: GlmchatError) -> None:
        self.query_one("#work", Static).update(error_text(error, self.palette))

    def on_option_list_option_highlighted(self) -> None:
        folder = self._chosen()
        if self._asked is None or folder is None or folder.id != self._asked:  # and not when the list is only drawn
            self._asked = None
            self._say("")

    def on_option_list_option_selected(self) -> None:
        if (folder := self._chosen()) is None:
            return
        if self._asked == folder.id:
            self._asked = None
            folder.remove()
            self.read_list(self.rows, self._list)
        else:
            self.dismiss(folder)

    def action_remove(self) -> None:
        folder = self._chosen()
        if folder is not None and folder.at_work:
            self._say(tr("it is at work; stop it first"))
        elif folder is not None:
            self._asked = folder.id
            self._say(self.question(folder))

    def action_leave(self) -> None:
        if self._asked is None:
            self.dismiss(None)
        else:
            self._asked = None
            self._say("")
