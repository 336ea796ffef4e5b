"""Opens the real window over a fake engine, and waits for what is true instead of for time."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_server import fake_command
from fakes import FakeEngine
from polling import SECONDS, eventually, wait_until
from textual import events
from textual.keys import _character_to_key

from glmchat.chat.client.endpoint import Endpoint
from glmchat.chat.launch import LaunchOptions
from glmchat.chat.shared_engine import start_engine
from glmchat.core.engine_options import EngineOptions
from glmchat.core.settings import Settings
from glmchat.core.sockets import bind_unix, new_socket_path
from glmchat.serve.face import Load
from glmchat.serve.run import make_server
from glmchat.tui.app import GlmchatApp
from glmchat.tui.screens.chat import ChatScreen
from glmchat.tui.transcript.turns import Turn

HOPS = 8  # from a key to the widget, up to the screen that acts, and down to those that draw
LAUNCH = LaunchOptions(
    EngineOptions(folder=Path("/fake/model"), model="smollm2", quant_label="q4_1", revision="b179c9523d0e")
)
ENDLESS: dict[str, Any] = {
    "pieces": ["word "], "repeat": 100_000, "seconds_per_token": 0.002, "context": 1_000_000,
    "launch": replace(LAUNCH, sampling={"max_tokens": 1_000_000}),
}  # fmt: skip


class EngineInThread:
    """An engine process without the process: the real server over a fake engine, or one of `load`, in a thread."""

    def __init__(
        self, options: EngineOptions, seconds_to_load: float = 0.0, load: Load | None = None, **behaviour: Any
    ) -> None:
        self.socket_path = new_socket_path()
        load = load or FakeEngine.loader(seconds_to_load=seconds_to_load, **behaviour)
        chosen = replace(options, adapters=(), sampling={}, quant_label=None)
        self.server = make_server(chosen, load, over_tcp=False)
        self.endpoint = Endpoint(uds=str(self.socket_path), model=options.model)
        self.thread = threading.Thread(target=self.server.serve_on, args=(bind_unix(self.socket_path),), daemon=True)
        self.thread.start()
        self.pid = os.getpid()
        self.alive = True

    def wait_ready(self, on_progress: Callable[[str, float], None], cancelled: Callable[[], bool]) -> None:
        def ready() -> bool:
            health = self.endpoint.health()
            on_progress(health.stage or "start", health.done or 0.0)
            return health.status == "ok" or cancelled()

        wait_until(ready)

    def failure(self) -> None:
        return None

    def end(self) -> bool:
        self.stop()
        return True

    def stop(self) -> None:
        if self.alive:
            self.alive = False
            self.server.stop()
            self.thread.join(10)
            self.socket_path.unlink(missing_ok=True)


def hold_reading(monkeypatch: pytest.MonkeyPatch, module: Any, function: str) -> threading.Event:
    """A slow disk: what this function gives does not come before the event is set."""
    event, listing = threading.Event(), getattr(module, function)

    def slow(*of: Any, **which: Any) -> Any:
        event.wait(SECONDS)
        return listing(*of, **which)

    monkeypatch.setattr(module, function, slow)
    return event


def make_app(
    launch: LaunchOptions = LAUNCH, settings: Settings | None = None, *, child: bool = False, **behaviour: Any
) -> GlmchatApp:
    """behaviour: FakeEngine's arguments; child: in a process of its own, then fake_server's."""
    if not child:
        settings = settings or Settings(titles="never")
        return GlmchatApp(launch, settings, start=lambda options: EngineInThread(options, **behaviour))  # type: ignore[arg-type,return-value]
    return GlmchatApp(launch, settings, start=lambda options: start_engine(options, command=fake_command(**behaviour)))


class Window:
    def __init__(self, app: GlmchatApp, pilot: Any) -> None:
        self.app, self.pilot = app, pilot

    @property
    def chat(self) -> ChatScreen:
        return self.app.chat

    @property
    def turns(self) -> list[Turn]:
        return self.chat.transcript.turns

    def said(self, role: str) -> list[str]:
        return [turn.text for turn in self.turns if turn.role == role]

    @property
    def notices(self) -> str:
        return "\n".join(f"{t.text} {t.hint}" for t in self.turns if t.role in ("notice", "warning", "error"))

    @property
    def toasts(self) -> str:
        return "\n".join(notification.message for notification in self.app._notifications)

    async def until(self, holds: Callable[[], object], seconds: float = SECONDS) -> None:
        """Wait until something is true; the test fails with the turns if it never is."""
        await eventually(holds, seconds, else_=lambda: f"waited in vain; turns: {self.turns}")

    async def ready(self) -> None:
        await self.until(lambda: self.chat.connection.ready and self.chat.talk.session is not None)

    async def press(self, *keys: str) -> None:
        """As `pilot.press`, without its wait for an idle processor: an answer may be streaming."""
        for key in keys:
            name = _character_to_key(key) if len(key) == 1 and not key.isalnum() else key
            self.app.post_message(events.Key(name, key if len(key) == 1 else None))
            await self.settle()

    async def settle(self) -> None:
        """Until every widget has handled what was sent to it, and what that made it send to others."""
        for _ in range(HOPS):
            await self.pilot._wait_for_screen()

    async def type(self, text: str) -> None:
        self.chat.prompt.insert(text)
        await self.settle()

    async def send(self, text: str) -> None:
        await self.type(text)
        await self.press("enter")

    async def ask(self, text: str) -> None:
        """Send, and wait for the whole answer."""
        before = len(self.said("assistant"))
        await self.send(text)
        await self.until(lambda: len(self.said("assistant")) > before and not self.chat.talk.busy)

    def screen_text(self) -> str:
        """What stands on the screen."""
        width, height = self.app.size
        strips = self.app.screen._compositor.render_strips(self.app.size)
        return "\n".join("".join(segment.text for segment in strip) for strip in strips)[: (width + 1) * height]


@asynccontextmanager
async def open_window(
    size: tuple[int, int] = (100, 30),
    *,
    launch: LaunchOptions = LAUNCH,
    settings: Settings | None = None,
    wait: bool = True,
    **behaviour: Any,
) -> AsyncIterator[Window]:
    """wait: until the engine answers. behaviour: as for `make_app`."""
    app = make_app(launch, settings, **behaviour)
    async with app.run_test(size=size) as pilot:
        window = Window(app, pilot)
        await window.settle()
        if wait:
            await window.ready()
        yield window
        if app.chat.talk.session is not None:
            app.chat.talk.session.stop()
