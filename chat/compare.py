"""One prompt to several models, quantisations, adapters or settings, side by side.

    comparison = Comparison(history, parse_columns(["smollm2", "smollm2:int4,temp=0"]), settings)
    for event in comparison.ask("hello"):       # Together or OneByOne, then for each column Loading…, Said…, Failed
        ...
    comparison.pick(1)                          # goes on with the second

The answers are versions of one answer in the history: siblings below the question, each with its identity. Iterate in a
worker thread; `stop()` may be called from any other. What was said when the process is killed is kept; `resume` brings
what is missing.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from glmchat.chat import connect as connecting
from glmchat.chat.answering import SessionEvent
from glmchat.chat.comparison_columns import Column, launches, parse_columns
from glmchat.chat.connect import Connection
from glmchat.chat.history import History
from glmchat.chat.launch import LaunchOptions
from glmchat.chat.preflight import estimate
from glmchat.chat.records import ConversationSettings, StoredMessage, Tree
from glmchat.chat.sampling_choice import ChosenSampling, ranks_for_launch
from glmchat.chat.session import ChatSession
from glmchat.core.errors import EngineDied, Failed, GlmchatError, Usage
from glmchat.core.language import tr
from glmchat.core.machine import available_memory, physical_cores
from glmchat.core.settings import Settings
from glmchat.core.text import human_bytes

_DETAIL = "compare"  # in the details of a question: the columns; of an answer: which of them it is
_UNFINISHED = ("interrupted", "streaming", "failed")


@dataclass(frozen=True, slots=True)
class Together:
    """All columns answer at the same time; threads: of each engine, None if there is only one engine."""

    engines: int
    threads: int | None


@dataclass(frozen=True, slots=True)
class OneByOne:
    """The engines take turns, and why."""

    reason: str


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
    """See the module. base: what all columns have in common; conversation: one to go on in (else a new one)."""

    def __init__(
        self,
        history: History,
        columns: Sequence[Column],
        settings: Settings,
        *,
        base: LaunchOptions | None = None,
        conversation: int | None = None,
        one_by_one: bool = False,
    ) -> None:
        """Raises Usage for fewer than two columns, UnknownModel, NotInstalled for what is not here."""
        if len(columns) < 2:
            raise Usage(
                tr("a comparison needs two columns or more"),
                hint=tr("glmchat compare -p TEXT A B"),
                code="compare.columns",
            )
        self.history, self.columns, self.settings = history, tuple(columns), settings
        self.launches = tuple(launches(columns, base or LaunchOptions()))
        self._one_by_one = one_by_one
        self._sampling = dict(base.sampling) if base else {}
        self._system = base.system if base else None
        self.tree: Tree = (
            history.load(conversation)
            if conversation is not None
            else history.new(self.launches[0].model, ConversationSettings(system=self._system))
        )
        self.question: StoredMessage | None = None
        self._stopping = threading.Event()
        self._sessions: dict[int, _Column] = {}
        self._lock = threading.Lock()

    def ask(self, text: str) -> Generator[ComparisonEvent, None, None]:
        """Store the question, then let every column answer it. A column that fails does not stop the others."""
        details = {_DETAIL: [column.text for column in self.columns], "sampling": self._sampling}
        self.question = self.history.append(self.tree, "user", text, details=details)
        yield from self._run(range(len(self.columns)))

    def missing(self) -> list[int]:
        """Columns without an answer, or whose answer was interrupted."""
        answers = self.answers()
        return [i for i in range(len(self.columns)) if i not in answers or answers[i].state in _UNFINISHED]

    def go_on(self) -> Generator[ComparisonEvent, None, None]:
        """Bring the answers that are missing; an interrupted one is continued from its last token."""
        self._one_by_one = True  # a branch is open while its answer is continued
        yield from self._run(self.missing())

    def answers(self) -> dict[int, StoredMessage]:
        """Column -> its last answer."""
        below = self.question.id if self.question else None
        found: dict[int, StoredMessage] = {}
        for message in sorted(self.tree.messages.values(), key=lambda m: m.id):
            mark = message.details.get(_DETAIL)
            if message.parent == below and message.deletion is None and isinstance(mark, Mapping):
                found[int(mark.get("column", -1))] = message
        return found

    def pick(self, column: int) -> Tree:
        """Go on with the answer of this column: its branch, model, adapters and settings. Raises Usage."""
        answer = self.answers().get(column)
        if answer is None:
            raise Usage(tr("this column has no answer"), hint=tr("choose another"), code="compare.no_answer")
        chosen = self.columns[column]
        self.history.open_branch(self.tree, answer)
        settings = self.tree.conversation.settings
        settings = replace(settings, adapters=chosen.adapters, sampling={**settings.sampling, **chosen.sampling})
        self.history.change(self.tree, model=self.launches[column].model, settings=settings)
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
        groups = self._groups(columns)
        how = self._how(groups)
        yield how
        threads = how.threads if isinstance(how, Together) else None
        events: queue.SimpleQueue[ComparisonEvent | None] = queue.SimpleQueue()
        together = isinstance(how, Together)
        lots = [[group] for group in groups] if together else [groups]
        workers = [
            threading.Thread(target=self._work, args=(lot, threads, events.put), daemon=True, name=f"column-{n}")
            for n, lot in enumerate(lots)
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

    def _groups(self, columns: Sequence[int]) -> list[list[int]]:
        """Columns that one engine can answer, in the order of their first."""
        found: dict[Any, list[int]] = {}
        for index in columns:
            one = self.launches[index]
            found.setdefault((one.folder, one.quant, one.model), []).append(index)
        return list(found.values())

    def _how(self, groups: Sequence[Sequence[int]]) -> Together | OneByOne:
        count = len(groups)
        if count < 2:
            return Together(count, None)
        if self._one_by_one:
            return OneByOne(tr("as asked"))
        cores = physical_cores()
        if cores < 2 * count and cores < 4:
            return OneByOne(tr("{cores} cores are too few for {count} engines at once", cores=cores, count=count))
        needed = 0
        for group in groups:
            one = self.launches[group[0]]
            size = estimate(one.folder, one.quant, one.dtype, one.context) if one.folder is not None else None
            if size is None:
                return OneByOne(tr("it is not known how much memory they need"))
            needed += size.total
        free = available_memory()
        if free is not None and needed > free:
            return OneByOne(
                tr(
                    "together they need {needed} of memory, {free} are free",
                    needed=human_bytes(needed),
                    free=human_bytes(free),
                )
            )
        return Together(count, max(1, cores // count))

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
        if launch.threads is None and threads is not None:
            launch = replace(launch, threads=threads)
        waiting = list(group)
        try:
            connection = connecting.connect(
                launch, lambda stage, done: put(Loading(group[0], stage, done)), self._stopping.is_set
            )
            with connection:
                while waiting and not self._stopping.is_set():
                    self._one_answer(waiting[0], connection, put)
                    waiting.pop(0)
        except GlmchatError as error:
            if not self._stopping.is_set():
                for column in waiting:
                    put(ColumnFailed(column, error))
        except Exception as error:  # noqa: BLE001 - a thread has nobody else to tell; the face shows it
            failed = Failed(f"{type(error).__name__}: {error}", hint=tr("please report this"), code="compare.failed")
            for column in waiting:
                put(ColumnFailed(column, failed))

    def _one_answer(self, column: int, connection: Connection, put: Callable[[ComparisonEvent], None]) -> None:
        """Raises EngineDied, as the columns behind it have no engine either; other errors are this column's own."""
        session = _Column(self, column, connection)
        with self._lock:
            if self._stopping.is_set():
                return
            self._sessions[column] = session
        try:
            for event in session.answer():
                put(Said(column, event))
        except EngineDied as error:
            raise connection.cause(error) from None
        except GlmchatError as error:
            put(ColumnFailed(column, error))
        finally:
            with self._lock:
                del self._sessions[column]


class _Column(ChatSession):
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
        return {**super()._details(chosen), _DETAIL: mark}


def resume(history: History, conversation: int, settings: Settings, base: LaunchOptions | None = None) -> Comparison:
    """The last comparison of a conversation, to bring what a kill left missing. Raises Usage if it has none."""
    tree = history.load(conversation)
    asked = [m for m in tree.messages.values() if isinstance(m.details.get(_DETAIL), list) and m.deletion is None]
    if not asked:
        raise Usage(
            tr("conversation {id} holds no comparison", id=conversation),
            hint=tr("glmchat compare -p TEXT A B"),
            code="compare.none",
        )
    question = max(asked, key=lambda m: m.id)
    columns = parse_columns(question.details[_DETAIL])
    common = question.details.get("sampling") or {}
    common = {name: tuple(value) if isinstance(value, list) else value for name, value in common.items()}
    base = replace(base or LaunchOptions(), sampling=common)
    comparison = Comparison(history, columns, settings, base=base, conversation=conversation)
    comparison.question = comparison.tree.messages[question.id]
    return comparison
