"""The chat screen's `/compare`: opens the comparison, and goes on with the answer that was picked there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.tui.face import Commanding

if TYPE_CHECKING:
    from glmchat.chat.compare.compare import Comparison
    from glmchat.chat.compare.engines import Running
    from glmchat.chat.launch import LaunchOptions


class Comparing(Commanding):
    def command_compare(self, argument: str) -> None:
        """The first line names the columns; what follows is the question. Alone: the last comparison made here."""
        self.stop_behind()
        self.when_quiet(lambda: self._compare(argument))

    def _compare(self, argument: str) -> None:
        from glmchat.chat.compare import compare
        from glmchat.chat.compare.columns import beside
        from glmchat.tui.screens.comparison import ComparisonScreen

        session = self._talk()
        if not self.ready and self.status.facts.activity:
            raise Usage(tr("the model is still loading"), hint=tr("try again in a moment"), code="chat.loading")
        names, _, text = argument.partition("\n")
        base, running = self._common(), self._engine_here()
        if names.strip():
            model = self.launch.model if self.launch.server is None else None
            columns = beside(model, session.adapters, names.split())
            made = compare.Comparison(
                session.history, columns, self.settings, base=base, tree=session.tree, running=running
            )
        elif compare.asked_in(session.tree) is not None:
            made = compare.resume(session.history, session.tree, self.settings, base, running)
        else:
            self.prompt.set_text("/compare ")
            self.prompt.focus()
            return
        earlier = next((m for m in reversed(session.tree.context()) if m.role == "user"), None)
        self.app.push_screen(
            ComparisonScreen(made, earlier, text.strip()),
            lambda column: self.guarded(lambda: self._compared(made, column)),
        )

    def _common(self) -> LaunchOptions:
        """What all columns share: the flags of this window and the settings of this conversation."""
        asked = self._talk().ranks.asked
        sampling = {**asked.get("conversation", {}), **asked.get("set", {}), **asked.get("flag", {})}
        return replace(self.launch, server=None, sampling=sampling, adapters=None)

    def _engine_here(self) -> Running | None:
        from glmchat.chat.compare.engines import Running
        from glmchat.chat.connect import Connection

        process = self.link.process
        if not self.ready or self._ready is None or process is None:
            return None
        connection = Connection(self._ready.endpoint, self._ready.identity, process)
        return Running(self.launch, connection, self.link.stop)

    def _compared(self, made: Comparison, column: int | None) -> None:
        """The comparison was left; column: the answer to go on with. Its model, adapters and settings come along."""
        from glmchat.chat import model_choice
        from glmchat.chat.compare.engines import engine_key

        session, answers = self._talk(), made.answers()
        if column is not None:
            made.pick(column)
            for name, value in made.columns[column].sampling.items():
                session.set(name, value)
        elif answers:
            session.switch(answers[min(answers)].id)
        self.show_conversation()
        self.show_adapters()
        if column is not None and engine_key(made.launches[column]) != engine_key(self.launch):
            self._switch_to(*model_choice.locate(made.columns[column].name))
        elif self.ready and self.launch.server is None and self.link.process is None:
            self.connect()  # it had to go, so that another could be loaded
        else:
            self.measure()
