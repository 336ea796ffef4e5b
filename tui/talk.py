"""The chat screen's conversation: ask, hear, end, and turn to another one. No layout and no keys."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from glmchat.chat.launch import LaunchOptions
from glmchat.core.errors import GlmchatError
from glmchat.core.language import tr
from glmchat.core.messages import Finished, Piece, Started
from glmchat.core.settings import Settings
from glmchat.core.text import is_chinese, one_line
from glmchat.tui.answering import PENDING, PENDING_ANSWER, Answering
from glmchat.tui.connection import Connecting
from glmchat.tui.conversation import speaker, state_note, turns_of
from glmchat.tui.link import EngineLink
from glmchat.tui.messages import Ended, Heard
from glmchat.tui.transcript.turns import Turn

if TYPE_CHECKING:
    from glmchat.chat.client.endpoint import Stop
    from glmchat.chat.history.rows import StoredMessage
    from glmchat.chat.session import ChatSession, SessionEvent


class Conversing(Connecting):
    """`answering` is the answer in view. Those of conversations that were left go on in `behind`, each in its own."""

    def __init__(self, launch: LaunchOptions, settings: Settings, link: EngineLink) -> None:
        super().__init__(launch, settings, link)
        self.queue: deque[str] = deque()
        self.answering: Answering | None = None
        self.behind: list[Answering] = []
        self._then: Callable[[], None] | None = None  # what waits until the answer in view has stopped

    @property
    def busy(self) -> bool:
        return self.answering is not None

    @property
    def being_written(self) -> list[Answering]:
        return [*self.behind, *([self.answering] if self.answering is not None else [])]

    # Asking

    def ask(self, text: str) -> None:
        """Show the question at once and answer it; what cannot be asked yet waits in the queue."""
        if self.session is None or not self.ready or self.busy:
            self.queue.append(text)
            self.queue_changed()
            return
        if is_chinese(text):
            self.advise_chinese()
        self.transcript.drop("welcome")
        self.transcript.add(Turn(PENDING, "user", text))
        self.transcript.add(Turn(PENDING_ANSWER, "assistant", label=self.session.identity.model or "", state="waiting"))
        self.answer(self.session.ask(text), question=text)

    def answer(self, events: Iterable[SessionEvent], *, question: str = "", completion: Stop | None = None) -> None:
        """Run an answer in a thread."""
        answering = self.answering = Answering(self._talk(), question, completion)
        self.status.show(activity=tr("thinking"), progress=None)
        self._thread(lambda: self._speak(answering, events), "answer")

    def _speak(self, answering: Answering, events: Iterable[SessionEvent]) -> None:
        try:
            for event in events:
                if answering.ear.put(event):
                    self._report(Heard(answering))
        except GlmchatError as error:
            self._report(Ended(answering, error))
        else:
            self._report(Ended(answering))

    def complete(self, text: str) -> None:
        """Let the model go on with a text. Shown, not stored: it belongs to no conversation."""
        from glmchat.chat.client.endpoint import Stop

        session = self._talk()
        assert self._ready is not None
        self._notices += 1
        key = f"notice-completion-{self._notices}"
        label = tr("{model}, going on with a text", model=self._ready.identity.model or "")
        self.transcript.drop("welcome")
        self.transcript.add(Turn(key, "assistant", text, label, state="streaming"))
        chosen, stop = session.sampling(), Stop()
        events = self._ready.endpoint.complete(
            text, chosen.sampling, session.adapters or None, asked=chosen.asked, stop=stop
        )
        self.answer(events, completion=stop)
        assert self.answering is not None
        self.answering.key = key

    def stop(self) -> bool:
        """Stop the answer in view and keep what was said. False if none is written."""
        if self.answering is None:
            return False
        self.answering.stop()
        self.status.show(activity=tr("stopping"), progress=None)
        return True

    def stop_behind(self) -> bool:
        """Stop the answers of conversations that are not in view. False if there are none."""
        for other in self.behind:
            other.stop()
        return bool(self.behind)

    def stop_all(self) -> None:
        for answering in self.being_written:
            answering.stop()

    def when_quiet(self, act: Callable[[], None]) -> None:
        """Do it now. Where an answer is being written, stop that first: what was said is kept."""
        if self.answering is None:
            act()
            return
        self._then = act
        self.stop()

    def send_queued(self) -> None:
        if self.queue and self.ready and not self.busy:
            text = self.queue.popleft()
            self.queue_changed()
            self.ask(text)

    def queue_changed(self) -> None:
        self.status.show(queued=len(self.queue))

    # Hearing

    def _listen(self, answering: Answering) -> None:
        text: list[str] = []
        tokens = 0
        for event in answering.ear.take():
            if isinstance(event, Piece):
                text.append(event.text)
                tokens += max(1, len(event.token_ids))
            else:
                self._say(answering, text, tokens)
                tokens = 0
                self._heard(answering, event)
        self._say(answering, text, tokens)

    def _say(self, answering: Answering, text: list[str], tokens: int) -> None:
        """Hand gathered pieces to the transcript; empties the list."""
        if not text or answering.key is None:
            return
        if answering is self.answering and answering.first is None:
            self.status.show(activity=tr("answering"), progress=None)
        said = "".join(text)
        answering.hear(said, tokens)
        text.clear()
        self._unsaved()
        if answering is self.answering:
            self.transcript.feed(answering.key, said)
            self._show_speed(answering)

    def _show_speed(self, answering: Answering) -> None:
        if answering.first is not None:
            self.status.facts.first_token = answering.first - answering.asked
        if answering.speed is not None and not answering.stopping:
            self.status.facts.speed = answering.speed
        if answering.prompt_tokens is not None:
            self.status.facts.used = answering.prompt_tokens + answering.tokens
        self.status.show()

    def _heard(self, answering: Answering, event: SessionEvent) -> None:
        from glmchat.chat.answering import Begun, Done, Trimmed
        from glmchat.chat.client.endpoint import Progress

        in_view = answering is self.answering
        match event:
            case Begun(question, answer):
                self._begun(answering, question, answer)
            case Progress(waiting, done, total) if in_view:
                if waiting:
                    self.status.show(activity=self._stage("waiting"), progress=None)
                elif total:
                    self.status.show(activity=self._stage("prefill"), progress=(done or 0) / total)
            case Started(_, _, prompt_tokens):
                answering.prompt_tokens = prompt_tokens
            case Trimmed() if in_view:
                self._trimmed()
            case Finished() as finished if in_view:
                self._finished(finished)
            case Done(answer) if in_view and answering.key is not None:
                self.transcript.finish(answering.key, self._note(answer), text=answer.text)

    def _begun(self, answering: Answering, question: StoredMessage | None, answer: StoredMessage) -> None:
        answering.key = str(answer.id)
        answering.question = ""
        if answering is not self.answering:
            answering.behind = answer.text
            return
        if self.transcript.layout_of(PENDING_ANSWER) is not None and question is not None:
            # The turns that were shown at once become the stored ones.
            self.transcript.rename(PENDING, str(question.id))
            self.transcript.rename(PENDING_ANSWER, answering.key)
            self.transcript.change(answering.key, label=speaker(answering.session, answer))
        else:
            self._show_answering(answering, answer.text)
        self.refresh_title()

    def _show_answering(self, answering: Answering, text: str) -> None:
        """Draw the conversation whose last answer is being written; `text` is what was heard of it so far."""
        turns = turns_of(answering.session)
        for turn in turns:
            if turn.key == answering.key:
                # The thread is ahead of us: what it has written since comes as pieces.
                turn.text, turn.note, turn.state = text, "", "streaming" if text else "waiting"
        self.transcript.show(turns or [self.welcome()])

    def _trimmed(self) -> None:
        """Draw the line above which the model no longer sees."""
        if self.session is None:
            return
        unseen = {str(i) for i in self.session.unseen}
        self.transcript.drop("unseen")
        last = -1
        for index, turn in enumerate(self.transcript.turns):
            hidden = turn.key in unseen
            if hidden:
                last = index
            if hidden != turn.unseen:
                self.transcript.change(turn.key, unseen=hidden)
        if last >= 0:
            rule = Turn("unseen", "rule", tr("the model no longer sees what stands above"))
            self.transcript.insert(last + 1, rule)

    def _finished(self, finished: Finished) -> None:
        changes: dict[str, object] = {"activity": "", "progress": None}
        if finished.decode_tokens_per_second is not None:
            changes["speed"] = finished.decode_tokens_per_second
        if finished.ttft_seconds is not None:
            changes["first_token"] = finished.ttft_seconds
        if finished.prompt_tokens is not None and finished.completion_tokens is not None:
            changes["used"] = finished.prompt_tokens + finished.completion_tokens
        self.status.show(**changes)

    def _note(self, answer: StoredMessage) -> str:
        turn = next((t for t in turns_of(self.session) if t.key == str(answer.id)), None) if self.session else None
        return turn.note if turn else state_note(answer)

    # The end of an answer

    def _ended(self, answering: Answering, error: GlmchatError | None) -> None:
        """The thread of an answer is over."""
        if answering.stopping and answering.key is not None:
            error = None  # a connection that we closed, or an engine that we ended
        self._unsaved()
        if answering is not self.answering:
            self._ended_behind(answering, error)
            return
        self.answering = None
        self.status.show(activity="", progress=None)
        then, self._then = self._then, None
        if error is not None:
            self._failed(answering, error)
        elif answering.completion is not None and answering.key is not None:
            self.transcript.finish(answering.key, tr("stopped") if answering.stopping else "")
        else:
            self.refresh_title()
        if then is not None:
            self.guarded(then)
        elif error is None:
            self.measure()
            self.send_queued()

    def _failed(self, answering: Answering, error: GlmchatError) -> None:
        if answering.key is None:  # nothing was stored: the words go back to where they can be sent again
            if not self.prompt.text:
                self.prompt.set_text(answering.question)
            self.transcript.drop(PENDING, PENDING_ANSWER)
        else:
            stored = answering.session.tree.messages.get(int(answering.key)) if answering.completion is None else None
            self.transcript.finish(answering.key, self._note(stored) if stored else "")
        self._tell_failure(error)

    def _tell_failure(self, error: GlmchatError) -> None:
        failure = self.link.failure() if self.ready else None
        self._lost(failure) if failure is not None else self.complain(error)

    def _ended_behind(self, answering: Answering, error: GlmchatError | None) -> None:
        """An answer has ended in a conversation that is not in view."""
        self.behind.remove(answering)
        self._show_behind()
        if answering.completion is not None:
            return
        session, title = answering.session, self._title(answering)
        if answering.question:
            session.history.save_draft(session.tree, answering.question)
        if error is not None:
            self._tell_failure(error)
        elif not answering.stopping:
            self.notify(tr("“{title}” is answered", title=title), timeout=6)
        self.refresh_title()
        self.send_queued()

    # Which conversation

    def turn_to(self, conversation: int | None) -> ChatSession:
        """Another conversation, or a new one, comes into view at once. Raises Usage if it is unknown.

        An answer that is being written goes on in the conversation it belongs to; what waited to be sent there becomes
        its draft. A completion belongs to none and is stopped.
        """
        session, left = self._talk(), self.answering
        self._then = None
        if left is not None and conversation == session.tree.conversation.id:
            return session
        back = next((a for a in self.behind if a.session.tree.conversation.id == conversation), None)
        if back is not None:
            self.session = back.session
        elif left is not None:
            self.session = session.beside(conversation)
        elif conversation is None:
            session.new()
        else:
            session.open(conversation)
        if self.queue:
            session.history.save_draft(session.tree, "\n\n".join(self.queue))
            self.queue.clear()
            self.queue_changed()
        if left is not None:
            self._leave_behind(left)
        self.answering = None
        self.status.show(activity="", progress=None, speed=None, first_token=None, used=None)
        if back is not None:
            self._come_back(back)
        else:
            self.show_conversation()
        self._show_behind()
        self.show_adapters()
        return self._talk()

    def _leave_behind(self, answering: Answering) -> None:
        layout = self.transcript.layout_of(answering.key or PENDING_ANSWER)
        answering.behind = layout.turn.text if layout is not None else ""
        self.behind.append(answering)
        if answering.completion is not None:
            answering.stop()
        elif not answering.stopping:
            self.notify(tr("“{title}” is answered meanwhile", title=self._title(answering)), timeout=6)

    def _come_back(self, answering: Answering) -> None:
        self.behind.remove(answering)
        self.answering = answering
        self._show_answering(answering, answering.behind or "")
        if answering.key is None:
            self.transcript.drop("welcome")
            self.transcript.add(Turn(PENDING, "user", answering.question))
            self.transcript.add(Turn(PENDING_ANSWER, "assistant", state="waiting"))
        answering.behind = None
        self.status.show(activity=tr("answering") if answering.first else tr("thinking"))
        self._show_speed(answering)
        self.refresh_title()

    def _show_behind(self) -> None:
        self.status.show(behind=tuple(self._title(a) for a in self.behind if a.completion is None))

    @staticmethod
    def _title(answering: Answering) -> str:
        return one_line(answering.session.tree.conversation.title or answering.question or tr("untitled"), 40)

    def show_conversation(self) -> None:
        """Draw the open conversation anew."""
        if self.session is not None:
            self.transcript.show(turns_of(self.session) or [self.welcome()])
            self.refresh_title()

    def restore_draft(self) -> None:
        """What stood unsent in the prompt of this conversation, unless something else stands there."""
        if self.session is not None and not self.prompt.text:
            self.prompt.set_text(self.session.tree.conversation.draft)

    def welcome(self) -> Turn:
        raise NotImplementedError

    def refresh_title(self) -> None:
        raise NotImplementedError
