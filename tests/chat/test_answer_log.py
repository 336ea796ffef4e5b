"""An answer on its way into the history: soon on the disk, and never in the way of the screen.

Covers chat/stream.py.
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

from speakers import LocalSpeaker

from glmchat.chat.answering import Begun
from glmchat.chat.history.history import History
from glmchat.chat.session import ChatSession
from glmchat.core.messages import Finished, Piece


def test_a_database_that_blocks_holds_up_no_piece_and_loses_none(history: History, history_path: Path) -> None:
    words = [f"w{n} " for n in range(60)]
    session = ChatSession(history, LocalSpeaker(*words, seconds=0.02))
    answer = session.ask("question")
    assert isinstance(next(answer), Begun)
    with sqlite3.connect(history_path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        began, text = time.monotonic(), ""
        while len(text) < len("".join(words)):
            event = next(answer)
            assert not isinstance(event, Finished)
            text += event.text if isinstance(event, Piece) else ""
        assert time.monotonic() - began < 4  # a writer waits five seconds for the lock
        other.execute("ROLLBACK")
    list(answer)
    stored = history.load(session.tree.conversation.id).path()[-1]
    assert (stored.text, stored.state, len(stored.token_ids)) == (text, "complete", 60) and history.saved


def test_what_was_said_is_in_the_file_within_a_second(history: History, history_path: Path) -> None:
    session = ChatSession(history, LocalSpeaker(*["word "] * 100, seconds=0.02))
    seen: list[tuple[float, int]] = []  # when each piece came, and the letters on the disk then
    with History.open(history_path) as other:
        for event in session.ask("question"):
            if isinstance(event, Piece):
                seen.append((time.monotonic(), len(other.load(1).path()[-1].text)))
    promised = 0
    for when, on_disk in seen:
        promised = 5 * sum(earlier < when - 1.0 for earlier, _ in seen)
        assert on_disk >= promised
    assert promised
