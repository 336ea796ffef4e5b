"""A dialog with a list that takes time to read: it opens at once, a thread reads, and keys typed meanwhile wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

from textual import events
from textual.message import Message
from textual.screen import ModalScreen, ScreenResultType

from glmchat.core.errors import GlmchatError
from glmchat.tui.steady import SteadyScreen

T = TypeVar("T")


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
