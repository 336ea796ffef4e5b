"""The chat screen's conversation: ask, hear, end, and turn to another one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from glmchat.core import engine_records, locations
from glmchat.core.errors import DoesNotFit, GlmchatError, Usage
from glmchat.core.files import take_notes
from glmchat.core.language import language, tr
from glmchat.core.text import is_chinese, one_line, short_name
from glmchat.tui.answering import PENDING, PENDING_ANSWER, AnswerDrawing, Answering
from glmchat.tui.connection import ModelConnection
from glmchat.tui.conversation import note_of, show_changes, turns_of
from glmchat.tui.messages import Ended, Heard, Listed, Measured, Opened, PartsCounted, Titled
from glmchat.tui.transcript.turns import Turn
from glmchat.tui.unsent import Unsent
from glmchat.tui.view import View

if TYPE_CHECKING:
    from glmchat.chat.client.endpoint import Stop
    from glmchat.chat.history.rows import StoredMessage
    from glmchat.chat.session import ChatSession, SessionEvent
    from glmchat.core.settings import Settings


class Talk:
    """`answering` is the answer in view. Those of conversations that were left go on in `behind`, each in its own.

    session: None until the history is open. editing: the question whose new words stand in the prompt.
    """

    def __init__(self, view: View, connection: ModelConnection, unsent: Unsent) -> None:
        self.session: ChatSession | None = None
        self.queue = unsent.queue
        self._unsent = unsent
        self.answering: Answering | None = None
        self.behind: list[Answering] = []
        self.editing: int | None = None
        self._view = view
        self._connection = connection
        self._drawing = AnswerDrawing(view)
        self._completions = 0
        self._then: Callable[[], None] | None = None  # what waits until the answer in view has stopped
        self._titles = "never"  # as the settings say
        self._unnamed: int | None = None  # the conversation that was answered last, until a title was asked for
        self._naming: Stop | None = None
        self.writer: str | None = None  # the machine ("": this) of another window that answers here

    @property
    def chat(self) -> ChatSession:
        if self.session is None:
            raise Usage(tr("the history is still being opened"), hint=tr("try again in a moment"), code="chat.opening")
        return self.session

    @property
    def busy(self) -> bool:
        return self.answering is not None

    @property
    def elsewhere(self) -> bool:
        """Another window writes an answer in the conversation in view."""
        return self.writer is not None

    @property
    def being_written(self) -> list[Answering]:
        return [*self.behind, *([self.answering] if self.answering is not None else [])]

    # The history

    def open_history(self, settings: Settings) -> None:
        """Runs in a thread; `Listed` comes back where the last conversations are shown, then `Opened`."""
        from glmchat.chat.history.history import History

        self._titles = settings.titles
        launch = self._connection.launch
        path = locations.history_file() if launch.history and settings.history else None
        history = History.open(path)
        new = launch.resume is None
        if new:
            self._view.post_message(Listed(history))
        from glmchat.chat.connect import open_session  # loads the client of an engine, for which no list has to wait

        session = open_session(history, launch, settings)
        running = tuple(
            f"{short_name(record.model or '')} {record.quant or ''}".strip()
            for record in engine_records.running()
            if record.model != launch.engine.model
        )
        drafted = history.last_draft() if new else None
        self._view.post_message(Opened(session, history.interrupted() if new else None, drafted, running))

    def opened(self, news: Opened) -> None:
        self.session = news.session
        launch = self._connection.launch
        for note in (launch.note, news.session.history.note, *take_notes()):
            if note:
                self._view.tell(note, role="warning")
        if news.interrupted is not None:
            title = one_line(news.interrupted.title or tr("untitled"), 60)
            self._view.tell(
                tr("“{title}” was interrupted during an answer", title=title),
                tr("/resume opens it, /continue resumes the answer"),
            )
        if news.unsent is not None:
            self._view.tell(
                tr("not sent: “{text}”", text=one_line(news.unsent.draft, 60)),
                tr("/resume brings it back into the prompt"),
            )
        self._show_saving()
        if launch.resume is not None:
            self.show_conversation()
        else:
            self._view.show_title()

    def meet(self) -> None:
        """The history is open, or a model is ready. Once both are: go."""
        answers = self._connection.answers
        if self.session is None or answers is None or not self._connection.ready:
            return
        self.session.reconnect(answers.endpoint, answers.identity)
        self.show_in_force()
        if language() == "zh":
            self._connection.advise_chinese()
        self.measure()
        self.send_queued()

    def disconnect(self) -> None:
        if self.session is not None:
            self.session.reconnect(None)

    def _show_saving(self) -> None:
        """Say when what is written here stops being saved, and when it is saved again."""
        history, facts = self.chat.history, self._view.status.facts
        if history.path is None or history.saved is not facts.unsaved:
            return
        if history.problem and not facts.unsaved:
            self._view.tell(tr("this conversation is not being saved: {why}", why=history.problem), role="warning")
        elif history.saved:
            self._view.tell(tr("saving again, including the messages in between"))
        self._view.status.show(unsaved=not history.saved)

    # Asking

    def ask(self, text: str) -> None:
        """Show the question at once and answer it; what cannot be asked yet waits in the queue."""
        self.look_around()
        if self.session is None or not self._connection.takes_questions or self.busy or self.elsewhere:
            self.queue.append(text)
            self._view.show_queue()
            self._unsent.save(self.session)
            return
        if is_chinese(text):
            self._connection.advise_chinese()
        self._drawing.show_question(text, self.session.identity.model or "")
        self.answer(self.session.ask(text), question=text)

    def answer(self, events: Iterable[SessionEvent], *, question: str = "") -> None:
        """Run an answer in a thread. Raises Usage while another one is written."""
        self._run(Answering(self.chat, question), events)

    def complete(self, text: str) -> None:
        """Let the model go on with a text. Shown, not stored: it belongs to no conversation."""
        from glmchat.chat.client.endpoint import Stop

        session, answers = self.chat, self._connection.answers
        if answers is None:
            return
        self._completions += 1
        key = f"completion-{self._completions}"
        label = tr("{model}, continuing a text", model=answers.identity.model or "")
        self._view.transcript.drop("welcome")
        self._view.transcript.add(Turn(key, "assistant", text, label, state="streaming"))
        chosen, stop = session.sampling(), Stop()
        events = answers.endpoint.complete(
            text, chosen.sampling, session.adapters or None, asked=chosen.asked, stop=stop
        )
        self._run(Answering(session, completion=stop, key=key), events)

    def _run(self, answering: Answering, events: Iterable[SessionEvent]) -> None:
        from glmchat.chat.turns import already_streaming

        if self.busy:
            raise already_streaming()
        self._stop_naming()
        self.answering = answering
        self._view.status.show(activity=tr("thinking"), progress=None)
        self._view.start_thread(lambda: self._speak(answering, events), "answer")

    def _speak(self, answering: Answering, events: Iterable[SessionEvent]) -> None:
        try:
            for event in events:
                if answering.stopping:  # asked for before the session had begun, which heard nothing of it
                    answering.session.stop()
                if answering.ear.put(event):
                    self._view.post_message(Heard(answering))
        except GlmchatError as error:
            self._view.post_message(Ended(answering, error))
        else:
            self._view.post_message(Ended(answering))

    def send_queued(self) -> None:
        if self.queue and self._connection.takes_questions and not self.busy and not self.elsewhere:
            text = self.queue.popleft()
            self._view.show_queue()
            self.ask(text)
            self._unsent.save(self.session)

    def measure(self) -> None:
        """Count what the next request would hold, the prompt included, in a thread; the latest call counts."""
        if self.session is not None and self._connection.ready and not self.busy:
            session, draft = self.session, self._draft
            self._view.start_thread(lambda: self._count(session, draft), "measure", exclusive=True)

    @property
    def _draft(self) -> str:
        """What stands in the prompt and would be sent; a command is not."""
        typed = self._view.prompt.text
        return "" if typed.lstrip().startswith("/") else typed

    def weigh(self) -> None:
        """Count the parts of the next request, in a thread; `PartsCounted` comes back."""
        session, draft = self.chat, self._draft
        self._connection.ask(lambda stop: PartsCounted(session.weigh(draft)))

    def _count(self, session: ChatSession, draft: str) -> None:
        from glmchat.chat.context import Request, sizes

        with suppress(GlmchatError):  # the question itself will say so
            try:
                request = session.measure(draft)
            except DoesNotFit as error:
                tokens, limit = sizes(error) or (None, None)
                request = Request((), (), tokens, limit)
            self._view.post_message(Measured(request))

    def measured(self, news: Measured) -> None:
        if not self.busy:
            self._view.status.show(
                used=news.request.tokens, limit=news.request.limit, unsent=self._turns_among(news.request.unseen)
            )

    def _turns_among(self, messages: Iterable[int]) -> int:
        known = self.chat.tree.messages
        return sum(number in known and known[number].role == "user" for number in messages)

    # Other windows

    def look_around(self) -> bool:
        """What other windows have done to this conversation since the last look comes into view; True if anything."""
        if self.session is None or self.busy:
            return False
        if self.session.history.is_deleted(self.session.tree.conversation.id):
            typed = self._view.prompt.text
            self.turn_to(None)
            self._view.prompt.set_text(typed)
            self._view.tell(tr("another window deleted that conversation"))
            return True
        before, waited = [turn.key for turn in turns_of(self.session)], self.writer
        changed = self.session.refresh()
        self.writer = self.session.writer_elsewhere()
        if changed:
            show_changes(self._view.transcript, before, turns_of(self.session) or [self._view.welcome()])
            self._view.show_title()
            self.show_in_force()
        if self.writer != waited:
            self._view.show_queue()
        if not self.elsewhere and (changed or waited is not None):
            self.measure()
        return changed

    def watch(self) -> None:
        """Now and then."""
        self.look_around()
        self.send_queued()
        self._name_conversation()

    # The title

    def _name_conversation(self) -> None:
        """After an answer, in idle time, the model is asked for a title, and left as soon as anybody needs it."""
        from glmchat.chat.client.endpoint import Stop

        session = self.session
        if session is None or self._unnamed != session.tree.conversation.id or not self._connection.ready:
            return
        if self.being_written or self.queue or self.elsewhere or len(self._view.app.screen_stack) > 1:
            return
        self._unnamed = None
        if not session.wants_title_by(self._titles):
            return
        stop, link = Stop(), self._connection.link
        self._naming = stop

        def name() -> None:
            with suppress(GlmchatError):  # it keeps its first words
                if session.write_title(stop, link.is_free):
                    self._view.post_message(Titled())

        self._view.start_thread(name, "title")

    def _stop_naming(self) -> None:
        if self._naming is not None:
            self._naming.now()
            self._naming = None

    # Stopping

    def stop(self) -> bool:
        """Stop the answer in view and keep what was said. False if none is written."""
        if self.answering is None:
            return False
        self.answering.stop()
        self._view.status.show(activity=tr("stopping"), progress=None)
        return True

    def stop_behind(self) -> bool:
        """Stop the answers of conversations that are not in view. False if there are none."""
        for other in self.behind:
            other.stop()
        return bool(self.behind)

    def stop_all(self) -> None:
        self._stop_naming()
        for answering in self.being_written:
            answering.stop()

    def when_quiet(self, act: Callable[[], None]) -> None:
        """Do it now. Where an answer is being written, stop that first: what was said is kept."""
        self._stop_naming()
        if self.answering is None:
            act()
            return
        self._then = act
        self.stop()

    # The answers

    def hear(self, answering: Answering) -> None:
        """Everything that has come since the last look."""
        self._drawing.hear(answering, in_view=answering is self.answering)
        self._show_saving()

    def end(self, answering: Answering, error: GlmchatError | None) -> None:
        """The thread of an answer is over."""
        self.hear(answering)
        if answering.stopping and answering.key is not None:
            error = None  # a connection that we closed, or an engine that we ended
        if answering is not self.answering:
            self._ended_behind(answering, error)
            return
        self.answering = None
        self._view.status.show(activity="", progress=None)
        then, self._then = self._then, None
        if error is not None:
            self._failed(answering, error)
        elif answering.completion is not None and answering.key is not None:
            self._view.transcript.finish(answering.key, tr("stopped") if answering.stopping else "")
        else:
            self._view.show_title()
            self._unnamed = answering.session.tree.conversation.id
        if then is not None:
            then()
        elif error is None:
            self.measure()
            self.send_queued()

    def _failed(self, answering: Answering, error: GlmchatError) -> None:
        if error.code == "chat.elsewhere":  # it began between our look and the question
            self._view.transcript.drop(PENDING, PENDING_ANSWER)
            self.queue.appendleft(answering.question)
            self.look_around()
            self._view.show_queue()
            self._unsent.save(self.session)
            return
        if answering.key is None:  # nothing was stored: the words go back to where they can be sent again
            if not self._view.prompt.text:
                self._view.prompt.set_text(answering.question)
            self._view.transcript.drop(PENDING, PENDING_ANSWER)
        else:
            stored = answering.session.tree.messages.get(int(answering.key)) if answering.completion is None else None
            self._view.transcript.finish(answering.key, note_of(self.chat, stored) if stored else "")
        self._show_failure(error)

    def _show_failure(self, error: GlmchatError) -> None:
        if (failure := self._connection.failure()) is not None:
            self._connection.lost(failure)
            self.disconnect()
        elif self._connection.is_away(error):
            self._connection.lost(error)
            self.disconnect()
        else:
            self._view.show_error(error)

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
            self._show_failure(error)
        elif not answering.stopping:
            self._view.notify(tr("“{title}” has been answered", title=title), timeout=6)
        self._view.show_title()
        self.send_queued()

    # Which conversation

    def turn_to(self, conversation: int | None) -> None:
        """Another conversation, or a new one, comes into view at once. Raises Usage if it is unknown.

        An answer that is being written goes on in the conversation it belongs to; what waited to be sent there, and
        what stood in the prompt, becomes its draft. A completion belongs to none and is stopped.
        """
        session, left = self.chat, self.answering
        self._then = None
        if left is not None and conversation == session.tree.conversation.id:
            return
        self._unsent.keep(session)
        back = next((a for a in self.behind if a.session.tree.conversation.id == conversation), None)
        if back is not None:
            self.session = back.session
        elif left is not None:
            self.session = session.beside(conversation)
        elif conversation is None:
            session.new()
        else:
            session.open(conversation)
        self._view.prompt.set_text("")
        self._view.show_queue()
        if left is not None:
            self._leave_behind(left)
        self.answering = None
        self._view.status.show(activity="", progress=None, speed=None, first_token=None, used=None, unsent=0)
        if back is not None:
            self._come_back(back)
        else:
            self.show_conversation()
        self._show_behind()
        self.show_in_force()
        self.stop_editing()

    def _leave_behind(self, answering: Answering) -> None:
        layout = self._view.transcript.layout_of(answering.key or PENDING_ANSWER)
        answering.behind = layout.turn.text if layout is not None else ""
        self.behind.append(answering)
        if answering.completion is not None:
            answering.stop()
        elif not answering.stopping:
            self._view.notify(
                tr("“{title}” is being answered in the background", title=self._title(answering)), timeout=6
            )

    def _come_back(self, answering: Answering) -> None:
        self.behind.remove(answering)
        self.answering = answering
        self._drawing.show_conversation(answering, answering.behind or "")
        if answering.key is None:
            self._drawing.show_question(answering.question)
        answering.behind = None
        self._view.status.show(activity=tr("answering") if answering.first else tr("thinking"))
        self._drawing.show_speed(answering)
        self._view.show_title()

    def _show_behind(self) -> None:
        self._view.status.show(behind=tuple(self._title(a) for a in self.behind if a.completion is None))

    @staticmethod
    def _title(answering: Answering) -> str:
        return one_line(answering.session.tree.conversation.title or answering.question or tr("untitled"), 40)

    def show_conversation(self) -> None:
        """Draw the open conversation anew."""
        if self.session is not None:
            self._view.transcript.show(turns_of(self.session) or [self._view.welcome()])
            self._view.show_title()

    def refresh(self) -> None:
        """Conversations were changed or removed in the list of all."""
        if self.session is None:
            return
        is_there, tree = self.session.history.find, self.session.tree
        for other in self.behind:
            if is_there(other.session.tree.conversation.id) is None:
                other.stop()
        if is_there(tree.conversation.id) is None and tree.messages:
            self.stop()
            self.turn_to(None)
        else:
            self.session.refresh()
            self._view.show_title()

    def show_in_force(self) -> None:
        """What the next answer is made with, where it is not the default."""
        from glmchat.chat.in_force import adapters_in_force, marks

        if self.session is not None:
            self._view.status.show(adapters=adapters_in_force(self.session), marks=marks(self.session))

    # Editing

    def edit(self, question: StoredMessage) -> None:
        """The words of a question go into the prompt; what is sent next asks it anew."""
        self.editing = question.id
        self._view.prompt.set_text(question.text)
        self._view.prompt.focus()
        self._view.show_editing(True)

    def stop_editing(self) -> None:
        self.editing = None
        self._view.show_editing(False)

    def ask_edited(self, text: str) -> None:
        """The question that was being edited, in other words, on a branch of its own."""
        question = self.editing
        assert question is not None
        self.stop_editing()
        self.when_quiet(lambda: self.answer(self.chat.edit(question, text)))
