"""The palette, in a pseudo-terminal: what it finds, and that Enter does it.

Covers tui/screens/palette.py.
"""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from fakes import model_in
from screen import SECONDS, TerminalSession
from textual import events
from textual.widgets import Input
from windows import ENDLESS, open_window

from glmchat.chat.compare.columns import StoreNames, store_names
from glmchat.chat.history.history import History
from glmchat.tui.screens import palette
from glmchat.tui.screens.chat import ChatScreen

SIZES = ((40, 12), (80, 24), (120, 36), (200, 60))
TITLE = "[red]bold[/] \x1b]0;x\x07 bravo"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_in(tmp_path / "model")


@pytest.fixture
def past() -> None:
    with History.default() as history:
        tree = history.new()
        history.append(tree, "user", "tell me of the charlie crossing")
        history.append(tree, "assistant", "the answer speaks of delta")
        history.rename(tree, TITLE)


def is_open(terminal: TerminalSession) -> bool:
    return any(title in terminal.text for title in ("╭─ Palette", "╭─ 命令面板"))


def look_for(terminal: TerminalSession, words: str) -> None:
    if is_open(terminal):
        terminal.press("ctrl+u")
        terminal.until(lambda: any(hint in terminal.text for hint in ("commands, settings", "命令、设置")))
    else:
        terminal.press("ctrl+p")
        terminal.until(lambda: is_open(terminal))
    terminal.type(words)
    terminal.until(lambda: any(f"│ {words}  " in line for line in terminal.lines))


def chosen(terminal: TerminalSession) -> str:
    """The marked row of the palette; a list beside it has one of its own."""
    return next((line.partition("│ ▸")[2] for line in terminal.lines if "│ ▸" in line), "")


