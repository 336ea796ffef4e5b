"""A screen of something that a program works on: a thread reads along, and leaving never stops the work."""

from __future__ import annotations

from collections.abc import Callable

from rich.text import Text
from textual.message import Message
from textual.screen import Screen, ScreenResultType

from glmchat.core.errors import GlmchatError
from glmchat.tui.steady import SteadyScreen, error_text


class FollowingScreen(SteadyScreen, Screen[ScreenResultType]):
    """`follow` starts the thread, `told` brings what it read to the screen, and `draw` shows it."""

    class Told(Message):
        """take: what is done with the news; called by the handler, where widgets may be used."""

        def __init__(self, take: Callable[[], None]) -> None:
            super().__init__()
            self.take = take

    def __init__(self) -> None:
        super().__init__()
        self.left = False  # what the thread asks before it reads on
        self.news: Text | None = None  # an error, until something else is told

    def on_mount(self) -> None:
        self.follow()
        self.draw()
        if (hear := getattr(self.app, "hear_typed_ahead", None)) is not None:
            self.app.call_later(hear)

    def on_unmount(self) -> None:
        self.left = True

    def on_resize(self) -> None:
        self.call_after_refresh(self.draw)

    def follow(self) -> None:
        """Read along, if there is something to read yet."""
        raise NotImplementedError

    def draw(self) -> None:
        raise NotImplementedError

    def read_along(self, read: Callable[[], None]) -> None:
        """read: runs in a thread until it is done or the screen is left."""
        self.run_worker(read, thread=True, group="follow")

    def told(self, take: Callable[[], None]) -> None:
        """From the thread."""
        self.post_message(self.Told(take))

    def on_following_screen_told(self, told: Told) -> None:
        told.take()
        self.draw()

    def show_error(self, error: GlmchatError) -> None:
        self.news = error_text(error, self.palette)
        self.draw()
