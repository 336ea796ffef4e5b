"""The window's line to what answers: starts the engine or finds the server, and watches it.

Its methods block: worker threads call them and hand what they learn to `report`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from textual.message import Message

from glmchat.chat.launch import LaunchOptions
from glmchat.core.errors import GlmchatError, Interrupted
from glmchat.core.language import tr
from glmchat.tui.messages import EngineLost, Loading, Ready, Resources

if TYPE_CHECKING:
    from glmchat.chat.engine_process import EngineProcess
    from glmchat.core.engine_options import EngineOptions

Report = Callable[[Message], None]
Start = Callable[["EngineOptions"], "EngineProcess"]


class EngineLink:
    """start: what starts an engine process (tests put a fake there)."""

    def __init__(self, launch: LaunchOptions, start: Start | None = None) -> None:
        self.launch = launch
        self.process: EngineProcess | None = None
        self._start = start
        self._lock = threading.Lock()
        self._closed = False

    @property
    def has_target(self) -> bool:
        return self.launch.server is not None or self.launch.engine.folder is not None

    def connect(self, report: Report) -> None:
        """Start or find it, report how far it is, then Ready or EngineLost."""
        try:
            report(self._greet_server() if self.launch.server is not None else self._start_engine(report))
        except GlmchatError as error:
            if not self._closed:
                report(EngineLost(error))

    def _greet_server(self) -> Ready:
        from glmchat.chat.connect import connect

        self.stop()
        connection = connect(self.launch)
        return Ready(connection.endpoint, connection.identity)

    def _start_engine(self, report: Report) -> Ready:
        from glmchat.chat.connect import engine_options, identity_of, require_fit
        from glmchat.chat.engine_process import start_engine

        options = engine_options(self.launch)
        self.stop()  # first, so that its memory is free
        require_fit(options)
        with self._lock:
            if self._closed:
                raise Interrupted(tr("the window was closed"), hint=tr("open it again"), code="chat.closed")
            process = self.process = (self._start or start_engine)(options)
        process.wait_ready(lambda stage, done: report(Loading(stage, done)), lambda: self._closed)
        return Ready(process.endpoint, identity_of(self.launch, process.endpoint))

    def failure(self) -> GlmchatError | None:
        """Why the engine is gone; None while it lives, and for servers of others."""
        process = self.process  # looked at once and without the lock, which `stop` holds until the engine has ended
        return process.failure() if process is not None else None

    def resources(self) -> Resources:
        from glmchat.chat.resources import gpu_memory, process_memory

        process = self.process  # once, as in `failure`
        pid = process.pid if process is not None and process.alive else None
        return Resources(process_memory(pid) if pid else None, gpu_memory() if pid else None)

    def change(self, launch: LaunchOptions) -> None:
        """Talk to something else; `connect` does it."""
        self.launch = launch

    def stop(self) -> None:
        """The engine ends; `connect` starts it again."""
        with self._lock:
            if self.process is not None:
                self.process.stop()
                self.process = None

    def close(self) -> None:
        """The engine ends; nothing is reported any more."""
        self._closed = True
        self.stop()
