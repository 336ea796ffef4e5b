"""Commands on what was said: begin anew, stop, ask again, edit, take back, copy, quote, walk between versions.

Each acts at once. Where an answer is being written, one that changes this conversation stops it first and keeps what
was said; one that leaves the conversation lets it go on there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glmchat.chat.answer_words import details_of
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.messages import parse_sampling_value, sampling_name
from glmchat.core.text import human_bytes
from glmchat.tui import terminal
from glmchat.tui.conversation import columns
from glmchat.tui.talk import Conversing
from glmchat.tui.transcript.blocks import code_blocks
from glmchat.tui.transcript.turns import Turn

if TYPE_CHECKING:
    from glmchat.chat.history.rows import StoredMessage


class Editing(Conversing):
    _deletions: list[tuple[int, int]]  # (deletion, conversation), for /redo
    _editing: int | None = None  # id of the question that is being edited

    def command_new(self, argument: str) -> None:
        self.turn_to(None)
        self._stop_editing()
        self.measure()

    def command_clear(self, argument: str) -> None:
        self.when_quiet(self._clear)

    def _clear(self) -> None:
        mark = self._talk().clear()
        if mark is None:
            self.tell(tr("the context is empty already"))
            return
        self.transcript.drop("unseen")
        self.transcript.add(Turn(str(mark.id), "rule", tr("new context")))
        self.measure()

    def command_stop(self, argument: str) -> None:
        if not self.stop() and not self.stop_behind():
            self.tell(tr("no answer is being written"))

    def command_regen(self, argument: str) -> None:
        changes = {}
        for pair in argument.split():
            word, _, value = pair.partition("=")
            name = sampling_name(word)
            changes[name] = parse_sampling_value(name, value)
        self._talk().sampling(changes)  # complains of a value out of range before anything is stopped
        self._must_be_ready()
        self.when_quiet(lambda: self._regenerate(changes))

    def _regenerate(self, changes: Mapping[str, Any]) -> None:
        self.answer(self._talk().regenerate(changes or None, self._current_message("assistant")))

    def command_continue(self, argument: str) -> None:
        from glmchat.chat.turns import already_streaming

        if self.busy:
            raise already_streaming()
        self._must_be_ready()
        self.answer(self._talk().continue_answer())

    def command_undo(self, argument: str) -> None:
        self.when_quiet(self._undo)

    def _undo(self) -> None:
        self._deleted(self._talk().undo(), tr("taken back"))

    def _deleted(self, deletion: int, words: str) -> None:
        self._deletions.append((deletion, self._talk().tree.conversation.id))
        self.show_conversation()
        self.tell(words, tr("/redo brings it back"))
        self.measure()

    def command_redo(self, argument: str) -> None:
        if not self._deletions:
            raise Usage(
                tr("nothing was taken back"), hint=tr("/undo takes back the last question"), code="chat.nothing_to_redo"
            )
        self.when_quiet(self._redo)

    def _redo(self) -> None:
        """Bring back what was deleted last, in whichever conversation that was."""
        session = self._talk()
        deletion, conversation = self._deletions.pop()
        if conversation == session.tree.conversation.id:
            session.restore(deletion)
            self.show_conversation()
        else:
            session.history.restore(deletion)
            self.turn_to(conversation)
        self.measure()

    def command_edit(self, argument: str) -> None:
        session = self._talk()
        chosen = self._current_message("user")
        path = session.tree.path()
        question = next((m for m in reversed(path) if m.role == "user" and (chosen is None or m.id == chosen)), None)
        if question is None:
            raise Usage(tr("there is no question to edit"), hint=tr("ask something first"), code="chat.nothing_to_edit")
        self._editing = question.id
        self.prompt.set_text(question.text)
        self.prompt.focus()
        self.show_prompt_state()

    def ask_edited(self, text: str) -> None:
        """The question that was being edited, in other words, on a branch of its own."""
        question = self._editing
        assert question is not None
        self._stop_editing()
        self.when_quiet(lambda: self.answer(self._talk().edit(question, text)))

    def _stop_editing(self) -> None:
        self._editing = None
        self.show_prompt_state()

    def delete_message(self, message: int) -> None:
        self.when_quiet(lambda: self._deleted(self._talk().delete(message), tr("deleted")))

    def command_copy(self, argument: str) -> None:
        session = self._talk()
        word = argument.lower()
        if word == "all":
            text = "\n\n".join(f"{m.role}: {m.text}" for m in session.tree.path() if not m.is_clear)
        else:
            answer = self._answer_meant()
            text = answer.text
            if word == "code":
                blocks = code_blocks(text)
                if not blocks:
                    raise Usage(
                        tr("there is no code in that answer"), hint=tr("/copy copies all of it"), code="copy.no_code"
                    )
                text = "\n\n".join(blocks)
        self.copy_text(text)

    def copy_text(self, text: str) -> None:
        """To the terminal's clipboard and to a file; says which."""
        copied = terminal.copy(text)
        if copied.sequence is not None:
            self.write_to_terminal(copied.sequence)
        self.notify(copied.words(), timeout=4)

    def write_to_terminal(self, sequence: str) -> None:
        driver = self.app._driver  # Textual offers no public way to write a sequence past its screen
        if driver is not None and not self.app.is_headless:
            driver.write(sequence)
            driver.flush()

    def command_quote(self, argument: str) -> None:
        answer = self._answer_meant()
        quoted = "\n".join(f"> {line}" for line in answer.text.splitlines())
        self.prompt.set_text(f"{quoted}\n\n{self.prompt.text}")
        self.prompt.focus()

    def _current_message(self, role: str) -> int | None:
        """The id of the turn that the keyboard stands on, if it is of that role."""
        current = self.transcript.current
        return int(current.key) if current is not None and current.role == role and current.key.isdigit() else None

    def _answer_meant(self) -> StoredMessage:
        session = self._talk()
        chosen = self._current_message("assistant")
        found = next(
            (m for m in reversed(session.tree.path()) if m.role == "assistant" and (chosen is None or m.id == chosen)),
            None,
        )
        if found is None:
            raise Usage(tr("there is no answer yet"), hint=tr("ask something first"), code="chat.no_answer")
        return found

    def walk_branch(self, message: int, step: int) -> None:
        """Open the next version of a message."""
        self.when_quiet(lambda: self._walk(message, step))

    def _walk(self, message: int, step: int) -> None:
        session = self._talk()
        versions, index = session.branches(message)
        if len(versions) > 1:
            chosen = versions[(index + step) % len(versions)]
            session.switch(chosen.id)
            self.show_conversation()
            self.transcript.make_current(str(chosen.id))
            self.measure()

    def command_stats(self, argument: str) -> None:
        rows = details_of(self._answer_meant())
        if memory := self.status.facts.memory:
            rows.append((tr("memory now"), human_bytes(memory)))
        self.tell(tr("about this answer"), columns(rows, self.transcript.measure - 2))

    def _must_be_ready(self) -> None:
        if not self.ready and self.status.facts.activity:
            raise Usage(tr("the model is still loading"), hint=tr("try again in a moment"), code="chat.loading")
        if not self.ready:
            raise Usage(
                tr("the model is not ready"),
                hint=tr("F5 starts it again, /model chooses another"),
                code="chat.not_ready",
            )

    def show_prompt_state(self) -> None:
        raise NotImplementedError