@pytest.mark.usefixtures("past")
def test_it_finds_descriptions_settings_themes_models_conversations_and_earlier_prompts(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        for words, first in (
            ("branch", "/edit"),
            ("temperature", "temperature  setting"),
            ("gruv", "gruvbox  theme"),
            ("bravo", "[red]bold[/]"),
            ("charlie", "earlier prompt"),
            ("delta", "the answer speaks of delta  answer"),
            ("xyzzy", "no matches"),
        ):
            look_for(terminal, words)
            terminal.until(lambda first=first: first in chosen(terminal))  # type: ignore[misc]


@pytest.mark.usefixtures("past")
@pytest.mark.parametrize(("columns", "rows"), SIZES)
@pytest.mark.parametrize("theme", ["dark", "light"])
def test_enter_does_what_is_chosen(model: Path, theme: str, columns: int, rows: int) -> None:
    settings = {"GLMCHAT_THEME": theme}
    with TerminalSession("run", model, columns=columns, rows=rows, environ=settings) as terminal:
        terminal.until_ready()
        look_for(terminal, "min_p")
        terminal.until(lambda: "▸ min_p" in terminal.text)
        row = terminal.row_of("▸ min_p")
        first = terminal.lines[row].index("▸")
        terminal.until(lambda: terminal.backgrounds(row)[first] != terminal.backgrounds(row - 1)[first])
        terminal.press("enter")
        terminal.until_seen("/set min_p")
        terminal.press("esc", "esc", "esc")
        terminal.until_seen("Ask anything")
        look_for(terminal, "charlie")
        terminal.until(lambda: "tell me of" in chosen(terminal))
        terminal.press("enter")
        terminal.until(lambda: not is_open(terminal))
        terminal.until_seen("tell me of the charlie")
        terminal.press("ctrl+c")
        terminal.until_seen("Ask anything")
        look_for(terminal, "bravo")
        terminal.until(lambda: "bold" in chosen(terminal))
        terminal.press("enter")
        terminal.until_seen("the answer speaks of delta")


async def test_who_types_before_the_store_is_read_still_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first key cancels the search that began when the palette opened, and with it all that search waits for."""
    go_on = threading.Event()

    def slow() -> StoreNames:
        go_on.wait(SECONDS)
        return store_names()

    monkeypatch.setattr("glmchat.chat.compare.columns.store_names", slow)
    async with open_window() as window:
        await window.press("ctrl+p")
        await window.until(lambda: window.app.screen.query("#--input"))
        await window.press("m", "i")
        await window.until(lambda: window.app.screen.query_one("CommandInput", Input).value == "mi")
        go_on.set()
        await window.press("n", "_")
        await window.until(lambda: "▸ min_p" in window.screen_text())


def test_enter_on_nothing_found_does_nothing(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        look_for(terminal, "xyzzy")
        terminal.until_seen("no matches")
        terminal.press("enter")
        terminal.until_still()
        assert is_open(terminal) and "│ xyzzy " in terminal.text
        look_for(terminal, "min_p")
        terminal.until(lambda: "▸ min_p" in terminal.text)


@pytest.mark.usefixtures("past")
def test_what_is_opened_before_the_first_frame_finds_everything(model: Path) -> None:
    """The keys are there before the program is: a person opens the palette while the window starts."""
    with TerminalSession("run", model) as terminal:
        terminal.type("\x10")
        terminal.until(lambda: is_open(terminal))
        terminal.type("charlie")
        terminal.until(lambda: "tell me of" in chosen(terminal))
        terminal.press("esc")
        terminal.until_ready()


async def test_a_screen_that_covers_the_window_before_its_first_frame_does_not_keep_the_history_closed(
    past: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Textual draws no frame of a screen that another one covers, and what waits for one waits until that is gone."""
    monkeypatch.setattr(ChatScreen, "call_after_refresh", lambda screen, callback: True)
    async with open_window(wait=False) as window:
        await window.press("ctrl+p")
        await window.until(lambda: window.app.screen.query("#--input"))
        await window.press(*"charlie")
        await window.until(lambda: "▸ tell me of" in window.screen_text())
        await window.until(lambda: window.chat.connection.ready)


async def test_who_searches_before_the_history_is_open_finds_its_conversations(
    past: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, opened = threading.Event(), History.open

    def slow(path: Path | None) -> History:
        go_on.wait(SECONDS)
        return opened(path)

    monkeypatch.setattr(History, "open", slow)
    async with open_window(wait=False) as window:
        await window.press("ctrl+p")
        await window.until(lambda: window.app.screen.query("#--input"))
        await window.press(*"charlie")
        await window.settle()
        assert window.chat.talk.session is None and "no matches" not in window.screen_text()
        go_on.set()
        await window.until(lambda: "▸ tell me of" in window.screen_text())


async def test_a_key_pressed_just_before_acts_on_the_screen_it_was_pressed_on() -> None:
    async with open_window(**ENDLESS) as window:
        await window.send("hello")
        await window.until(lambda: "word word" in window.screen_text())
        for key, character in (("escape", "\x1b"), ("ctrl+p", "\x10")):
            window.app.post_message(events.Key(key, character))
        await window.until(lambda: window.app.screen.query("#--input"))
        await window.until(lambda: not window.chat.talk.busy)
        await window.settle()
        assert isinstance(window.app.screen, palette.PaletteScreen)
        await window.press("escape")
        await window.until(lambda: isinstance(window.app.screen, ChatScreen))


def test_it_speaks_chinese_and_the_key_that_opened_it_closes_it(model: Path) -> None:
    with TerminalSession("--lang", "zh", "run", model) as terminal:
        terminal.until(lambda: "输入" in terminal.text)
        look_for(terminal, "温度")
        terminal.until(lambda: "temperature" in chosen(terminal))
        look_for(terminal, "xyzzy")
        terminal.until(lambda: chosen(terminal) and "xyzzy" not in chosen(terminal))
        assert not any(word in terminal.text for word in ("matches", "Enter does", "commands"))
        terminal.press("ctrl+p")
        terminal.until(lambda: not is_open(terminal))


def test_among_ten_thousand_conversations_it_answers_at_once(model: Path) -> None:
    with History.default() as history, history.batch():
        for number in range(10_000):
            history.append(history.new(), "user", f"question number {number} about cats")
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        look_for(terminal, "cats")
        look_for(terminal, "9876")
        terminal.until(lambda: "number 9876" in chosen(terminal))
