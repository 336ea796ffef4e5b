"""`/compare` of the chat screen: opens the comparison, and goes on with the answer that was picked there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.tui.connection import ModelConnection
from glmchat.tui.talk import Talk
from glmchat.tui.view import View

if TYPE_CHECKING:
    from glmchat.chat.compare.columns import Running
    from glmchat.chat.compare.compare import Comparison
    from glmchat.chat.launch import LaunchOptions
    from glmchat.core.settings import Settings
    from glmchat.hub.installed import Installed


class Comparing:
    """switch_to: goes on with another model, which a person picked."""

    def __init__(
        self,
        view: View,
        talk: Talk,
        connection: ModelConnection,
        settings: Settings,
        switch_to: Callable[[Installed, int | None], None],
    ) -> None:
        self._view = view
        self._talk = talk
        self._connection = connection
        self._settings = settings
        self._switch_to = switch_to

    def open(self, words: str) -> None:
        """The first line names the columns; what follows is the question. Alone: the last comparison made here."""
        from glmchat.chat.compare import compare
        from glmchat.chat.compare.columns import beside
        from glmchat.tui.screens.comparison import ComparisonScreen

        chat, launch = self._talk.chat, self._connection.launch
        self._connection.require_loaded()
        names, _, text = words.partition("\n")
        shared, running = self._shared(), self._engine_here()
        if names.strip():
            columns = beside(launch.engine.model if launch.server is None else None, chat.adapters, names.split())
            comparison = compare.Comparison(
                chat.history, columns, self._settings, base=shared, tree=chat.tree, running=running
            )
        elif compare.asked_in(chat.tree) is not None:
            comparison = compare.resume(chat.history, chat.tree, self._settings, shared, running)
        else:
            self._view.prompt.set_text("/compare ")
            self._view.prompt.focus()
            return
        earlier = next((m for m in reversed(chat.tree.context()) if m.role == "user"), None)
        self._view.app.push_screen(
            ComparisonScreen(comparison, earlier, text.strip()), lambda column: self._left(comparison, column)
        )

    def open_versions(self, count: int, pairs: Sequence[str], seed: int | None, message: int | None) -> None:
        """So many answers of what answers here to the question that `message` answers (None: the last one), of which
        one is picked. The settings are of these answers alone. Raises Usage for a model on a server.
        """
        from glmchat.chat.compare import compare
        from glmchat.chat.compare.columns import versions
        from glmchat.tui.screens.comparison import ComparisonScreen

        chat, launch = self._talk.chat, self._connection.launch
        if launch.server is not None:
            raise Usage(
                tr("several answers to choose from need a model that runs here"),
                hint=tr("/regen asks for one"),
                code="regen.server",
            )
        self._connection.require_loaded()
        question = chat.tree.question(message)
        columns = versions(launch.engine.model, chat.adapters, count, pairs, seed)
        comparison = compare.Comparison(
            chat.history, columns, self._settings, base=self._shared(), tree=chat.tree, running=self._engine_here()
        )
        self._view.app.push_screen(
            ComparisonScreen(comparison, question, question.text),
            lambda column: self._chosen(comparison, column),
        )

    def _chosen(self, comparison: Comparison, column: int | None) -> None:
        answers = comparison.answers()
        if answers:
            number = column if column in answers else min(answers)
            self._talk.chat.switch(answers[number].id)
        self._talk.show_conversation()
        self._talk.measure()

    def _shared(self) -> LaunchOptions:
        """What all columns share: the flags of this window and the settings of this conversation."""
        asked = self._talk.chat.ranks.asked
        sampling = {**asked.get("conversation", {}), **asked.get("set", {}), **asked.get("flag", {})}
        return replace(self._connection.launch, server=None, sampling=sampling, adapters=None)

    def _engine_here(self) -> Running | None:
        from glmchat.chat.compare.columns import Running
        from glmchat.chat.connect import Connection

        link, answers = self._connection.link, self._connection.answers
        process = link.process
        if not self._connection.ready or answers is None or process is None:
            return None
        return Running(self._connection.launch, Connection(answers.endpoint, answers.identity, process), link.stop)

    def _left(self, comparison: Comparison, column: int | None) -> None:
        """column: the answer to go on with. Its model, adapters and settings come along."""
        from glmchat.chat.compare.columns import engine_key
        from glmchat.chat.launch import locate

        chat, answers, launch = self._talk.chat, comparison.answers(), self._connection.launch
        if column is not None:
            comparison.pick(column)
            for name, value in comparison.columns[column].sampling.items():
                chat.set(name, value)
        elif answers:
            chat.switch(answers[min(answers)].id)
        self._talk.show_conversation()
        self._talk.show_in_force()
        if column is not None and engine_key(comparison.launches[column]) != engine_key(launch):
            self._switch_to(*locate(comparison.columns[column].name))
        elif self._connection.ready and launch.server is None and self._connection.link.process is None:
            self._connection.connect()  # it had to go, so that another could be loaded
        else:
            self._talk.measure()
