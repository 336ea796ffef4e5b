"""What the parts of the chat screen have of it: its widgets, its threads, and the places it shows things in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from textual.app import App
from textual.message import Message

from glmchat.core.errors import GlmchatError
from glmchat.tui.transcript.transcript import Transcript
from glmchat.tui.transcript.turns import Role, Turn
from glmchat.tui.widgets.prompt import Prompt
from glmchat.tui.widgets.status import StatusLine


class View(Protocol):
    transcript: Transcript
    prompt: Prompt
    status: StatusLine

    @property
    def app(self) -> App[Any]: ...

    def post_message(self, message: Message) -> bool:
        """From any thread."""
        ...

    def start_thread(self, work: Callable[[], None], group: str, *, exclusive: bool = False) -> None:
        """An error of the tree that ends the work is shown."""

    def tell(self, text: str, hint: str = "", role: Role = "notice") -> None:
        """A line in the transcript that is not part of the conversation."""

    def show_error(self, error: GlmchatError) -> None: ...

    def notify(self, message: str, *, timeout: float | None = None) -> None:
        """A few words that go away by themselves."""

    def show_title(self) -> None:
        """Of the open conversation, here and in the list of all."""

    def show_queue(self) -> None:
        """What waits to be sent, and what it waits for."""

    def show_editing(self, is_editing: bool) -> None:
        """Whether the prompt holds an earlier question in new words."""

    def welcome(self) -> Turn: ...
