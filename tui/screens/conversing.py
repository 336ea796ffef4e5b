"""The chat screen's business with the engine and the conversation: connect, ask, hear, end. No layout and no keys."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from textual.screen import Screen

from glmchat.chat.launch import LaunchOptions
from glmchat.core import locations
from glmchat.core.errors import GlmchatError
from glmchat.core.language import language, tr
from glmchat.core.messages import Finished, Piece, Started
from glmchat.core.settings import Settings
from glmchat.core.text import is_chinese, one_line
from glmchat.tui.conversation import speaker, state_note, turns_of
from glmchat.tui.languages import advice_for_chinese
from glmchat.tui.link import EngineLink
from glmchat.tui.messages import (
    STAGES,
    Broken,
    Ear,
    Ended,
    EngineLost,
    FromWorker,
    Heard,
    Loading,
    Measured,
    Opened,
    Ready,
    Resources,
)
from glmchat.tui.turns import Role, Turn
from glmchat.tui.widgets.prompt import Prompt
from glmchat.tui.widgets.status import StatusLine
from glmchat.tui.widgets.transcript import Transcript

if TYPE_CHECKING:
    from glmchat.chat.answering import SessionEvent
    from glmchat.chat.cleaning import StreamCleaner
    from glmchat.chat.endpoint import Stop
    from glmchat.chat.records import StoredMessage
    from glmchat.chat.session import ChatSession

_LOOK = 0.04  # seconds between two looks at what an answer has said
_MEASURE_AFTER = 0.4  # of quiet typing
_WATCH = 2.0


class Conversing(Screen[None]):
    """Holds the session and the link. Everything that blocks runs in worker threads and comes back as `FromWorker`."""

    def __init__(self, launch: LaunchOptions, settings: Settings, link: EngineLink) -> None:
        super().__init__()
        self.launch = launch
        self.settings = settings
        self.link = link
        self.session: ChatSession | None = None
        self.ready = False
        self.queue: deque[str] = deque()
        self.ear: Ear[SessionEvent] = Ear()
        self.answering: str | None = None  # key of the turn that is written
        self._pending: str | None = None  # key of the question shown before it is stored
        self._cleaner: StreamCleaner | None = None
        self._asked = 0.0
        self._first: float | None = None
        self._tokens = 0
        self._prompt_tokens: int | None = None
        self._notices = 0
        self._stopping = False
        self._told_chinese = False
        self._ready: Ready | None = None
        self._completion: Stop | None = None  # of a running /complete

    # The widgets that this half speaks to

    @property
    def transcript(self) -> Transcript:
        return self.query_one(Transcript)

    @property
    def prompt(self) -> Prompt:
        return self.query_one(Prompt)

    @property
    def status(self) -> StatusLine:
        return self.query_one(StatusLine)

    @property
    def busy(self) -> bool:
        return self.answering is not None or self._pending is not None

    def tell(self, text: str, hint: str = "", role: Role = "notice") -> None:
        """A line in the transcript that is not part of the conversation."""
        self._notices += 1
        self.transcript.add(Turn(f"notice-{self._notices}", role, text, hint=hint))

    def complain(self, error: GlmchatError) -> None:
        self.tell(error.message, error.hint, "warning" if error.exit == 2 else "error")

    # Opening

    def begin(self) -> None:
        """Open the history and start the engine, both in threads; the screen is drawn meanwhile."""
        self._thread(self._open_history, "history")
        if self.link.has_target:
            self.connect()

    def connect(self) -> None:
        self.ready = False
        self.status.show(activity=self._stage("start"), progress=None, lost=False)
        self._thread(lambda: self.link.connect(self._report), "engine")

    def _report(self, news: Any) -> None:
        self.post_message(FromWorker(news))

    def _thread(self, work: Callable[[], None], group: str, *, exclusive: bool = False) -> None:
        self.run_worker(work, thread=True, group=group, exclusive=exclusive, exit_on_error=True)

    def _open_history(self) -> None:
        from glmchat.chat.connect import open_session
        from glmchat.chat.history import History

        launch = self.launch
        try:
            path = locations.history_file() if launch.history and self.settings.history else None
            history = History.open(path)
            session = open_session(history, launch, self.settings)
            offered = history.interrupted() if launch.resume is None else None
        except GlmchatError as error:
            self._report(Broken(error))
            return
        self._report(Opened(session, offered))

    # News

    def on_from_worker(self, message: FromWorker) -> None:
        match message.news:
            case Opened() as news:
                self._opened(news)
            case Loading(stage, done):
                self.status.show(
                    activity=self._stage(stage), progress=done if stage in ("weights", "prefill", "quantize") else None
                )
            case Ready() as news:
                self._connected(news)
            case EngineLost(error):
                self._lost(error)
            case Heard():
                self.set_timer(_LOOK, self._listen)
            case Ended(error):
                self._listen()
                self._ended(error)
            case Measured() as news:
                self._measured(news)
            case Resources(memory, gpu):
                self.status.show(memory=memory, gpu=gpu)
            case Broken(error):
                self.complain(error)

    def _opened(self, news: Opened) -> None:
        self.session = session = news.session
        if session.history.note:
            self.tell(session.history.note, role="warning")
        if news.interrupted is not None:
            title = one_line(news.interrupted.title or tr("untitled"), 60)
            self.tell(
                tr("“{title}” was interrupted while it was answered", title=title),
                tr("/resume opens it, /continue goes on"),
            )
        self._unsaved()
        if self.launch.resume is not None:
            self.show_conversation()
            self.restore_draft()
        self._meet()

    def _connected(self, news: Ready) -> None:
        self.ready = True
        identity = news.identity
        self._ready = news
        self.status.show(
            activity="", progress=None, lost=False, model=identity.model, revision=identity.revision,
            quant=identity.quant, limit=identity.context,
        )  # fmt: skip
        self._meet()

    def _meet(self) -> None:
        """The session and the endpoint are both there: go."""
        if self.session is None or self._ready is None or not self.ready:
            return
        self.session.reconnect(self._ready.endpoint, self._ready.identity)
        self.show_adapters()
        if language() == "zh":
            self.advise_chinese()
        self.measure()
        self.send_queued()

    def _lost(self, error: GlmchatError) -> None:
        self.ready = False
        self.status.show(activity="", progress=None, lost=True, memory=None)
        if self.session is not None:
            self.session.reconnect(None)
        self.complain(error)

    @staticmethod
    def _stage(stage: str) -> str:
        return tr(STAGES.get(stage, "starting the engine"))

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
        self._pending = "pending"
        self.transcript.add(Turn("pending", "user", text))
        self.transcript.add(
            Turn("pending-answer", "assistant", label=self.session.identity.model or "", state="waiting")
        )
        self.answer(self.session.ask(text))

    def answer(self, events: Iterable[SessionEvent]) -> None:
        """Run an answer in a thread."""
        if self.answering is None:
            self._pending = self._pending or "pending"
        self._asked, self._first, self._tokens, self._stopping = time.monotonic(), None, 0, False
        from glmchat.chat.cleaning import StreamCleaner

        family = self.session.identity.family if self.session else None
        self._cleaner = StreamCleaner(family)
        self._prompt_tokens = None
        self.status.show(activity=tr("thinking"), progress=None)
        self._thread(lambda: self._speak(events), "answer")

    def _speak(self, events: Iterable[SessionEvent]) -> None:
        try:
            for event in events:
                if self.ear.put(event):
                    self._report(Heard())
        except GlmchatError as error:
            self._report(Ended(error))
        else:
            self._report(Ended())

    def complete(self, text: str) -> None:
        """Let the model go on with a text. Shown, not stored: it belongs to no conversation."""
        assert self.session is not None and self._ready is not None
        self._notices += 1
        key = f"notice-completion-{self._notices}"
        label = tr("{model}, going on with a text", model=self._ready.identity.model or "")
        self.transcript.drop("welcome")
        self.transcript.add(Turn(key, "assistant", text, label, state="streaming"))
        from glmchat.chat.endpoint import Stop

        self._completion = Stop()
        chosen, adapters = self.session.sampling(), self.session.adapters or None
        events = self._ready.endpoint.complete(
            text, chosen.sampling, adapters, asked=chosen.asked, stop=self._completion
        )
        self.answering = key
        self.answer(events)

    def stop(self) -> bool:
        """Stop the answer and keep what was said. False if none is written."""
        if self.session is None or not self.busy:
            return False
        self._stopping = True
        if self._completion is not None:
            self._completion.now()
        self.session.stop()
        self.status.show(activity=tr("stopping"), progress=None)
        return True

    def send_queued(self) -> None:
        if self.queue and self.ready and not self.busy:
            text = self.queue.popleft()
            self.queue_changed()
            self.ask(text)

    def queue_changed(self) -> None:
        self.status.show(queued=len(self.queue))

    # Hearing

    def _listen(self) -> None:
        text: list[str] = []
        for event in self.ear.take():
            if isinstance(event, Piece):
                text.append(event.text)
                self._tokens += max(1, len(event.token_ids))
            else:
                self._say(text)
                self._heard(event)
        self._say(text)

    def _say(self, text: list[str]) -> None:
        """Hand gathered pieces to the transcript; empties the list."""
        if not text or self.answering is None:
            return
        if self._first is None:
            self._first = time.monotonic()
            self.status.show(first_token=self._first - self._asked, activity=tr("answering"), progress=None)
        said = "".join(text)
        self.transcript.feed(self.answering, self._cleaner.feed(said) if self._cleaner else said)
        text.clear()
        seconds = time.monotonic() - self._first
        if seconds > 0.5 and not self._stopping:
            self.status.show(speed=self._tokens / seconds)
        if self._prompt_tokens is not None:
            self.status.show(used=self._prompt_tokens + self._tokens)

    def _heard(self, event: SessionEvent) -> None:
        from glmchat.chat.answering import Begun, Done, Trimmed
        from glmchat.chat.endpoint import Progress

        match event:
            case Begun(question, answer):
                self._begun(question, answer)
            case Progress(waiting, done, total):
                if waiting:
                    self.status.show(activity=self._stage("waiting"), progress=None)
                elif total:
                    self.status.show(activity=self._stage("prefill"), progress=(done or 0) / total)
            case Started(_, _, prompt_tokens):
                self._prompt_tokens = prompt_tokens
            case Trimmed():
                self._trimmed()
            case Finished() as finished:
                self._finished(finished)
            case Done(answer):
                self._done(answer)

    def _begun(self, question: StoredMessage | None, answer: StoredMessage) -> None:
        assert self.session is not None
        self._pending = None
        self.answering = str(answer.id)
        if self.transcript.layout_of("pending-answer") is not None and question is not None:
            # The turns that were shown at once become the stored ones.
            self.transcript.rename("pending", str(question.id))
            self.transcript.rename("pending-answer", self.answering)
            self.transcript.change(self.answering, label=speaker(self.session, answer))
            self.refresh_title()
            return
        turns = turns_of(self.session)
        for turn in turns:
            if turn.key == self.answering:
                # The thread is ahead of us: what it has written since comes as pieces.
                turn.text, turn.note = self.session.shown_text(answer), ""
                turn.state = "streaming" if answer.text else "waiting"
        self.transcript.show(turns)
        self.refresh_title()

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

    def _done(self, answer: StoredMessage) -> None:
        if self.answering is not None:
            if self._cleaner is not None and (rest := self._cleaner.end()):
                self.transcript.feed(self.answering, rest)
            self.transcript.finish(self.answering, self._note(answer))

    def _note(self, answer: StoredMessage) -> str:
        turn = next((t for t in turns_of(self.session) if t.key == str(answer.id)), None) if self.session else None
        return turn.note if turn else state_note(answer)

    def _ended(self, error: GlmchatError | None) -> None:
        """The thread of an answer is over."""
        key, self.answering = self.answering, None
        if self._completion is not None and key is not None:
            self.transcript.finish(key, tr("stopped") if self._stopping else "")
            self._completion, key = None, None
        pending, self._pending = self._pending, None
        self.status.show(activity="", progress=None)
        self._unsaved()
        if error is not None:
            if pending is not None:  # nothing was stored: the words go back to where they can be sent again
                turn = self.transcript.layout_of("pending")
                if turn is not None and not self.prompt.text:
                    self.prompt.set_text(turn.turn.text)
                self.transcript.drop("pending", "pending-answer")
            elif key is not None and self.session is not None:
                stored = self.session.tree.messages.get(int(key))
                self.transcript.finish(key, self._note(stored) if stored else "")
            if self.link.failure() is not None:
                self._lost(self.link.failure() or error)
            else:
                self.complain(error)
            return
        self.refresh_title()
        self.measure()
        self.send_queued()

    # Around the conversation

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

    def show_adapters(self) -> None:
        raise NotImplementedError

    def refresh_title(self) -> None:
        raise NotImplementedError

    def advise_chinese(self) -> None:
        """Said once: this model knows only English, and what answers Chinese here."""
        if not self._told_chinese and self.ready:
            advice = advice_for_chinese(self.launch)
            if advice is not None:
                self._told_chinese = True
                self.tell(*advice)

    def _unsaved(self) -> None:
        history = self.session.history if self.session else None
        if history is None or history.path is None:
            return
        if history.problem and not self.status.facts.unsaved:
            self.tell(tr("what is said now is not saved: {why}", why=history.problem), role="warning")
        self.status.show(unsaved=not history.saved)

    # Measuring

    def measure(self, draft: str = "") -> None:
        """Count what the next request would hold, in a thread; the latest question counts."""
        if self.session is not None and self.ready and not self.busy:
            session = self.session
            self._thread(lambda: self._count(session, draft), "measure", exclusive=True)

    def _count(self, session: ChatSession, draft: str) -> None:
        try:
            self._report(Measured(session.measure(draft)))
        except GlmchatError as error:
            self._report(Measured(None, error=error))

    def _measured(self, news: Measured) -> None:
        if news.request is not None and not self.busy:
            self.status.show(used=news.request.tokens, limit=news.request.limit)

    def watch_engine(self) -> None:
        """Every two seconds, in a thread: memory, and whether the engine still lives."""
        if self.link.process is not None and self.ready:
            self._thread(self._look_at_engine, "watch", exclusive=True)

    def _look_at_engine(self) -> None:
        failure = self.link.failure()
        if failure is not None and self.ready and not self.busy:
            self._report(EngineLost(failure))
        elif failure is None:
            self._report(self.link.resources())

    def unload(self) -> None:
        """Stop the engine on purpose; F5 starts it again, and loading another model too."""
        self.stop()
        self.ready = False
        self.status.show(activity="", progress=None, lost=True, memory=None)
        if self.session is not None:
            self.session.reconnect(None)
        self._thread(self.link.stop, "engine")

    def switch_model(self, launch: LaunchOptions) -> None:
        """Another model for this conversation."""
        from glmchat.chat.sampling_choice import ranks_for_launch

        self.launch = replace(launch, history=self.launch.history)
        self.link.change(self.launch)
        self._told_chinese = False
        if self.session is not None:
            folder = launch.folder if launch.folder is None or launch.folder.is_dir() else launch.folder.parent
            ranks = ranks_for_launch(launch.sampling, catalogue=launch.defaults, folder=folder)
            for origin in ("set", "conversation"):
                ranks.asked[origin] = self.session.ranks.rank(origin)
            self.session.ranks = ranks
        self.connect()
