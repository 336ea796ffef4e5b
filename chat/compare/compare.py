"""One question to several columns, whose answers are siblings below it in the history."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from glmchat.chat import connect as connecting
from glmchat.chat.answering import SeenContext, SessionEvent
from glmchat.chat.compare.columns import (
    Column,
    OneByOne,
    Running,
    Together,
    decide,
    demand_of,
    group,
    launches,
    lots,
    parse_columns,
)
from glmchat.chat.connect import Connection
from glmchat.chat.history.history import History
from glmchat.chat.history.rows import ConversationSettings, StoredMessage, Tree
from glmchat.chat.launch import LaunchOptions
from glmchat.chat.sampling_choice import ranks_for_launch
from glmchat.chat.session import ChatSession
from glmchat.chat.turns import AnswerSettings
from glmchat.core.errors import EngineDied, Failed, GlmchatError, Usage
from glmchat.core.language import tr
from glmchat.core.settings import Settings

COMPARE_KEY = "compare"  # in the details of a question: the columns; of an answer: which of them it is


class ColumnSession(ChatSession):
    """A session of one column. All columns share one tree; the conversation's own settings stay as they are."""

    def __init__(self, comparison: Comparison, column: int, connection: Connection) -> None:
        self._comparison, self._number = comparison, column
        launch = comparison.launches[column]
        folder = launch.engine.files_folder
        super().__init__(
            comparison.history,
            connection.endpoint,
            comparison.tree.conversation.id,
            identity=connection.identity,
            ranks=ranks_for_launch(launch.sampling, catalogue=launch.engine.sampling, folder=folder),
            default_system=comparison.settings.system,
            context_policy=comparison.settings.context_policy,
        )

    def open(self, conversation: int) -> Tree:
        self.tree = self._comparison.tree
        self._turns.seen = SeenContext()
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

    def answer_settings(self, only_now: Mapping[str, Any] | None = None) -> AnswerSettings:
        mark = {"column": self._number, "text": self._comparison.columns[self._number].text}
        return replace(super().answer_settings(only_now), mark={COMPARE_KEY: mark})


_UNFINISHED = ("interrupted", "streaming", "failed")


@dataclass(frozen=True, slots=True)
class Loading:
    column: int
    stage: str
    done: float


@dataclass(frozen=True, slots=True)
class Said:
    """What the session of a column says: Begun, Started, Piece …, Finished, Done."""

    column: int
    event: SessionEvent


@dataclass(frozen=True, slots=True)
class ColumnFailed:
    column: int
    error: GlmchatError


ComparisonEvent = Together | OneByOne | Loading | Said | ColumnFailed


