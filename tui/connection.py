"""The chat screen's line to the engine and the history: open, connect, watch, measure. No conversation, no layout."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from textual.screen import Screen

from glmchat.chat.launch import LaunchOptions
from glmchat.core import locations
from glmchat.core.errors import GlmchatError, Usage
from glmchat.core.language import language, tr
from glmchat.core.settings import Settings
from glmchat.core.text import one_line
from glmchat.tui.advice import advice_for_chinese
from glmchat.tui.link import EngineLink
from glmchat.tui.messages import (
    STAGES,
    Broken,
    Ended,
    EngineLost,
    FromWorker,
    Heard,
    Loading,
    Measured,
    Opened,
    Ready,
    Resources,
    Weighed,
)
from glmchat.tui.steady import Steady
from glmchat.tui.transcript.transcript import Transcript
from glmchat.tui.transcript.turns import Role, Turn
from glmchat.tui.widgets.prompt import Prompt
from glmchat.tui.widgets.status import StatusLine

if TYPE_CHECKING:
    from glmchat.chat.session import ChatSession
    from glmchat.tui.answering import Answering

_LOOK = 0.04  # seconds between two looks at what an answer has said


class Connecting(Steady, Screen[None]):
    """Holds the session and the link. Everything that blocks runs in worker threads and comes back as `FromWorker`."""

    def __init__(self, launch: LaunchOptions, settings: Settings, link: EngineLink) -> None:
        super().__init__()
        self.launch = launch
        self.settings = settings
        self.link = link
        self.session: ChatSession | None = None
        self.ready = False
        self._notices = 0
        self._told_chinese = False
        self._ready: Ready | None = None

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

    def tell(self, text: str, hint: str = "", role: Role = "notice") -> None:
        """A line in the transcript that is not part of the conversation."""
        self._notices += 1
        self.transcript.add(Turn(f"notice-{self._notices}", role, text, hint=hint))

    def complain(self, error: GlmchatError) -> None:
        self.tell(error.message, error.hint, "warning" if error.exit == 2 else "error")

    def guarded(self, act: Callable[[], None]) -> None:
        """Do something a person asked for, and show what they can mend."""
        try:
            act()
        except GlmchatError as error:
            self.complain(error)

    def _talk(self) -> ChatSession:
        if self.session is None:
            raise Usage(tr("the history is still being opened"), hint=tr("try again in a moment"), code="chat.opening")
        return self.session

    # Opening

    def begin(self) -> None:
        """Open the history and start the engine, both in threads; the screen is drawn meanwhile."""
        self._thread(self._open_history, "history")
        if self.link.has_target:
            self.connect()

    def connect(self) -> None:
        self.ready = False
        self.status.show(activity=self._stage("start"), progress=None, lost=False)
        self.queue_changed()
        self._thread(lambda: self.link.connect(self._report), "engine")

    def queue_changed(self) -> None:
        """What waits, or what it waits for, is not what it was."""

    def _report(self, news: Any) -> None:
        self.post_message(FromWorker(news))

    def _thread(self, work: Callable[[], None], group: str, *, exclusive: bool = False) -> None:
        self.run_worker(work, thread=True, group=group, exclusive=exclusive, exit_on_error=True)

    def _open_history(self) -> None:
        from glmchat.chat.connect import open_session
        from glmchat.chat.history.history import History

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
            case Heard(answering):
                self.set_timer(_LOOK, lambda: self._listen(answering))
            case Ended(answering, error):
                self._listen(answering)
                self._ended(answering, error)
            case Measured() as news:
                self._measured(news)
            case Resources(memory, gpu):
                self.status.show(memory=memory, gpu=gpu)
            case Weighed() as news:
                self.file_weighed(news)
            case Broken(error):
                self.complain(error)

    def _opened(self, news: Opened) -> None:
        self.session = session = news.session
        for note in (self.launch.note, session.history.note):
            if note:
                self.tell(note, role="warning")
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
        if self._ready is None:
            gc.freeze()  # full collections leave out what stays for good; they took 130 ms, in the midst of typing
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
        self.queue_changed()
        if self.session is not None:
            self.session.reconnect(None)
        self.complain(error)

    @staticmethod
    def _stage(stage: str) -> str:
        return tr(STAGES.get(stage, "starting the engine"))

    def advise_chinese(self) -> None:
        """Said once: this model knows only English, and what answers Chinese here."""
        if not self._told_chinese and self.ready:
            advice = advice_for_chinese(self.launch)
            if advice is not None:
                self._told_chinese = True
                self.tell(*advice)

    def _unsaved(self) -> None:
        history = self.session.history if self.session else None
        if history is None or history.path is None or history.saved is not self.status.facts.unsaved:
            return
        if history.problem and not self.status.facts.unsaved:
            self.tell(tr("this conversation is not being saved: {why}", why=history.problem), role="warning")
        elif history.saved:
            self.tell(tr("saved again, with what was said meanwhile"))
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

    # Another engine

    def unload(self) -> None:
        """Stop the engine on purpose; F5 starts it again, and loading another model too."""
        self.stop_all()
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

    # What the other halves of the screen do

    @property
    def busy(self) -> bool:
        raise NotImplementedError

    def stop_all(self) -> None:
        raise NotImplementedError

    def send_queued(self) -> None:
        raise NotImplementedError

    def show_conversation(self) -> None:
        raise NotImplementedError

    def restore_draft(self) -> None:
        raise NotImplementedError

    def show_adapters(self) -> None:
        raise NotImplementedError

    def file_weighed(self, news: Weighed) -> None:
        raise NotImplementedError

    def _listen(self, answering: Answering) -> None:
        raise NotImplementedError

    def _ended(self, answering: Answering, error: GlmchatError | None) -> None:
        raise NotImplementedError
