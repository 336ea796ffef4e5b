"""What is not sent is saved while it is written, whatever order the threads that save come in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from speakers import LocalSpeaker
from windows import ENDLESS, open_window

from glmchat.chat.history.history import History
from glmchat.chat.session import ChatSession
from glmchat.tui.unsent import Unsent
from glmchat.tui.view import View


class LateThreads:
    """A view whose threads begin when the test says so, in the order that it says."""

    def __init__(self) -> None:
        self.prompt = SimpleNamespace(text="")
        self.work: list[Callable[[], None]] = []

    def start_thread(self, work: Callable[[], None], group: str, *, exclusive: bool = False) -> None:
        self.work.append(work)


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with History.open(tmp_path / "history.db") as opened:
        yield opened


def test_an_older_text_never_overtakes_a_newer_one(history: History) -> None:
    session, view = ChatSession(history, LocalSpeaker("a")), LateThreads()
    unsent = Unsent(cast(View, cast(Any, view)))
    for view.prompt.text in ("a", "ab", "abc"):
        unsent.save(session)
    for late in reversed(view.work):
        late()
    assert session.tree.conversation.draft == "abc"


def test_what_is_kept_when_a_conversation_is_left_is_not_undone_by_a_thread_that_comes_late(history: History) -> None:
    session, view = ChatSession(history, LocalSpeaker("a")), LateThreads()
    unsent = Unsent(cast(View, cast(Any, view)))
    unsent.save(session)
    unsent.queue.append("waiting")
    unsent.keep(session)
    for late in view.work:
        late()
    assert session.tree.conversation.draft == "waiting" and not unsent.queue


async def test_what_waits_is_saved_while_it_waits() -> None:
    async with open_window(**ENDLESS) as window:
        session = window.chat.talk.session
        assert session is not None
        await window.send("question")
        await window.until(lambda: window.chat.talk.answering)
        await window.send("first")
        await window.send("second")
        await window.type("third")
        await window.until(lambda: session.tree.conversation.draft == "first\n\nsecond\n\nthird")
