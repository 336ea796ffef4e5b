"""The palette, which finds everything by its name or description, and the list of themes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.command import Command, CommandInput, CommandList, CommandPalette, DiscoveryHit, Hit, Hits, Provider
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import LoadingIndicator, OptionList

from glmchat.chat.commands import table
from glmchat.core.errors import GlmchatError
from glmchat.core.language import tr
from glmchat.core.settings import THEMES
from glmchat.core.text import one_line
from glmchat.tui.screens.sampling import EXPLAINED
from glmchat.tui.steady import SteadyScreen
from glmchat.tui.theme import remember_theme
from glmchat.tui.widgets.rows import Rows
from glmchat.tui.widgets.sidebar import Sidebar

if TYPE_CHECKING:  # the store's rooms and the database are loaded by the thread that reads them
    from glmchat.chat.compare.columns import StoreNames
    from glmchat.chat.history.history import History
    from glmchat.chat.history.search import Hit as Said

_MOST = 40  # conversations and prompts among what is found
_LOOK_SECONDS = 0.05  # until the history is open
_LATEST = 5  # conversations below the commands, before anything is typed


class _Found(CommandList, Rows, can_focus=False):
    """What is found, with the cursor of all lists. The line that says that nothing was cannot be taken."""

    def action_select(self) -> None:
        chosen = self.highlighted_option
        if not isinstance(chosen, Command) or chosen.hit.command is not _nothing:
            super().action_select()


class PaletteScreen(SteadyScreen, CommandPalette):
    """Textual's, in our frame. What it finds, and does, is `Everything`'s."""

    def __init__(self) -> None:
        super().__init__([Everything], id="--command-palette")

    def compose(self) -> ComposeResult:
        with Vertical(id="--container") as frame:
            frame.border_title, frame.border_subtitle = tr("Palette"), tr("Enter chooses · Esc closes")
            with Horizontal(id="--input"):
                hint = tr("commands, settings, themes, models, conversations …")
                yield CommandInput(placeholder=hint, select_on_focus=False)
            with Vertical(id="--results"):
                yield _Found()
                yield LoadingIndicator()


def _nothing() -> None:
    """What Enter does where nothing was found."""


def _store_names() -> StoreNames | None:
    from glmchat.chat.compare.columns import store_names

    with suppress(GlmchatError):  # a catalogue that cannot be read: the command itself says so
        return store_names()
    return None


class Everything(Provider):
    """Commands, settings, themes, models, adapters, conversations and earlier prompts."""

    _reading: asyncio.Task[StoreNames | None] | None = None

    @property
    def _chat(self) -> Any:
        app: Any = self.app
        return app.chat

    async def startup(self) -> None:
        """Waits for nothing: the first key cancels the first search, and with it a start that it waits for."""
        self._reading = asyncio.create_task(asyncio.to_thread(_store_names))

    def _commands(self) -> Iterator[tuple[str, str, Callable[[], object]]]:
        for command in table.COMMANDS:
            key = f" · {table.key_name(command.key)}" if command.key else ""
            yield f"/{command.name}", table.summary(command) + key, partial(self._run, command)

    def _entries(self, names: StoreNames | None) -> Iterator[tuple[str, str, Callable[[], object]]]:
        """Name, description, and what Enter does, of all that has a name and is not in the history."""
        chat = self._chat
        yield from self._commands()
        for name, (_, what) in EXPLAINED.items():
            yield name, f"{tr('setting')} · {tr(what)}", partial(chat.composer.fill, f"/set {name} ")
        for name in THEMES:
            yield name, tr("theme"), partial(chat.face.run, "theme", name)
        for name in names.models if names else ():
            yield name, tr("model"), partial(chat.face.run, "model", name)
        for name in names.adapters if names else ():
            yield name, tr("adapter"), partial(chat.face.run, "adapter", name)

    def _run(self, command: table.Command) -> None:
        """One that needs words is begun in the prompt."""
        if command.argument and not command.argument.startswith("["):
            self._chat.composer.fill(f"/{command.name} ")
        else:
            self._chat.face.run(command.name)

    def _row(self, name: str, what: str) -> Text:
        palette = self._chat.palette
        text = Text(one_line(name, 60), palette.body, no_wrap=True, overflow="ellipsis")
        return text.append(f"  {what}", palette.quiet)

    async def discover(self) -> Hits:
        for name, what, act in self._commands():
            yield DiscoveryHit(self._row(name, what), act)
        history, latest = await self._history(), list[Any]()
        with suppress(GlmchatError):
            latest = await asyncio.to_thread(history.conversations, limit=_LATEST)
        for head in latest:
            if head.title:
                yield DiscoveryHit(self._row(head.title, tr("conversation")), self._opening(head.id))

    async def search(self, query: str) -> Hits:
        """Names by letters in their order, descriptions by the words themselves, the history by its own index."""
        matcher, words, found = self.matcher(query), query.casefold().split(), False
        names = await asyncio.shield(self._reading) if self._reading else None
        for name, what, act in self._entries(names):
            score = matcher.match(name)
            if query.casefold() in name.casefold():
                score += 100  # above letters that are scattered
            if score <= 0 and all(word in what.casefold() for word in words):
                score = 0.2
            if score > 0:
                found = True
                yield Hit(score, self._row(name, what), act)
        history, said = await self._history(), list[Any]()
        with suppress(GlmchatError):
            said = await asyncio.to_thread(history.search, query, limit=_MOST)
        for hit in said:
            found = True
            yield self._said(hit, query)
        if not found:
            yield Hit(0, self._row(tr("no matches"), ""), _nothing)

    async def _history(self) -> History:
        """Once it is open: what is typed before finds its conversations too."""
        while (session := self._chat.talk.session) is None:
            await asyncio.sleep(_LOOK_SECONDS)
        history: History = session.history
        return history

    def _said(self, hit: Said, query: str) -> Hit:
        """A title or an answer opens its conversation there; a question comes into the prompt again."""
        title = hit.title or tr("untitled")
        if hit.message is None:
            return Hit(0.15, self._row(title, tr("conversation")), self._opening(hit.conversation))
        if hit.role == "user":
            again = partial(self._ask_again, hit.conversation, hit.message)
            return Hit(0.1, self._row(hit.snippet, f"{tr('earlier prompt')} · {one_line(title, 40)}"), again)
        act = self._opening(hit.conversation, hit.message, query)
        return Hit(0.05, self._row(hit.snippet, f"{tr('answer')} · {one_line(title, 40)}"), act)

    def _opening(self, conversation: int, message: int | None = None, query: str = "") -> Callable[[], object]:
        return partial(self._chat.post_message, Sidebar.Open(conversation, message, query))

    def _ask_again(self, conversation: int, message: int) -> None:
        question = self._chat.talk.chat.history.load(conversation).messages[message]
        self._chat.composer.fill(question.text)


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
