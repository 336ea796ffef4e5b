"""What the screens look like. `pytest tests/tui/test_snapshots.py --snapshot-update` draws them anew."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from polling import eventually
from windows import LAUNCH, EngineInThread, make_app

from glmchat.chat.launch import LaunchOptions
from glmchat.core import engine_records, language
from glmchat.tui import model_rows
from glmchat.tui.app import GlmchatApp
from glmchat.tui.connection import ModelConnection
from glmchat.tui.list_screen import ListScreen
from glmchat.tui.transcript.turns import Turn
from glmchat.tui.widgets.status import Facts

ANSWER = (Path(__file__).parent / "answer.txt").read_text(encoding="utf-8")
FACTS = Facts("smollm2", "b179c9523d0e", "q4_1", speed=41.2, first_token=0.12, used=312, limit=8192, memory=412_000_000)


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing moves by itself: no engine, no watch, no blinking cursor, and no engine of another test that runs."""
    monkeypatch.setattr(engine_records, "running", list)
    monkeypatch.setattr(ModelConnection, "watch", lambda self: None)
    monkeypatch.setattr(ModelConnection, "connect", lambda self: None)
    monkeypatch.setattr(model_rows, "available_memory", lambda: 8_000_000_000)
    monkeypatch.setattr(EngineInThread, "__init__", lambda *a, **k: None)


def showing(
    *turns: Turn,
    keys: tuple[str, ...] = (),
    prompt: str = "",
    theme: str | None = None,
    launch: LaunchOptions = LAUNCH,
) -> tuple[GlmchatApp, Callable[[Any], Awaitable[None]]]:
    app = make_app(launch)

    async def prepare(pilot: Any) -> None:
        await pilot.pause()
        app.chat.prompt.cursor_blink = False
        await eventually(lambda: app.chat.talk.session is not None)
        box, text = app.chat.prompt_box, app.chat.transcript
        await eventually(lambda: box.border_subtitle and box.region.x == text.region.x + text.margin - 1)
        if theme:
            app.change_theme(theme)
        app.chat.status.facts = FACTS
        app.chat.status.refresh()
        if turns:
            app.chat.transcript.show(turns)
        app.chat.prompt.set_text(prompt)
        for key in keys:
            await pilot.press(key)
            await eventually(lambda: not (isinstance(app.screen, ListScreen) and app.screen.reading))
        await pilot.pause()

    return app, prepare


TALK = (
    Turn("1", "user", "How do I sort a list in Python, and what does “stable” mean?"),
    Turn("2", "assistant", ANSWER, "smollm2", "stopped · /continue resumes"),
)


@pytest.mark.parametrize("size", [(40, 12), (80, 24), (140, 44)], ids=["40x12", "80x24", "140x44"])
def test_the_chat(snap_compare: Any, size: tuple[int, int]) -> None:
    app, prepare = showing(*TALK)
    assert snap_compare(app, run_before=prepare, terminal_size=size)


@pytest.mark.parametrize("theme", ["light", "contrast", "ansi", "plain"])
def test_the_chat_in_every_theme(snap_compare: Any, theme: str) -> None:
    app, prepare = showing(*TALK, theme=theme)
    assert snap_compare(app, run_before=prepare, terminal_size=(80, 30))


def test_the_welcome_and_the_suggestions(snap_compare: Any) -> None:
    app, prepare = showing(prompt="/re")
    assert snap_compare(app, run_before=prepare, terminal_size=(80, 24))


def test_the_sampling_panel(snap_compare: Any) -> None:
    app, prepare = showing(keys=("f2",))
    assert snap_compare(app, run_before=prepare, terminal_size=(80, 24))


def test_the_help(snap_compare: Any) -> None:
    app, prepare = showing(keys=("f1",))
    assert snap_compare(app, run_before=prepare, terminal_size=(90, 40))


def test_the_models(snap_compare: Any) -> None:
    app, prepare = showing(keys=("f4",))
    assert snap_compare(app, run_before=prepare, terminal_size=(80, 24))


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_adapters(snap_compare: Any, adapters_here: LaunchOptions, lang: str) -> None:
    language.choose(lang)
    try:
        keys = ("f7", "down", "enter", "down", "space", "left", "left")
        app, prepare = showing(keys=keys, launch=adapters_here)
        assert snap_compare(app, run_before=prepare, terminal_size=(110, 24))
    finally:
        language.choose(None)


def test_the_conversations(snap_compare: Any) -> None:
    app, prepare = showing(keys=("ctrl+b",))
    assert snap_compare(app, run_before=prepare, terminal_size=(100, 24))


def test_a_dead_engine(snap_compare: Any) -> None:
    error = Turn(
        "e", "error", "the engine was killed (signal 9): usually the system was out of memory", hint="try --quant 4"
    )
    app, prepare = showing(*TALK[:1], error)
    assert snap_compare(app, run_before=prepare, terminal_size=(80, 20))


def test_the_chat_in_chinese(snap_compare: Any) -> None:
    language.choose("zh")
    try:
        turns = (
            Turn("1", "user", "量化是什么？"),
            Turn(
                "2",
                "assistant",
                "**量化**（quantization）把权重从十六位压缩到四位。\n\n1. 省内存\n2. 更快\n",
                "chatglm3-6b",
            ),
        )
        app, prepare = showing(*turns, keys=("/",))
        assert snap_compare(app, run_before=prepare, terminal_size=(80, 24))
    finally:
        language.choose(None)
