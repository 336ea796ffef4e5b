"""What is not sent: it waits in the queue or stands in the prompt, and is its conversation's draft while it does.

It is saved in threads, in which two may overtake each other: the text of the latest call is what counts.
"""

from __future__ import annotations

from collections import deque
from threading import Lock
from typing import TYPE_CHECKING

from glmchat.tui.view import View

if TYPE_CHECKING:
    from glmchat.chat.session import ChatSession


class Unsent:
    """queue: the questions that wait, the oldest first."""

    def __init__(self, view: View) -> None:
        self.queue: deque[str] = deque()
        self._view = view
        self._lock = Lock()
        self._latest = 0

    @property
    def text(self) -> str:
        typed = self._view.prompt.text
        return "\n\n".join([*self.queue, *([typed] if typed else [])])

    def save(self, session: ChatSession | None) -> None:
        """As the draft of this conversation, in a thread. None: the history is still being opened."""
        if session is None:
            return
        self._latest += 1
        number, text = self._latest, self.text

        def write() -> None:
            with self._lock:
                if number == self._latest:
                    session.history.save_draft(session.tree, text)

        self._view.start_thread(write, "draft")

    def keep(self, session: ChatSession | None) -> None:
        """The conversation is left: its draft is saved before this returns, and nothing waits any more."""
        if session is None:
            return
        self._latest += 1  # what a thread is still to save is older
        with self._lock:
            session.history.save_draft(session.tree, self.text)
        self.queue.clear()  # the end of an answer that is stopped now would send the next one
