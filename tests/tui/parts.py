"""The parts of the chat screen on a stage of their own: a transcript, a prompt and a status line, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from polling import eventually
from textual.app import App, ComposeResult
from textual.message import Message
from windows import LAUNCH

from glmchat.chat.launch import LaunchOptions
from glmchat.core.errors import EngineDied, GlmchatError
from glmchat.tui.connection import ModelConnection
from glmchat.tui.messages import Ended, Heard, Measured, Opened, Ready
from glmchat.tui.talk import Talk
from glmchat.tui.transcript.transcript import Transcript
from glmchat.tui.transcript.turns import Role, Turn
from glmchat.tui.unsent import Unsent
from glmchat.tui.widgets.prompt import Prompt
from glmchat.tui.widgets.status import StatusLine


class Link:
    """An engine link that does what a test tells it."""

    def __init__(self) -> None:
        self.process: object | None = None
        self.has_target = True
        self.lost: EngineDied | None = None
        self.started: list[LaunchOptions] = []
        self.launch = LAUNCH
        self.greeting: object | None = None

    def connect(self, report: Callable[[Message], None]) -> None:
        self.started.append(self.launch)

    def change(self, launch: LaunchOptions) -> None:
        self.launch = launch

    def failure(self) -> EngineDied | None:
        return self.lost

    def stop(self) -> None:
        self.process = None


class Stage(App[None]):
    """A `View`: threads are real, and what they post is handed to the talk as the chat screen does."""

    def __init__(self) -> None:
        super().__init__()
        self.transcript, self.prompt, self.status = Transcript(), Prompt(), StatusLine()
        self.link = Link()
        self.connection = ModelConnection(self, LAUNCH, self.link)  # type: ignore[arg-type]
        self.talk = Talk(self, self.connection, Unsent(self))
        self.errors: list[GlmchatError] = []
        self.words: list[str] = []
        self.is_editing = False

    def compose(self) -> ComposeResult:
        yield from (self.transcript, self.prompt, self.status)

    def start_thread(self, work: Callable[[], None], group: str, *, exclusive: bool = False) -> None:
        self.run_worker(work, thread=True, group=group, exclusive=exclusive)

    def tell(self, text: str, hint: str = "", role: Role = "notice") -> None:
        self.words.append(text)

    def show_error(self, error: GlmchatError) -> None:
        self.errors.append(error)

    def notify(self, message: str, **how: Any) -> None:
        self.words.append(message)

    def show_title(self) -> None: ...

    def show_queue(self) -> None: ...

    def show_editing(self, is_editing: bool) -> None:
        self.is_editing = is_editing

    def welcome(self) -> Turn:
        return Turn("welcome", "welcome")

    def on_heard(self, news: Heard) -> None:
        self.talk.hear(news.answering)

    def on_ended(self, news: Ended) -> None:
        self.talk.end(news.answering, news.error)

    def on_measured(self, news: Measured) -> None:
        self.talk.measured(news)

    # For tests

    def begin(self, session: Any, endpoint: Any = None) -> None:
        """The history is open and a model is there."""
        self.connection.connected(Ready(endpoint, session.identity))
        self.talk.opened(Opened(session))
        self.talk.meet()

    def said(self, role: str) -> list[str]:
        return [turn.text for turn in self.transcript.turns if turn.role == role]

    async def until(self, holds: Callable[[], object]) -> None:
        await eventually(holds, else_=lambda: f"waited in vain; turns: {self.transcript.turns}")


@asynccontextmanager
async def on_stage() -> AsyncIterator[Stage]:
    stage = Stage()
    async with stage.run_test(size=(80, 24)):
        yield stage
        stage.talk.stop_all()
        await stage.until(lambda: not stage.talk.being_written)
