"""One answer while it is written: what the window keeps of it, in view or behind another conversation."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from glmchat.tui.messages import Ear

if TYPE_CHECKING:
    from glmchat.chat.answering import SessionEvent
    from glmchat.chat.client.endpoint import Stop
    from glmchat.chat.session import ChatSession

PENDING, PENDING_ANSWER = "pending", "pending-answer"  # keys of turns that are shown before they are stored


@dataclass(slots=True, eq=False)
class Answering:
    """key: its turn in the transcript, once it is stored. question: the words that were sent and are not stored yet."""

    session: ChatSession
    question: str = ""
    completion: Stop | None = None  # of a /complete, which no conversation holds
    key: str | None = None
    ear: Ear[SessionEvent] = field(default_factory=Ear)
    asked: float = field(default_factory=time.monotonic)
    first: float | None = None  # when the first piece came
    tokens: int = 0
    prompt_tokens: int | None = None
    stopping: bool = False
    behind: str | None = None  # what its turn would show, while another conversation is in view

    def stop(self) -> None:
        self.stopping = True
        if self.completion is not None:
            self.completion.now()
        self.session.stop()

    def hear(self, text: str, tokens: int) -> None:
        """Pieces of the answer."""
        self.first = self.first or time.monotonic()
        self.tokens += tokens
        if self.behind is not None:
            self.behind += text

    @property
    def speed(self) -> float | None:
        """Tokens a second, once there is half a second to tell from."""
        seconds = time.monotonic() - self.first if self.first is not None else 0.0
        return self.tokens / seconds if seconds > 0.5 else None
