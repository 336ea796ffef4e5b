"""A handler that raises an error of the tree is told of in one line, and the window stays."""

from __future__ import annotations

from textual.message import Message
from textual.message_pump import MessagePump

from glmchat.core.errors import GlmchatError


class Steady(MessagePump):
    """Stands before Textual's class among the bases of everything here that handles keys, the mouse or messages.

    Textual ends a widget whose handler raises, and the window with it. A mistake of ours still ends it: it is no
    GlmchatError.
    """

    async def _dispatch_message(self, message: Message) -> None:
        try:
            await super()._dispatch_message(message)
        except GlmchatError as error:
            self.app.notify(f"{error.message}\n{error.hint}", severity="warning" if error.exit == 2 else "error")
