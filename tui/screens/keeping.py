"""Commands on conversations as a whole and on files: open, name, find, delete, export; a file into the prompt."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from glmchat.core.errors import GlmchatError
from glmchat.core.language import tr
from glmchat.core.text import human_bytes
from glmchat.tui.messages import Weighed
from glmchat.tui.screens.editing import Editing
from glmchat.tui.widgets.sidebar import Sidebar

if TYPE_CHECKING:
    from glmchat.chat.session import ChatSession


class Keeping(Editing):
    def command_file(self, argument: str) -> None:
        from glmchat.chat.text_file import read_text_file

        file = read_text_file(argument)
        before = self.prompt.text.rstrip()
        fence = "````" if "```" in file.text else "```"
        block = f"{file.name}:\n{fence}\n{file.text.rstrip()}\n{fence}\n"
        self.prompt.set_text(f"{before}\n\n{block}" if before else block)
        self.measure(self.prompt.text)
        self._thread(lambda: self._weigh(file.name, file.size, block), "file")

    def _weigh(self, name: str, size: int, text: str) -> None:
        """In a thread: how many tokens a file is, where the model is there to say so."""
        tokens = None
        if self._ready is not None:
            with suppress(GlmchatError):
                tokens = len(self._ready.endpoint.tokenize(text))
        self._report(Weighed(name, size, tokens))

    def file_weighed(self, news: Weighed) -> None:
        size = human_bytes(news.size)
        if news.tokens is not None:
            size = tr("{size}, {n} tokens", size=size, n=f"{news.tokens:,}")
        self.tell(tr("{name}: {size}, in the prompt; nothing is sent yet", name=news.name, size=size))

    def command_save(self, argument: str) -> None:
        session = self._talk()
        if not argument:
            self.tell(tr("every conversation is saved as it is written"), tr("/save TITLE gives this one a name"))
            return
        session.history.rename(session.tree, argument)
        self.refresh_title()
        self.query_one(Sidebar).reload()

    def command_load(self, argument: str) -> None:
        session = self._talk()
        if argument.isdigit():
            self.open_conversation(int(argument))
            return
        if argument:
            self.command_find(argument)
            return
        found = session.history.interrupted() or session.history.last()
        if found is None or found.id == session.tree.conversation.id:
            self.command_history("")
            return
        self.open_conversation(found.id)

    def open_conversation(self, conversation: int, message: int | None = None) -> None:
        """Show an earlier conversation, at a message if one is named."""
        session = self.turn_to(conversation)
        self._stop_editing()
        self.restore_draft()
        if message is not None:
            self._show_message(session, message)
        self.measure()

    def _show_message(self, session: ChatSession, message: int) -> None:
        """Step onto a message, on whichever branch it is. One that is being written keeps its branch open."""
        if message not in {m.id for m in session.tree.path()} and message in session.tree.messages and not self.busy:
            session.switch(message)
            self.show_conversation()
        self.transcript.make_current(str(message))

    def command_history(self, argument: str) -> None:
        self.query_one(Sidebar).toggle()

    def command_find(self, argument: str) -> None:
        self.query_one(Sidebar).find(argument)

    def command_delete(self, argument: str) -> None:
        session = self._talk()
        conversation = session.tree.conversation.id
        self._deletions.append((session.history.delete_conversation(conversation), conversation))
        self.stop()
        self.turn_to(None)
        self.tell(tr("the conversation was deleted"), tr("/redo brings it back"))

    def command_export(self, argument: str) -> None:
        from glmchat.chat.history.transcript import write_export

        self.tell(tr("written to {path}", path=str(write_export(self._talk().tree, argument))))
