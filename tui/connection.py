"""The window and what answers: an engine is started or a server found, watched, its memory shown, and told apart."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from textual.message import Message

from glmchat.chat.launch import LaunchOptions
from glmchat.core.errors import DoesNotFit, GlmchatError, Interrupted, NetworkFailed, Usage
from glmchat.core.language import tr
from glmchat.core.text import human_bytes
from glmchat.tui.messages import EngineLost, Loading, Ready, Replied, Resources
from glmchat.tui.view import View
from glmchat.tui.widgets.status import stage_words

if TYPE_CHECKING:
    from glmchat.chat.client.endpoint import Stop
    from glmchat.chat.engine_process import RunningEngine
    from glmchat.core.engine_options import EngineOptions
    from glmchat.hub.catalogue import Entry

Report = Callable[[Message], None]
Start = Callable[["EngineOptions"], "RunningEngine"]


class EngineLink:
    """start: what starts an engine process (tests put a fake there)."""

    def __init__(self, launch: LaunchOptions, start: Start | None = None) -> None:
        self.launch = launch
        self.process: RunningEngine | None = None
        self._start = start
        self._lock = threading.Lock()
        self._closed = False
        self.greeting: Stop | None = None  # gives up asking the server what it has
        self.device: str | None = None  # where the engine computes, once it says so

    @property
    def has_target(self) -> bool:
        return self.launch.server is not None or self.launch.engine.folder is not None

    def connect(self, report: Report) -> None:
        """Start or find it, report how far it is, then Ready or EngineLost. One that was given up reports nothing."""
        greeting = self.greeting
        try:
            report(self.greet_server() if self.launch.server is not None else self._start_engine(report))
        except GlmchatError as error:
            if not self._closed and not (greeting is not None and greeting.is_set):
                report(EngineLost(error))

    def greet_server(self) -> Ready:
        from glmchat.chat.connect import greet

        connection = greet(self.launch, self.greeting)
        self.stop()  # an engine that answered until now
        return Ready(connection.endpoint, connection.identity)

    def _start_engine(self, report: Report) -> Ready:
        from glmchat.chat.connect import engine_options, identity_of, require_fit
        from glmchat.chat.shared_engine import start_engine

        options = engine_options(self.launch)
        try:
            require_fit(options)  # what is refused leaves the engine that answers where it is
        except DoesNotFit:
            if self.process is None:
                raise
            self.stop()  # perhaps there is room without it
            require_fit(options)
        self.stop()
        with self._lock:
            if self._closed:
                raise Interrupted(tr("the window was closed"), hint=tr("open it again"), code="chat.closed")
            process = self.process = (self._start or start_engine)(options)
        process.wait_ready(lambda stage, done: report(Loading(stage, done)), lambda: self._closed)
        identity = identity_of(self.launch, process.endpoint)
        self.device = identity.device
        return Ready(process.endpoint, identity)

    def failure(self) -> GlmchatError | None:
        """Why the engine is gone; None while it lives, and for servers of others."""
        process = self.process  # looked at once and without the lock, which `stop` holds until the engine has ended
        return process.failure() if process is not None else None

    def is_free(self, own: int) -> bool:
        from glmchat.chat.shared_engine import is_free

        return is_free(self.process, own)

    def resources(self) -> Resources:
        from glmchat.chat.engine_process import gpu_memory, process_memory

        process = self.process  # once, as in `failure`
        pid = process.pid if process is not None and process.alive else None
        return Resources(process_memory(pid) if pid else None, gpu_memory(self.device) if pid else None)

    def change(self, launch: LaunchOptions) -> None:
        """Talk to something else; `connect` does it."""
        self.launch = launch

    def stop(self) -> None:
        """We need the engine no more; `connect` starts it again."""
        with self._lock:
            if self.process is not None:
                self.process.stop()
                self.process = None

    def end(self) -> bool:
        """As `stop`, and its memory is free; False where others use the engine too, which then goes on for them."""
        with self._lock:
            process, self.process = self.process, None
            return process is None or process.end()

    def close(self) -> None:
        """As `stop`; nothing is reported any more."""
        self._closed = True
        if self.greeting is not None:
            self.greeting.now()
        self.stop()


HEALTH_SECONDS = 15.0  # between two looks at a server that is not asked anything
_ROOM = 0.8  # share of the machine's memory that weights may take


def advice_for_chinese(launch: LaunchOptions) -> tuple[str, str] | None:
    """(what is the case, what to do), or None if the model knows Chinese or is not in the catalogue."""
    from glmchat.chat.engine_process import total_memory
    from glmchat.hub import catalogue, references

    if launch.engine.model is None or launch.server is not None:
        return None
    try:
        entries = catalogue.load()
        entry = entries.find(references.parse(launch.engine.model))
    except GlmchatError:
        return None
    if entry is None or not entry.languages or "zh" in entry.languages:
        return None
    room = int(total_memory() * _ROOM)
    speakers = [e for e in entries if "zh" in e.languages and e.default and 0 < _weights(e) <= room]
    text = tr("{model} speaks only English", model=entry.name)
    if not speakers:
        return text, tr(
            "no model in the catalogue that speaks Chinese fits into the {size} of this machine",
            size=human_bytes(total_memory()),
        )
    choice = min(speakers, key=_weights)  # the one that loads and answers soonest
    size = human_bytes(_weights(choice))
    return text, tr("F4 offers {name} ({size}), which answers Chinese", name=choice.reference, size=size)


def _weights(entry: Entry) -> int:
    return sum(file.size or 0 for file in entry.files)


class ModelConnection:
    """Draws the left of the status line. answers: what was last connected to; it can be asked while `ready`."""

    def __init__(self, view: View, launch: LaunchOptions, link: EngineLink) -> None:
        self.launch = launch
        self.link = link
        self.ready = False
        self.answers: Ready | None = None
        self._answered: LaunchOptions | None = None  # what was last connected to
        self._asking: Stop | None = None  # of the question that the window waits for
        self._view = view
        self._advised = False
        self._away = False  # the server does not answer, and is asked again now and then
        self._looked = time.monotonic()  # when an idle server was looked at last

    def connect(self, *, fresh: bool = False) -> None:
        """Start the engine or find the server, in a thread; `Loading`, then `Ready` or `EngineLost` come back."""
        from glmchat.chat.client.request import Stop

        self.ready = False
        self._away = False
        self._asking = self.link.greeting = Stop() if self.launch.server is not None else None
        activity = stage_words("start") if self._asking is None else self._waiting_words()
        self._view.status.show(activity=activity, progress=None, lost=False, away=False)
        self._view.show_queue()

        def work() -> None:
            if fresh:
                self.link.end()
            self.link.connect(self._report)

        self._view.start_thread(work, "engine")

    @property
    def asking(self) -> bool:
        """The window waits for a server's word; `give_up` ends that."""
        return self._asking is not None

    @property
    def takes_questions(self) -> bool:
        """What is asked while another model is looked for is meant for that one, and waits."""
        return self.ready and not self.asking

    def ask(self, question: Callable[[Stop], Message]) -> None:
        """Have a thread ask what answers; the message comes back, unless it was given up. A later one takes over."""
        from glmchat.chat.client.request import Stop

        if self._asking is not None:
            self._asking.now()
        stop = self._asking = Stop()
        self._view.show_queue()
        if not self._view.status.facts.activity:
            self._view.status.show(activity=self._waiting_words(), progress=None)

        def work() -> None:
            try:
                self._report(Replied(stop, question(stop)))
            except GlmchatError as error:
                self._report(Replied(stop, error=error))

        self._view.start_thread(work, "models")

    def replied(self, news: Replied) -> None:
        """Raises what the question raised."""
        if news.given_up.is_set:
            return
        self._asked()
        if news.error is not None:
            raise news.error
        if news.reply is not None:
            self._view.post_message(news.reply)

    def _asked(self) -> None:
        self._asking = None
        self._view.show_queue()
        if self._view.status.facts.activity == self._waiting_words():
            self._view.status.show(activity="")

    def _waiting_words(self) -> str:
        return stage_words("greet" if self.launch.server is not None else "ask")

    def give_up(self) -> bool:
        """Wait for the server's word no longer. False where the window waits for none."""
        if self._asking is None:
            return False
        is_greeting = self._asking is self.link.greeting
        self._asking.now()
        self._asked()
        if is_greeting:
            self.lost(Interrupted(tr("stopped"), hint=tr("F5 connects again")))
        else:
            self._view.tell(tr("stopped"))
        return True

    def restart(self) -> None:
        """As `connect`, with another engine in place of the one that is there, unless others use that."""
        self.connect(fresh=True)

    def _end(self) -> None:
        self.link.end()

    def _report(self, news: Message) -> None:
        self._view.post_message(news)

    def switch(self, launch: LaunchOptions) -> None:
        """Another model."""
        self.launch = replace(launch, history=self.launch.history)
        self.link.change(self.launch)
        self._advised = False
        self.connect()

    def unload(self) -> None:
        """Stop the engine on purpose; `connect` starts it again."""
        self._show_lost()
        self._view.start_thread(self._end, "engine")

    def loading(self, news: Loading) -> None:
        has_share = news.stage in ("weights", "prefill", "quantize")
        self._view.status.show(activity=stage_words(news.stage), progress=news.done if has_share else None)

    def connected(self, news: Ready) -> None:
        self._asked()
        if self.answers is None:
            gc.freeze()  # full collections leave out what stays for good; they took 130 ms, in the midst of typing
        self.ready, self.answers, self._answered = True, news, self.launch
        if self._away:
            self._away = False
            self._view.tell(tr("the server answers again"), tr("/continue resumes an answer, /regen asks again"))
        identity = news.identity
        self._view.status.show(
            activity="", progress=None, lost=False, away=False, model=identity.model, revision=identity.revision,
            quant=identity.quant, limit=identity.context, device=identity.device, device_reason=identity.device_reason,
        )  # fmt: skip

    def lost(self, error: GlmchatError) -> None:
        if not self.ready and self._answered is not None and self._answered != self.launch:
            self.launch = self._answered  # F5 goes back to the model that has answered here
            self.link.change(self.launch)
            self._view.status.show(
                model=self.launch.engine.model, quant=self.launch.engine.quant_label,
                revision=self.launch.engine.revision,
            )  # fmt: skip
        self._asked()
        self._away = self.is_away(error)
        self._show_lost()
        self._view.show_error(error)

    def is_away(self, error: GlmchatError) -> bool:
        """Whether a server has gone, as an answer or a greeting says: it may come back by itself."""
        return self.launch.server is not None and (isinstance(error, NetworkFailed) or error.code == "server.broke")

    def _show_lost(self) -> None:
        self.ready = False
        is_server = self.launch.server is not None
        self._view.status.show(activity="", progress=None, lost=True, server=is_server, away=self._away, memory=None)
        self._view.show_queue()

    def failure(self) -> GlmchatError | None:
        """Why the engine that was ready is gone; None while it lives."""
        return self.link.failure() if self.ready else None

    def require_ready(self) -> None:
        self.require_loaded()
        if not self.ready:
            raise Usage(
                tr("the model is not ready"),
                hint=tr("F5 starts it again, /model chooses another"),
                code="chat.not_ready",
            )

    def require_loaded(self) -> None:
        if not self.ready and self._view.status.facts.activity:
            raise Usage(tr("the model is still loading"), hint=tr("try again in a moment"), code="chat.loading")

    def watch(self) -> None:
        """Look in a thread: at the engine's memory, whether it still lives, and whether a lost server is back."""
        if self._away:
            self._view.start_thread(self._look_for_server, "watch", exclusive=True)
        elif self.launch.server is not None and self.ready and time.monotonic() - self._looked > HEALTH_SECONDS:
            self._looked = time.monotonic()
            self._view.start_thread(self._look_at_server, "watch", exclusive=True)
        if self.link.process is not None and self.ready:
            self._view.start_thread(self._look, "watch", exclusive=True)

    def _look_at_server(self) -> None:
        """Whether an idle server is still there; one that is slow to say so once is."""
        launch, answers = self.launch, self.answers
        if answers is None:
            return
        for is_last in (False, True):
            try:
                answers.endpoint.health()
                return
            except GlmchatError as error:
                if is_last and self.is_away(error) and self.launch is launch:
                    self._view.post_message(EngineLost(error))

    def _look_for_server(self) -> None:
        launch = self.launch
        with suppress(GlmchatError):  # still away
            news = self.link.greet_server()
            if self._away and self.launch is launch:
                self._view.post_message(news)

    def _look(self) -> None:
        process = self.link.process
        failure = self.failure()
        if not self.ready or self.link.process is not process:
            return  # it was stopped meanwhile, since something else answers now: its end is no loss
        if failure is not None:
            self._view.post_message(EngineLost(failure))
        else:
            self._view.post_message(self.link.resources())

    def show_resources(self, news: Resources) -> None:
        self._view.status.show(memory=news.memory, gpu=news.gpu)

    def advise_chinese(self) -> None:
        """Said once: this model knows only English, and what answers Chinese here."""
        if not self._advised and self.ready:
            advice = advice_for_chinese(self.launch)
            if advice is not None:
                self._advised = True
                self._view.tell(*advice)
