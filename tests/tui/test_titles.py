"""Titles that the model writes in idle time, in a terminal and with the engine in the window's process.

Covers tui/talk.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import model_in
from screen import TerminalSession
from windows import open_window

from glmchat.chat.session import ChatSession
from glmchat.tui.talk import Talk

QUESTION = "What can I cook?"


@pytest.mark.parametrize(("titles", "title"), [("local", "Eggs for supper"), ("never", QUESTION)])
def test_the_model_names_a_conversation_once_it_is_idle_unless_the_setting_forbids_it(
    titles: str, title: str, tmp_path: Path
) -> None:
    model, environ = model_in(tmp_path / "tiny"), {"GLMCHAT_TITLES": titles}
    with TerminalSession("run", model, behaviour={"pieces": ["Eggs ", "for supper"]}, environ=environ) as terminal:
        terminal.until_ready()
        terminal.say(QUESTION)
        terminal.until_seen("Eggs for supper")
        terminal.until(lambda: title in terminal.lines[0])
        terminal.until_still(2.5)
        assert title in terminal.lines[0]


def test_a_title_that_the_model_wrote_is_found(tmp_path: Path) -> None:
    model, environ = model_in(tmp_path / "tiny"), {"GLMCHAT_TITLES": "local"}
    with TerminalSession("run", model, behaviour={"pieces": ["Poultry ", "supper"]}, environ=environ) as terminal:
        terminal.until_ready()
        terminal.say(QUESTION)
        terminal.until(lambda: "Poultry supper" in terminal.lines[0])
        terminal.press("ctrl+f")
        terminal.until_seen("search everything")
        terminal.type("poultry")
        terminal.until_seen("title · ", "2 results")
        terminal.press("ctrl+p")
        terminal.until_seen("╭─ Palette")
        terminal.type("poultry")
        terminal.until_seen("Poultry supper  conversation")


def name_now(talk: Talk, titles: str = "local") -> None:
    """What the window's clock does, at a moment that the test chooses."""
    talk._titles, talk._unnamed = titles, talk.chat.tree.conversation.id
    talk._name_conversation()


async def test_a_title_is_asked_for_once_and_never_while_something_waits() -> None:
    async with open_window(pieces=("Eggs ", "for supper")) as window:
        talk = window.chat.talk
        await window.ask(QUESTION)
        talk.queue.append("later")
        name_now(talk)
        talk.queue.clear()
        assert talk._naming is None
        name_now(talk)
        assert talk._naming is not None
        await window.until(lambda: talk.chat.tree.conversation.title == "Eggs for supper")
        talk._naming = None
        name_now(talk)
        assert talk._naming is None


async def test_a_question_ends_the_writing_of_a_title_at_once() -> None:
    async with open_window(pieces=("Eggs ",) * 3, seconds_per_token=0.2) as window:
        talk = window.chat.talk
        await window.ask(QUESTION)
        name_now(talk)
        stop = talk._naming
        assert stop is not None and not stop.is_set
        await window.ask("And then?")
        assert stop.is_set
        assert talk.chat.tree.conversation.title == QUESTION


async def test_a_server_is_asked_for_a_title_only_where_the_setting_says_always(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with open_window() as window:
        talk = window.chat.talk
        await window.ask(QUESTION)
        monkeypatch.setattr(ChatSession, "decides", property(lambda self: False))  # a server of somebody else's
        name_now(talk)
        assert talk._naming is None
        name_now(talk, "always")
        assert talk._naming is not None
