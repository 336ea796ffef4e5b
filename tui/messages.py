"""All that the window's workers say to its screens. A worker thread posts `News`; only handlers touch widgets."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from textual.message import Message

from glmchat.core.errors import GlmchatError

if TYPE_CHECKING:  # the window draws its first frame before it loads what talks to the engine and the database
    from glmchat.chat.client.endpoint import Endpoint
    from glmchat.chat.context import Request
    from glmchat.chat.history.rows import Conversation
    from glmchat.chat.session import ChatSession, ModelIdentity
    from glmchat.tui.answering import Answering

Event = TypeVar("Event")
STAGES = {  # of an engine's loading and of an answer, in words
    "start": "starting the engine",
    "import": "starting the engine",
    "quantize": "quantising, once",
    "tokenizer": "reading the vocabulary",
    "weights": "loading the weights",
    "warmup": "warming up",
    "waiting": "waiting in the server's line",
    "prefill": "reading the prompt",
}


@dataclass(frozen=True, slots=True)
class Loading:
    """How far the engine is: a stage of its loading and a share between 0 and 1."""

    stage: str
    done: float


@dataclass(frozen=True, slots=True)
class Ready:
    """The model can be asked."""

    endpoint: Endpoint
    identity: ModelIdentity


@dataclass(frozen=True, slots=True)
class EngineLost:
    """The engine did not start, or died."""

    error: GlmchatError


@dataclass(frozen=True, slots=True)
class Opened:
    """The history is open and a conversation in it; interrupted: an earlier one to offer."""

    session: ChatSession
    interrupted: Conversation | None = None


@dataclass(frozen=True, slots=True)
class Heard:
    """Events of a running answer wait in its `Ear`."""

    answering: Answering


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer is over; error says why if it failed."""

    answering: Answering
    error: GlmchatError | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What the next request would hold."""

    request: Request | None
    error: GlmchatError | None = None


@dataclass(frozen=True, slots=True)
class Resources:
    """Bytes in use by the engine's process tree, and by graphics cards (used, total) where there are any."""

    memory: int | None
    gpu: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Weighed:
    """A file that was put into the prompt: bytes, and tokens where the model says."""

    name: str
    size: int
    tokens: int | None


@dataclass(frozen=True, slots=True)
class Broken:
    """Something else failed, or there is something to say."""

    error: GlmchatError


News = Opened | Loading | Ready | EngineLost | Heard | Ended | Measured | Resources | Weighed | Broken


class FromWorker(Message):
    """Carries frozen news from a worker thread into the window's own thread."""

    def __init__(self, news: News) -> None:
        super().__init__()
        self.news = news


class Ear(Generic[Event]):
    """Gathers the events of an answer between two looks of the window, so that a fast model cannot flood it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: list[Event] = []

    def put(self, event: Event) -> bool:
        """Worker's side. True if the window must be told that something waits."""
        with self._lock:
            self._events.append(event)
            return len(self._events) == 1

    def take(self) -> list[Event]:
        """Window's side: everything since the last look."""
        with self._lock:
            events, self._events = self._events, []
        return events
