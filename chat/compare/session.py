"""The session of one column of a comparison."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from glmchat.chat.answering import SessionEvent
from glmchat.chat.connect import Connection
from glmchat.chat.history.rows import Tree
from glmchat.chat.sampling_choice import ChosenSampling, ranks_for_launch
from glmchat.chat.session import ChatSession

if TYPE_CHECKING:
    from glmchat.chat.compare.compare import Comparison

DETAIL = "compare"  # in the details of a question: the columns; of an answer: which of them it is


class ColumnSession(ChatSession):
    """A session of one column. All columns share one tree; the conversation's own settings stay as they are."""

    def __init__(self, comparison: Comparison, column: int, connection: Connection) -> None:
        self._comparison, self._number = comparison, column
        launch = comparison.launches[column]
        folder = launch.folder if launch.folder is None or launch.folder.is_dir() else launch.folder.parent
        super().__init__(
            comparison.history,
            connection.endpoint,
            comparison.tree.conversation.id,
            identity=connection.identity,
            ranks=ranks_for_launch(launch.sampling, catalogue=launch.defaults, folder=folder),
            default_system=comparison.settings.system,
            context_policy=comparison.settings.context_policy,
        )

    def open(self, conversation: int) -> Tree:
        self.tree = self._comparison.tree
        self.unseen = ()
        return self.tree

    @property
    def adapters(self) -> tuple[tuple[str, float], ...]:
        return self._comparison.columns[self._number].adapters

    def answer(self) -> Generator[SessionEvent, None, None]:
        """A new answer, or the rest of one that was interrupted."""
        question = self._comparison.question
        assert question is not None
        before = self._comparison.answers().get(self._number)
        if before is not None and before.state == "interrupted" and before.can_continue:
            self.history.open_branch(self.tree, before)
            yield from self.continue_answer()
        else:
            yield from self.regenerate(message=question.id)

    def _details(self, chosen: ChosenSampling) -> dict[str, Any]:
        mark = {"column": self._number, "text": self._comparison.columns[self._number].text}
        return {**super()._details(chosen), DETAIL: mark}
