"""The turn that one stands on: its keys, the row of what can be done with it, and its other versions."""

from __future__ import annotations

from collections.abc import Callable

from textual import events

from glmchat.chat.commands.actions import show_deletion
from glmchat.core.language import tr
from glmchat.tui.face import WindowFace
from glmchat.tui.talk import Talk
from glmchat.tui.transcript.turns import Turn
from glmchat.tui.view import View
from glmchat.tui.widgets.actions import ACTIONS, TurnActions


class Reading:
    """leave: what Esc does."""

    def __init__(
        self, view: View, talk: Talk, face: WindowFace, actions: TurnActions, leave: Callable[[], None]
    ) -> None:
        self._view = view
        self._talk = talk
        self._face = face
        self._actions = actions
        self._leave = leave
        self._typing = False  # letters are on their way to the prompt, which has not got the focus yet

    def press(self, event: events.Key) -> None:
        """Keys on the current turn, while the transcript has the focus; other letters go to the prompt."""
        transcript, prompt = self._view.transcript, self._view.prompt
        turn, key = transcript.current, event.key
        if turn is None:
            if event.is_printable and event.character:
                prompt.focus()
                prompt.insert(event.character)
                self._typing = True
                event.stop()
            elif (
                key == "enter" and self._typing
            ):  # typed in one go with the letters: it comes to the prompt behind them
                self._typing = False
                event.stop()
                prompt.app.post_message(events.Key(key, event.character))
            return
        act = next((a.act for a in ACTIONS if key in a.keys and turn.role in a.roles), None)
        if act is not None:
            event.stop()
            self.act(act)
        elif key in ("up", "k", "down", "j"):
            event.stop()
            self.step(-1 if key in ("up", "k") else 1)
        elif key == "enter":
            event.stop()
            transcript.toggle_fold(turn.key)

    def step(self, step: int) -> None:
        """To the turn above or below; below the last one stands the prompt."""
        transcript = self._view.transcript
        if transcript.move_current(step):
            transcript.focus()
        elif step > 0:
            transcript.make_current(None)
            self._view.prompt.focus()

    def act(self, act: str) -> None:
        """Do to the current turn what its row offers."""
        turn = self._view.transcript.current
        if turn is None:
            return
        name, _, words = act.partition(" ")
        if act == "copy" and turn.role == "user":
            self._face.copy_text(turn.text)
        elif act == "leave":
            self._leave()
        elif act not in ("previous", "next", "delete"):
            self._face.run(name, words)
        elif turn.key.isdigit():  # a question that is not stored yet has no versions
            message = int(turn.key)
            if act == "delete":
                self._talk.when_quiet(lambda: self._delete(message))
            else:
                self._talk.when_quiet(lambda: self._walk(message, -1 if act == "previous" else 1))

    def _delete(self, message: int) -> None:
        show_deletion(self._face, self._talk.chat.delete(message), tr("deleted"))

    def _walk(self, message: int, step: int) -> None:
        """Open the next version of a message."""
        versions, index = self._talk.chat.branches(message)
        if len(versions) > 1:
            self._open(versions[(index + step) % len(versions)].id)
            self._talk.measure()

    def show_message(self, message: int) -> None:
        """Step onto a message, on whichever branch it is. One that is being written keeps its branch open."""
        tree = self._talk.chat.tree
        if message not in {m.id for m in tree.path()} and message in tree.messages and not self._talk.busy:
            self._open(message)
        else:
            self._view.transcript.make_current(str(message))

    def _open(self, message: int) -> None:
        self._talk.chat.switch(message)
        self._talk.show_conversation()
        self._view.transcript.make_current(str(message))

    def offer_actions(self) -> None:
        """Another turn is the current one, or none."""
        turn = self._view.transcript.current
        if turn is None:
            self._actions.offer(())
            return
        self._view.transcript.focus()
        hidden = () if self._has_versions(turn) else ("previous", "next")
        self._actions.offer(tuple(a for a in ACTIONS if turn.role in a.roles and a.act not in hidden))

    def _has_versions(self, turn: Turn) -> bool:
        tree = self._talk.session.tree if self._talk.session is not None else None
        message = tree.messages.get(int(turn.key)) if tree is not None and turn.key.isdigit() else None
        return message is not None and tree is not None and len(tree.siblings(message)) > 1
