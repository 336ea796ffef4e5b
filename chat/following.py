"""Reading along while another process of this user writes an answer: through the database, changing nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator

from glmchat.chat.history.history import History
from glmchat.chat.history.rows import StoredMessage, Tree

POLL_SECONDS = 0.25  # pieces are written twice a second
LEAVING_SECONDS = 5.0  # in which a process without a screen ends its engine and itself


def answer_elsewhere(history: History, tree: Tree) -> StoredMessage | None:
    """The answer that another living process writes in this conversation now."""
    if history.writer_elsewhere(tree) is None:
        return None
    return next((m for m in reversed(tree.messages.values()) if m.state == "streaming"), None)


def follow(history: History, tree: Tree, answer: StoredMessage) -> Generator[str, None, StoredMessage]:
    """The text of `answer` from its beginning, as it comes; returns the message as it stands in the end.

    Its state is then "streaming" only if its writer died. `tree` is kept up to date.
    """
    read = 0
    while True:
        alive = history.writer_elsewhere(tree) is not None  # asked first: its last words are read after it is gone
        history.refresh(tree)
        now = tree.messages.get(answer.id, answer)
        if len(now.text) > read:
            yield now.text[read:]
            read = len(now.text)
        if now.state != "streaming" or not alive:
            return now
        time.sleep(POLL_SECONDS)


def wait_until_gone(is_there: Callable[[], bool], seconds: float = LEAVING_SECONDS) -> None:
    """Give the process that wrote the answer time to end its engine, so that ours finds the memory free."""
    deadline = time.monotonic() + seconds
    while is_there() and time.monotonic() < deadline:
        time.sleep(0.05)
