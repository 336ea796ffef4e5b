"""One answer while it is written, in view or behind another conversation, and how it is drawn."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from glmchat.core.language import tr
from glmchat.core.messages import Finished, Piece, Started
from glmchat.tui.conversation import mark_unseen, note_of, show_changes, speaker, system_rules, turns_of
from glmchat.tui.transcript.turns import Turn
from glmchat.tui.view import View
from glmchat.tui.widgets.status import stage_words

if TYPE_CHECKING:
    from glmchat.chat.answering import SessionEvent
    from glmchat.chat.client.endpoint import Stop
    from glmchat.chat.history.rows import StoredMessage
    from glmchat.chat.session import ChatSession

Event = TypeVar("Event")
PENDING, PENDING_ANSWER = "pending", "pending-answer"  # keys of turns that are shown before they are stored


class Ear(Generic[Event]):
    """Gathers the events of an answer between two looks of the window, so that a fast model cannot flood it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: list[Event] = []

    def put(self, event: Event) -> bool:
        """Worker's side. True if the window must be told that something waits."""
        with self._lock:
            self._events.append(event)
            return len(self._events) == 1

    def take(self) -> list[Event]:
        """Window's side: everything since the last look."""
        with self._lock:
            events, self._events = self._events, []
        return events


@dataclass(slots=True, eq=False)
class Answering:
    """key: its turn in the transcript, once it is stored. question: the words that were sent and are not stored yet."""

    session: ChatSession
    question: str = ""
    completion: Stop | None = None  # of a /complete, which no conversation holds
    key: str | None = None
    ear: Ear[SessionEvent] = field(default_factory=Ear)
    asked: float = field(default_factory=time.monotonic)
    first: float | None = None  # when the first piece came
    tokens: int = 0
    prompt_tokens: int | None = None
    stopping: bool = False
    behind: str | None = None  # what its turn would show, while another conversation is in view

    def stop(self) -> None:
        self.stopping = True
        if self.completion is not None:
            self.completion.now()
        self.session.stop()

    def hear(self, text: str, tokens: int) -> None:
        """Pieces of the answer."""
        self.first = self.first or time.monotonic()
        self.tokens += tokens
        if self.behind is not None:
            self.behind += text

    @property
    def speed(self) -> float | None:
        """Tokens a second, once there is half a second to tell from."""
        seconds = time.monotonic() - self.first if self.first is not None else 0.0
        return self.tokens / seconds if seconds > 0.5 else None


class AnswerDrawing:
    """Puts an answer into the transcript and its numbers into the status line. One behind only gathers its text."""

    def __init__(self, view: View) -> None:
        self._view = view

    def show_question(self, text: str, model: str = "") -> None:
        """A question and its empty answer, before they are stored."""
        self._view.transcript.drop("welcome")
        self._view.transcript.add(Turn(PENDING, "user", text))
        self._view.transcript.add(Turn(PENDING_ANSWER, "assistant", label=model, state="waiting"))

    def show_conversation(self, answering: Answering, text: str) -> None:
        """The conversation whose last answer is being written; `text` is what was heard of it so far."""
        turns = turns_of(answering.session)
        for turn in turns:
            if turn.key == answering.key:
                # The thread is ahead of us: what it has written since comes as pieces.
                turn.text, turn.note, turn.state = text, "", "streaming" if text else "waiting"
        self._view.transcript.show(turns or [self._view.welcome()])

    def hear(self, answering: Answering, *, in_view: bool) -> None:
        """Take what has come. The transcript gathers it and draws twenty times a second."""
        pieces: list[Piece] = []
        for event in answering.ear.take():
            if isinstance(event, Piece):
                pieces.append(event)
            else:
                self._feed(answering, pieces, in_view)
                self._take(answering, event, in_view)
                pieces = []
        self._feed(answering, pieces, in_view)

    def _feed(self, answering: Answering, pieces: list[Piece], in_view: bool) -> None:
        if not pieces or answering.key is None:
            return
        if in_view and answering.first is None:
            self._view.status.show(activity=tr("answering"), progress=None)
        text = "".join(piece.text for piece in pieces)
        answering.hear(text, sum(max(1, len(piece.token_ids)) for piece in pieces))
        if in_view:
            self._view.transcript.feed(answering.key, text)
            self.show_speed(answering)

    def show_speed(self, answering: Answering) -> None:
        facts = self._view.status.facts
        if answering.first is not None:
            facts.first_token = answering.first - answering.asked
        if answering.speed is not None and not answering.stopping:
            facts.speed = answering.speed
        if answering.prompt_tokens is not None:
            facts.used = answering.prompt_tokens + answering.tokens
        self._view.status.show()

    def _take(self, answering: Answering, event: SessionEvent, in_view: bool) -> None:
        from glmchat.chat.answering import Begun, Done, Trimmed, WentOn
        from glmchat.chat.client.endpoint import Progress

        view = self._view
        match event:
            case WentOn(messages, last) if in_view:
                every = turns_of(answering.session)  # with the question, whose thread is ahead of us
                at = next((n for n, turn in enumerate(every, 1) if turn.key == str(last)), 0)
                turns, new = every[:at], {str(message.id) for message in messages}
                show_changes(view.transcript, [turn.key for turn in turns if turn.key not in new], turns)
                self.show_question(answering.question)
            case Begun(question, answer):
                self._begin(answering, question, answer, in_view)
            case Progress(waiting, done, total) if in_view:
                if waiting:
                    view.status.show(activity=stage_words("waiting"), progress=None)
                elif total:
                    view.status.show(activity=stage_words("prefill"), progress=(done or 0) / total)
            case Started(_, _, prompt_tokens):
                answering.prompt_tokens = prompt_tokens
            case Trimmed() if in_view:
                mark_unseen(view.transcript, answering.session.unseen)
            case Finished() as finished if in_view:
                view.status.show_finished(finished)
            case Done(answer) if in_view and answering.key is not None:
                view.transcript.finish(answering.key, note_of(answering.session, answer), text=answer.text)

    def _begin(
        self, answering: Answering, question: StoredMessage | None, answer: StoredMessage, in_view: bool
    ) -> None:
        answering.key = str(answer.id)
        answering.question = ""
        if not in_view:
            answering.behind = answer.text
            return
        transcript = self._view.transcript
        if transcript.layout_of(PENDING_ANSWER) is not None and question is not None:
            # The turns that were shown at once become the stored ones.
            transcript.rename(PENDING, str(question.id))
            transcript.rename(PENDING_ANSWER, answering.key)
            transcript.change(answering.key, label=speaker(answering.session, answer))
            rule = system_rules(answering.session, answering.session.tree.path()).get(question.id)
            if rule is not None:
                at = next(n for n, turn in enumerate(transcript.turns) if turn.key == str(question.id))
                transcript.insert(at, rule)
        else:
            self.show_conversation(answering, answer.text)
        self._view.show_title()
