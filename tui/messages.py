"""What the chat screen's worker threads post to it. They never touch widgets: only its handlers do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from textual.message import Message

from glmchat.core.errors import GlmchatError

if TYPE_CHECKING:  # the window draws its first frame before it loads what talks to the engine and the database
    from glmchat.chat.client.endpoint import Endpoint, Stop
    from glmchat.chat.client.words import ModelRow
    from glmchat.chat.compare.columns import StoreNames
    from glmchat.chat.context import ContextParts, Request
    from glmchat.chat.history.history import History
    from glmchat.chat.history.rows import Conversation
    from glmchat.chat.launch import LaunchOptions
    from glmchat.chat.session import ChatSession, ModelIdentity
    from glmchat.tui.answering import Answering


@dataclass
class Loading(Message, bubble=False):
    """How far the engine is: a stage of its loading and a share between 0 and 1."""

    stage: str
    done: float


@dataclass
class Ready(Message, bubble=False):
    """The model can be asked."""

    endpoint: Endpoint
    identity: ModelIdentity


@dataclass
class EngineLost(Message, bubble=False):
    """The engine did not start, or died."""

    error: GlmchatError


@dataclass
class Listed(Message, bubble=False):
    """The history can be read; what a conversation needs is still being loaded."""

    history: History


@dataclass
class Opened(Message, bubble=False):
    """The history is open and a conversation in it; interrupted, unsent: earlier ones to offer."""

    session: ChatSession
    interrupted: Conversation | None = None
    unsent: Conversation | None = None
    running: tuple[str, ...] = ()  # engines that other programs of this user keep warm


@dataclass
class Heard(Message, bubble=False):
    """Events of a running answer wait in its `Ear`."""

    answering: Answering


@dataclass
class Ended(Message, bubble=False):
    """The answer is over; error says why if it failed."""

    answering: Answering
    error: GlmchatError | None = None


@dataclass
class Titled(Message, bubble=False):
    """A conversation has a title that the model wrote."""


@dataclass
class Measured(Message, bubble=False):
    """What the next request would hold."""

    request: Request


@dataclass
class PartsCounted(Message, bubble=False):
    """What the next request is made of."""

    parts: ContextParts


@dataclass
class Replied(Message, bubble=False):
    """What came of a question that the window waited for; ignored where that was given up meanwhile."""

    given_up: Stop
    reply: Message | None = None
    error: GlmchatError | None = None


@dataclass
class Served(Message, bubble=False):
    """What a server lists, for the model, or the adapters, that were asked for by name."""

    wanted: str
    rows: list[ModelRow]
    adapters: bool = False


@dataclass
class Reached(Message, bubble=False):
    """A server of the config answers and may be switched to. rows: what it lists, nothing where it has no list."""

    launch: LaunchOptions
    name: str
    rows: list[ModelRow]


@dataclass
class Resources(Message, bubble=False):
    """Bytes in use by the engine's process tree, and by graphics cards (used, total) where there are any."""

    memory: int | None
    gpu: tuple[int, int] | None = None


@dataclass
class Names(Message, bubble=False):
    """What the store holds, for completing a word; None where it could not be read."""

    names: StoreNames | None


@dataclass
class Weighed(Message, bubble=False):
    """A file that was put into the prompt: bytes, and tokens where the model says."""

    name: str
    size: int
    tokens: int | None