class Comparison:
    """See the module. base: what all columns have in common; tree: a conversation to go on in (else a new one);
    running: an engine that is there already and answers the columns of its model.
    """

    def __init__(
        self,
        history: History,
        columns: Sequence[Column],
        settings: Settings,
        *,
        base: LaunchOptions | None = None,
        tree: Tree | None = None,
        running: Running | None = None,
        one_by_one: bool = False,
    ) -> None:
        """Raises Usage for fewer than two columns, UnknownModel, NotInstalled for what is not here."""
        if len(columns) < 2:
            raise Usage(
                tr("a comparison needs two columns or more"),
                hint=tr("glmchat compare -p TEXT A B"),
                code="compare.columns",
            )
        base = base or LaunchOptions()
        self.history, self.columns, self.settings = history, tuple(columns), settings
        self.launches = tuple(launches(columns, base))
        self.tree = tree or history.new(self.launches[0].engine.model, ConversationSettings(system=base.system))
        self.question: StoredMessage | None = None
        self._sampling = dict(base.sampling)
        self._running = running
        self._why_in_turn = tr("as requested") if one_by_one else ""
        self._stopping = threading.Event()
        self._sessions: dict[int, ColumnSession] = {}
        self._lock = threading.Lock()

    def ask(self, text: str) -> Generator[ComparisonEvent, None, None]:
        """Store the question, then let every column answer it. A column that fails does not stop the others."""
        self.question = self.history.append(self.tree, "user", text, details=self._described())
        yield from self._run(range(len(self.columns)))

    def ask_again(self, question: StoredMessage) -> Generator[ComparisonEvent, None, None]:
        """Let every column answer a question that was asked before; its earlier answers are kept."""
        self.question = self.history.describe_answer(self.tree, question, self._described())
        yield from self._run(range(len(self.columns)))

    def _described(self) -> dict[str, Any]:
        """What `resume` finds with the question."""
        return {COMPARE_KEY: [column.text for column in self.columns], "sampling": self._sampling}

    def missing(self) -> list[int]:
        """Columns without an answer, or whose answer was interrupted."""
        answers = self.answers()
        return [i for i in range(len(self.columns)) if i not in answers or answers[i].state in _UNFINISHED]

    def go_on(self) -> Generator[ComparisonEvent, None, None]:
        """Bring the answers that are missing; an interrupted one is continued from its last token."""
        self._stopping.clear()
        self._why_in_turn = tr("a branch is open while its answer is continued")
        yield from self._run(self.missing())

    def answers(self) -> dict[int, StoredMessage]:
        """Column -> its last answer."""
        question, answers = self.question, dict[int, StoredMessage]()
        for _, message in sorted(self.tree.messages.items()):
            mark = message.details.get(COMPARE_KEY)
            if question and message.parent == question.id and message.deletion is None and isinstance(mark, Mapping):
                number, text = mark.get("column"), mark.get("text")
                if isinstance(number, int) and number < len(self.columns) and self.columns[number].text == text:
                    answers[number] = message
        return answers

    def pick(self, column: int) -> Tree:
        """Go on with the answer of this column: its branch, model, adapters and settings. Raises Usage."""
        answer = self.answers().get(column)
        if answer is None:
            raise Usage(tr("this column has no answer"), hint=tr("choose another"), code="compare.no_answer")
        chosen = self.columns[column]
        self.history.open_branch(self.tree, answer)
        settings = self.tree.conversation.settings
        settings = replace(settings, adapters=chosen.adapters, sampling={**settings.sampling, **chosen.sampling})
        self.history.change(self.tree, model=self.launches[column].engine.model, settings=settings)
        return self.tree

    def stop(self) -> None:
        """End all running answers, and begin no other; what was said is kept."""
        with self._lock:
            self._stopping.set()
            sessions = list(self._sessions.values())
        for session in sessions:
            session.stop()

    # Engines.

    def _run(self, columns: Sequence[int]) -> Generator[ComparisonEvent, None, None]:
        groups = group(self.launches, columns, self._running)
        how = decide([self.launches[g[0]] for g in groups], self._running)
        if self._why_in_turn and len(columns) > 1:
            how = OneByOne(self._why_in_turn)
        elif isinstance(how, Together):
            how = replace(how, lots=max(len(self._lots(g)) for g in groups) if groups else 1)
        yield how
        threads = how.threads if isinstance(how, Together) else None
        events: queue.SimpleQueue[ComparisonEvent | None] = queue.SimpleQueue()
        lines = [[g] for g in groups] if isinstance(how, Together) else [groups]
        workers = [
            threading.Thread(target=self._work, args=(line, threads, events.put), daemon=True, name=f"engine-{n}")
            for n, line in enumerate(lines)
        ]
        for worker in workers:
            worker.start()
        try:
            left = len(workers)
            while left:
                event = events.get()
                if event is None:
                    left -= 1
                else:
                    yield event
        finally:
            if any(worker.is_alive() for worker in workers):
                self.stop()
            for worker in workers:
                worker.join(5.0)

    def _work(
        self, groups: Sequence[Sequence[int]], threads: int | None, put: Callable[[ComparisonEvent | None], None]
    ) -> None:
        """One thread: its engines one after the other, and the columns of each."""
        try:
            for group in groups:
                if self._stopping.is_set():
                    return
                self._one_engine(group, threads, put)
        finally:
            put(None)

    def _one_engine(self, group: Sequence[int], threads: int | None, put: Callable[[ComparisonEvent], None]) -> None:
        launch = self.launches[group[0]]
        if launch.engine.threads is None and threads is not None:
            launch = replace(launch, engine=replace(launch.engine, threads=threads))
        waiting = list(group)
        try:
            if self._running is not None and self._running.answers(launch):
                self._answers(waiting, self._running.connection, put)
                return
            self._make_room(launch)
            connection = connecting.connect(
                launch, lambda stage, done: put(Loading(group[0], stage, done)), self._stopping.is_set
            )
            with connection:
                self._answers(waiting, connection, put)
        except GlmchatError as error:
            if not self._stopping.is_set():
                for column in waiting:
                    put(ColumnFailed(column, error))
        except Exception as error:  # noqa: BLE001 - a thread has nobody else to tell; the face shows it
            failed = Failed(
                f"{type(error).__name__}: {error}", hint=tr("please report this bug"), code="compare.failed"
            )
            for column in waiting:
                put(ColumnFailed(column, failed))

    def _make_room(self, launch: LaunchOptions) -> None:
        """Let the engine go that ran before the comparison, if its memory is needed; it has answered by then."""
        if self._running is None:
            return
        device, size, free = demand_of(launch)
        on_card = (self._running.connection.identity.device or "").startswith("cuda")
        # A card that it has to itself is worth more to the next engine than the CPU beside it.
        if (size is not None and free is not None and size > free) or (device == "cpu" and on_card):
            self._running.release()
            self._running = None

    def _lots(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        return [[number] for number in numbers] if self._why_in_turn else lots(numbers)

    def _answers(self, waiting: list[int], connection: Connection, put: Callable[[ComparisonEvent], None]) -> None:
        """The columns of one engine, lot by lot; `waiting` loses each that has answered. Raises what the first one of
        a lot raises that has no engine any more."""

        def work(column: int, begun: threading.Event) -> None:
            try:
                self._one_answer(column, connection, put, begun)
            finally:
                begun.set()
            waiting.remove(column)

        for lot in self._lots(waiting):
            answers = []
            with ThreadPoolExecutor(len(lot), "column") as threads:
                for column in lot:
                    if self._stopping.is_set():
                        return
                    answers.append(threads.submit(work, column, begun := threading.Event()))
                    begun.wait()  # in the history the answers stand in the order of the columns
            for answer in answers:
                answer.result()

    def _one_answer(
        self, column: int, connection: Connection, put: Callable[[ComparisonEvent], None], begun: threading.Event
    ) -> None:
        """begun: set once the answer has its place in the history.

        Raises EngineDied, as the columns behind it have no engine either; other errors are this column's own.
        """
        session = ColumnSession(self, column, connection)
        with self._lock:
            if self._stopping.is_set():
                return
            self._sessions[column] = session
        try:
            for event in session.answer():
                put(Said(column, event))
                begun.set()
        except EngineDied as error:
            raise connection.cause(error) from None
        except GlmchatError as error:
            put(ColumnFailed(column, error))
        finally:
            with self._lock:
                del self._sessions[column]


def asked_in(tree: Tree) -> StoredMessage | None:
    """The last question of a conversation that was put to a comparison."""
    marked = (m for m in tree.messages.values() if isinstance(m.details.get(COMPARE_KEY), list) and m.deletion is None)
    return max(marked, key=lambda m: m.id, default=None)


def resume(
    history: History,
    tree: Tree,
    settings: Settings,
    base: LaunchOptions | None = None,
    running: Running | None = None,
) -> Comparison:
    """The last comparison of a conversation, to look at it or to bring what is missing. Raises Usage for none."""
    question = asked_in(tree)
    if question is None:
        raise Usage(
            tr("conversation {id} contains no comparison", id=tree.conversation.id),
            hint=tr("glmchat compare -p TEXT A B"),
            code="compare.none",
        )
    columns = parse_columns(question.details[COMPARE_KEY])
    common = question.details.get("sampling") or {}
    common = {name: tuple(value) if isinstance(value, list) else value for name, value in common.items()}
    base = replace(base or LaunchOptions(), sampling=common)
    comparison = Comparison(history, columns, settings, base=base, tree=tree, running=running)
    comparison.question = question
    return comparison
