"""The chat screen's transcript: the current turn, its keys, and what a click on it does."""

from __future__ import annotations

from textual import events

from glmchat.core.language import tr
from glmchat.tui.composer import Prompting
from glmchat.tui.transcript.transcript import Clicked
from glmchat.tui.transcript.turns import Turn
from glmchat.tui.widgets.actions import ACTIONS, TurnActions
from glmchat.tui.widgets.suggestions import Suggestions


class Reading(Prompting):
    """No layout: it asks the screen for its widgets."""

    def action_escape(self) -> None:
        """Stop the answer; else leave, one after the other: editing, the current turn, the transcript's focus."""
        if self.stop():
            return
        if self._editing is not None:
            self.prompt.set_text("")
            self._stop_editing()
        elif self.transcript.current is not None or self.focused is not self.prompt:
            self.transcript.make_current(None)
            self.transcript.search("")
            self.prompt.focus()
        elif self.query_one(Suggestions).found:
            self.query_one(Suggestions).suggest([])
            self.prompt.suggesting = False
        else:
            self.stop_behind()

    def action_interrupt(self) -> None:
        """Ctrl+C: a selection is copied, an answer is stopped, and an idle window says how to leave."""
        if selected := self.transcript.selected_text:
            self.copy_text(selected)
            self.transcript.clear_selection()
        elif self.prompt.has_focus and self.prompt.selected_text:
            self.copy_text(self.prompt.selected_text)
        elif not self.stop() and not self.stop_behind():
            self.notify(tr("Ctrl+Q or /quit leaves"), timeout=3)

    def action_step(self, step: int) -> None:
        if self.transcript.move_current(step):
            self.transcript.focus()
        elif step > 0:
            self.transcript.make_current(None)
            self.prompt.focus()

    def action_page(self, pages: int) -> None:
        self.transcript.scroll_page(pages)

    def action_end(self) -> None:
        self.transcript.action_go_end()

    def action_hit(self, step: int) -> None:
        self.transcript.go_to_hit(step)

    def on_key(self, event: events.Key) -> None:
        """Keys on the current turn, while the transcript has the focus; other letters go to the prompt."""
        if not self.transcript.has_focus:
            return
        turn = self.transcript.current
        key = event.key
        if turn is None:
            if event.is_printable and event.character:
                self.prompt.focus()
                self.prompt.insert(event.character)
                event.stop()
            return
        act = next((a.act for a in ACTIONS if key in a.keys and turn.role in a.roles), None)
        if act is not None:
            self._act(turn, act)
        elif key in ("up", "k", "down", "j"):
            self.action_step(-1 if key in ("up", "k") else 1)
        elif key == "enter":
            self.transcript.toggle_fold(turn.key)
        else:
            return
        event.stop()

    def _act(self, turn: Turn, act: str) -> None:
        name, _, argument = act.partition(" ")
        if act == "copy" and turn.role == "user":
            self.copy_text(turn.text)
        elif act == "leave":
            self.action_escape()
        elif act in ("previous", "next", "delete"):
            if turn.key.isdigit():  # a question that is not stored yet has no versions
                message = int(turn.key)
                steps = {"previous": -1, "next": 1}
                self.guarded(
                    lambda: self.walk_branch(message, steps[act]) if act in steps else self.delete_message(message)
                )
        else:
            self.run_command(name, argument)

    def on_turn_actions_chosen(self, event: TurnActions.Chosen) -> None:
        if (turn := self.transcript.current) is not None:
            self._act(turn, event.act)

    def on_clicked(self, event: Clicked) -> None:
        if event.name == "copy-code":
            self.copy_text(event.argument)
        elif event.name == "open-link":
            # Opening would start a browser on the machine that glmchat runs on, which over SSH is the wrong one.
            self.copy_text(event.argument)

    def on_transcript_current_changed(self) -> None:
        turn = self.transcript.current
        if turn is None:
            self.query_one(TurnActions).offer(())
            return
        self.transcript.focus()
        versions = self._versions(turn)
        self.query_one(TurnActions).offer(
            tuple(a for a in ACTIONS if turn.role in a.roles and (versions or a.act not in ("previous", "next")))
        )

    def _versions(self, turn: Turn) -> bool:
        """Are there other versions of this turn?"""
        tree = self.session.tree if self.session is not None else None
        message = tree.messages.get(int(turn.key)) if tree is not None and turn.key.isdigit() else None
        return message is not None and tree is not None and len(tree.siblings(message)) > 1
