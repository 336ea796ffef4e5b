"""All that the window's workers say to its screens. A worker thread posts `News`; only handlers touch widgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from textual.message import Message

from glmchat.chat.context import Request
from glmchat.chat.session import ModelIdentity, SessionEvent, Speaker
from glmchat.core.errors import GlmchatError


@dataclass(frozen=True, slots=True)
class Loading:
    """How far the engine is: a stage of its loading and a share between 0 and 1."""

    stage: str
    done: float


@dataclass(frozen=True, slots=True)
class Ready:
    """The model can be asked."""

    endpoint: Speaker
    identity: ModelIdentity
    load_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class EngineLost:
    """The engine did not start, or died."""

    error: GlmchatError


@dataclass(frozen=True, slots=True)
class Said:
    """An event of a running answer."""

    event: SessionEvent


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer is over; error says why if it failed."""

    error: GlmchatError | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What the next request would hold."""

    request: Request | None
    draft_tokens: int | None = None
    error: GlmchatError | None = None


@dataclass(frozen=True, slots=True)
class Resources:
    """Bytes in use by the engine's process tree, and by graphics cards (used, total) where there are any."""

    memory: int | None
    gpu: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Told:
    """A sentence for the transcript or a short notice."""

    text: str
    hint: str = ""
    kind: str = "notice"
    values: Mapping[str, str] = field(default_factory=dict)


News = Loading | Ready | EngineLost | Said | Ended | Measured | Resources | Told


class FromWorker(Message):
    """Carries frozen news from a worker thread into the window's own thread."""

    def __init__(self, news: News) -> None:
        super().__init__()
        self.news = news
