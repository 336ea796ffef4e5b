"""An error of the tree that a handler raises is shown in one line with its hint, and the window stays.

Everything here that handles keys, the mouse or messages stands on `Steady`. `GlmchatApp` has the one place to which it
comes, and what timers, results of dialogs and threads raise; the screen on top shows it.
"""

from __future__ import annotations

from typing import Any

from rich.text import Text
from textual.app import App
from textual.message import Message
from textual.message_pump import MessagePump

from glmchat.core.errors import GlmchatError
from glmchat.tui.theme import Palette


class Steady(MessagePump):
    """Stands before Textual's class among the bases.

    Textual ends a widget whose handler raises, and the window with it. A mistake of ours still ends it: it is no
    GlmchatError.
    """

    async def _dispatch_message(self, message: Message) -> None:
        try:
            await super()._dispatch_message(message)
        except GlmchatError as error:
            self.app._handle_exception(error)


class SteadyScreen(Steady):
    @property
    def palette(self) -> Palette:
        palette: Palette = self.app.palette  # type: ignore[attr-defined]
        return palette

    def show_error(self, error: GlmchatError) -> None:
        """Where a person looks at that moment. A screen without a place for it says it in the corner."""
        toast(self.app, error)


def toast(app: App[Any], error: GlmchatError) -> None:
    app.notify(f"{error.message}\n{error.hint}", severity="warning" if error.exit == 2 else "error")


def error_text(error: GlmchatError, p: Palette) -> Text:
    """The line of a dialog."""
    ink = p.strong if error.exit in (2, 130) else p.style(p.error)
    return Text.assemble((error.message, ink), ("\n" + error.hint if error.hint else "", p.quiet))
