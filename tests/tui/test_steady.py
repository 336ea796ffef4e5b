"""An error that a person can mend, raised anywhere in the window, is one line with its hint, and the window lives."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pkgutil import walk_packages
from typing import Any

import pytest
from textual.message_pump import MessagePump
from textual.widgets import OptionList
from windows import Window, open_window

import glmchat.tui
from glmchat.chat.commands.table import COMMANDS
from glmchat.chat.launch import LaunchOptions
from glmchat.core.errors import NetworkFailed, Usage
from glmchat.tui.screens.adapters import AdapterScreen
from glmchat.tui.screens.chat import ChatScreen
from glmchat.tui.screens.sampling import SamplingScreen
from glmchat.tui.steady import Steady
from glmchat.tui.widgets.sidebar import Sidebar


class Broken:
    """A session, or a history, of which nothing can be had."""

    def __getattr__(self, name: str) -> Any:
        raise Usage("it is broken", hint="mend it", code="test.broken")


def ours() -> Iterator[type]:
    for found in walk_packages(glmchat.tui.__path__, "glmchat.tui."):
        for kind in vars(import_module(found.name)).values():
            if isinstance(kind, type) and kind.__module__ == found.name:
                yield kind


def test_everything_that_handles_keys_the_mouse_or_messages_is_steady() -> None:
    handlers = [
        kind
        for kind in ours()
        if issubclass(kind, MessagePump)
        and any(name.startswith(("on_", "_on_", "action_", "key_")) for name in vars(kind))
    ]
    assert len(handlers) > 12
    assert [kind.__name__ for kind in handlers if not issubclass(kind, Steady)] == []


def is_told(window: Window) -> bool:
    return all(words in window.toasts + window.notices + window.screen_text() for words in ("it is broken", "mend it"))


async def still_answers(window: Window, session: Any) -> None:
    window.chat.talk.session = session
    window.chat.sidebar.history = session.history
    while window.app.screen is not window.chat:
        await window.press("escape")
    window.chat.prompt.set_text("")
    window.chat.prompt.focus()
    await window.ask("still here")
    assert window.said("user")[-1] == "still here"


QUIET = {  # commands and keys that ask nothing of the conversation
    "help", "set", "stop", "model", "restart", "compare", "complete", "history", "find", "theme", "editor", "quit",
    "context",
}  # fmt: skip
ARGUMENTS = {"preset": "precise", "save": "title", "reset": "temperature", "load": "1", "adapter": "off"}


async def told_again(window: Window, before: int) -> None:
    """In the conversation, or on the screen that a command opened, which is closed again."""
    await window.until(
        lambda: (
            window.notices.count("it is broken") > before
            or (window.app.screen is not window.chat and "it is broken" in window.toasts + window.screen_text())
        )
    )
    while window.app.screen is not window.chat:
        await window.press("escape")


async def test_no_command_closes_the_window_whatever_the_conversation_raises() -> None:
    async with open_window(echo=True) as window:
        session = window.chat.talk.session
        await window.ask("one")
        window.chat.talk.session = Broken()  # type: ignore[assignment]
        for command in COMMANDS:
            if command.name in QUIET:
                continue
            before = window.notices.count("it is broken")
            await window.send(f"/{command.name} {ARGUMENTS.get(command.name, '')}".rstrip())
            await told_again(window, before)
            window.chat.prompt.set_text("")
        await still_answers(window, session)


async def test_no_key_of_the_chat_closes_the_window_whatever_the_conversation_raises() -> None:
    async with open_window(echo=True) as window:
        session = window.chat.talk.session
        await window.ask("one")
        keys = [key for binding in ChatScreen.BINDINGS for key in binding.key.split(",")]  # type: ignore[union-attr]
        for key in ("up", *keys):
            window.chat.talk.session = Broken()  # type: ignore[assignment]
            if key in ("ctrl+q", "ctrl+g", "f5"):
                continue
            await window.press(key)
            assert window.app.is_running, key
            while window.app.screen is not window.chat:
                await window.press("escape")
        assert is_told(window)
        await still_answers(window, session)


@pytest.mark.parametrize("key", ["delete", "left", "e", "r", "q", "s", "y", "enter"])
async def test_no_key_of_a_turn_closes_the_window(key: str) -> None:
    async with open_window(echo=True) as window:
        session = window.chat.talk.session
        await window.ask("one")
        window.chat.transcript.make_current(window.turns[-1].key)
        await window.settle()
        window.chat.talk.session = Broken()  # type: ignore[assignment]
        await window.press(key)
        assert window.app.is_running
        assert key in ("e", "enter") or is_told(window)  # an answer cannot be edited, and folding asks nobody
        await still_answers(window, session)


@pytest.mark.parametrize("keys", [("d",), ("p",), ("r",), ("u",), ("enter",), ("slash", "x")], ids=str)
async def test_no_key_of_the_list_of_conversations_closes_the_window(keys: tuple[str, ...]) -> None:
    async with open_window(echo=True) as window:
        session = window.chat.talk.session
        await window.ask("one")
        await window.press("ctrl+b")
        sidebar = window.chat.query_one(Sidebar)
        await window.until(lambda: sidebar.targets and sidebar.query_one(OptionList).has_focus)
        if keys == ("u",):
            sidebar._deleted.append(1)
        sidebar.history = Broken()  # type: ignore[assignment]
        window.chat.talk.session = Broken()  # type: ignore[assignment]
        await window.press(*keys)
        await window.until(lambda: is_told(window))
        await still_answers(window, session)


@pytest.mark.parametrize("key", ["f5", "f7", "f8", "ctrl+r", "enter", "escape"])
async def test_no_key_of_the_sampling_panel_closes_the_window(key: str) -> None:
    async with open_window(echo=True) as window:
        session = window.chat.talk.session
        await window.press("f2")
        panel = window.app.screen
        assert isinstance(panel, SamplingScreen)
        await window.until(lambda: panel.focused)
        await window.press("5")
        panel._session = Broken()  # type: ignore[assignment]
        await window.press(key)
        await window.until(lambda: is_told(window))
        panel._session = session  # type: ignore[assignment]
        await still_answers(window, session)


@pytest.mark.parametrize("key", ["space", "right", "o", "f", "enter"])
async def test_no_key_of_the_adapters_closes_the_window(key: str, adapters_here: LaunchOptions) -> None:
    async with open_window(launch=adapters_here, echo=True) as window:
        session = window.chat.talk.session
        await window.press("f7")
        panel = window.app.screen
        assert isinstance(panel, AdapterScreen)
        await window.until(lambda: panel._rows)
        await window.press("down")
        panel._session = Broken()  # type: ignore[assignment]
        await window.press(key)
        assert window.app.is_running and (key == "f" or is_told(window))  # this one fits: nothing is to be forced
        panel._session = session  # type: ignore[assignment]
        await still_answers(window, session)


async def test_what_a_thread_or_a_timer_raises_is_told_too() -> None:
    async with open_window(echo=True) as window:

        def fail() -> None:
            raise NetworkFailed("no way there", hint="look at the cable")

        window.chat.start_thread(fail, "test")
        await window.until(lambda: window.notices.count("look at the cable") == 1)
        window.chat.set_timer(0.01, fail)
        await window.until(lambda: window.notices.count("look at the cable") == 2)
        window.chat.call_later(fail)
        await window.until(lambda: window.notices.count("look at the cable") == 3)
        await still_answers(window, window.chat.talk.session)


async def test_a_mistake_of_ours_still_ends_the_window_with_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_window(echo=True) as window:
            window.chat.call_later(lambda: 1 / 0)
            await window.until(lambda: not window.app.is_running)


async def test_leaving_works_whatever_the_conversation_raises() -> None:
    async with open_window(echo=True) as window:
        await window.type("half a thought")
        window.chat.talk.session = Broken()  # type: ignore[assignment]
        await window.press("ctrl+q")
        await window.until(lambda: window.app.return_value == 0)
        window.chat.talk.session = None
