"""The comparison in the window: columns that stream, stop, pick, what is kept, and what the screen looks like.

Covers tui/comparing.py, tui/widgets/comparison_column.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_server import fake_command
from fakes import model_in
from hub_helpers import COMMIT_A, CONFIG, hub_entry, put_into_cache, user_catalogue
from windows import Window, make_app, open_window

from glmchat.chat import connect, shared_engine
from glmchat.chat.compare import columns
from glmchat.chat.history.history import History
from glmchat.chat.launch import LaunchOptions
from glmchat.core import language, locations
from glmchat.core.engine_options import EngineOptions
from glmchat.hub import adapters
from glmchat.tui.connection import ModelConnection
from glmchat.tui.screens.chat import ChatScreen
from glmchat.tui.screens.comparison import ComparisonScreen
from glmchat.tui.widgets.comparison_column import ComparisonColumn
from glmchat.tui.widgets.prompt import Prompt

ANSWERS = (Path(__file__).parent / "answer.txt").read_text(encoding="utf-8")


@pytest.fixture
def launch(tmp_path: Path) -> LaunchOptions:
    """The model of the window; two adapters lie in the store."""
    for name in ("poet", "clerk"):
        adapter = locations.adapters_dir() / name
        adapter.mkdir(parents=True)
        (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    return LaunchOptions(
        EngineOptions(folder=tmp_path / "tiny", model=str(model_in(tmp_path / "tiny"))), sampling={"seed": 5}
    )


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Another model; what the comparison starts for it is a fake in a process of its own."""
    start = functools.partial(shared_engine.start_engine, command=fake_command(pieces=["three ", "four"]))
    monkeypatch.setattr(connect, "start_engine", start)
    yield model_in(tmp_path / "other")


def screen(window: Window) -> ComparisonScreen:
    assert isinstance(window.app.screen, ComparisonScreen)
    return window.app.screen


async def over(window: Window) -> None:
    await window.until(
        lambda: isinstance(window.app.screen, ComparisonScreen) and window.app.screen.comparison.question
    )
    await window.until(lambda: not screen(window)._at_work)


async def test_two_adapters_are_compared_on_the_engine_that_runs_and_one_is_picked(launch: LaunchOptions) -> None:
    adapters.change_force(adapters.find_adapter("poet"), True)
    async with open_window(launch=launch, echo=True) as window:
        await window.ask("before")
        await window.send("/compare +poet +clerk:0.5,temp=0.2\nhello")
        await over(window)
        text = window.screen_text()
        assert "one engine answers them together" in text and "+ poet" in text and "+ clerk:0.5" in text
        assert "seed 5" in text and "temperature 0.2" in text
        assert "tiny + poet (forced)" in text and text.count("+ clerk:0.5") == 2, "above an answer too"
        await window.press("right", "enter")
        await window.until(lambda: isinstance(window.app.screen, ChatScreen))
        session = window.chat.talk.session
        assert session is not None and session.adapters == (("clerk", 0.5),)
        assert session.sampling().sampling.temperature == 0.2
        assert window.said("user") == ["before", "hello"] and window.said("assistant") == ["before", "hello"]
        versions, index = session.branches(session.tree.path()[-1].id)
        assert len(versions) == 2 and index == 1
        await window.ask("after")
        assert session.tree.path()[-1].details["adapters"] == [{"name": "clerk", "scale": 0.5}]


async def test_the_last_question_is_answered_several_times_and_one_is_chosen(launch: LaunchOptions) -> None:
    async with open_window((160, 40), launch=launch, parallel=3) as window:
        await window.ask("hello")
        await window.send("/set seed 5")
        await window.send("/regen 3 temp=0.7")
        await over(window)
        text = window.screen_text()
        assert "one engine answers them together" in text and "seed 6" in text and "temperature 0.7" in text
        await window.press("right", "right", "enter")
        await window.until(lambda: isinstance(window.app.screen, ChatScreen))
        session = window.chat.talk.session
        assert session is not None and window.said("user") == ["hello"]
        await window.until(lambda: "version 4 of 4" in window.screen_text())
        versions, index = session.branches(session.tree.path()[-1].id)
        assert [v.details["sampling"]["seed"] for v in versions[1:]] == [5, 6, 7] and index == 3
        chosen = session.sampling().sampling
        assert chosen.temperature != 0.7 and chosen.seed == 5, "the settings were of these answers alone"


async def test_one_name_is_compared_with_the_model_that_runs_on_the_last_question_again(launch: LaunchOptions) -> None:
    async with open_window(launch=launch) as window:
        await window.ask("hello")
        await window.send("/compare ,temp=0")
        await window.until(lambda: isinstance(window.app.screen, ComparisonScreen))
        await window.until(lambda: "Ask all of them" in window.screen_text())
        await window.press("up")
        await window.until(lambda: screen(window).query_one(Prompt).text == "hello")
        await window.press("enter")
        await over(window)
        await window.press("escape")
        await window.until(lambda: isinstance(window.app.screen, ChatScreen))
        session = window.chat.talk.session
        assert session is not None and window.said("user") == ["hello"]
        versions, index = session.branches(session.tree.path()[-1].id)
        assert len(versions) == 3 and index == 1  # the answer of before; then the columns, of which the first is open
        assert [v.details["sampling"]["temperature"] for v in versions][2] == 0


async def test_the_engine_goes_where_memory_allows_only_one_and_the_picked_model_comes(
    launch: LaunchOptions, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "physical_cores", lambda: 8)
    monkeypatch.setattr("glmchat.checkpoints.card_fit.available_memory", lambda: 1000)
    async with open_window(launch=launch) as window:
        await window.send(f"/compare {other}\nhello")
        await over(window)
        text = window.screen_text()
        assert "one after another: together they need" in text and "three four" in text and "one two" in text
        assert window.chat.connection.link.process is None
        await window.press("2", "enter")
        await window.until(
            lambda: isinstance(window.app.screen, ChatScreen) and window.chat.connection.launch.engine.folder == other
        )
        await window.ready()
        assert window.said("assistant") == ["three four"]


async def test_escape_stops_what_runs_and_keeps_what_was_said(launch: LaunchOptions) -> None:
    async with open_window(launch=launch, repeat=500, seconds_per_token=0.01) as window:
        await window.send("/compare +poet\nhello")
        await window.until(lambda: isinstance(window.app.screen, ComparisonScreen) and "tok/s" in window.screen_text())
        await window.press("enter")  # nothing is picked while answers stream
        await window.press("escape")
        await over(window)
        assert "stopped · /continue resumes" in window.screen_text()
        assert "stopped before it began" in window.screen_text(), "it stood in the engine's line"
        with History.default() as history:
            head = history.last()
            assert head is not None
            answers = [m for m in history.load(head.id).messages.values() if m.role == "assistant"]
        assert [answer.state for answer in answers] == ["stopped"] * 2
        first, second = sorted((answer.text for answer in answers), reverse=True)
        assert first.startswith("one two") and not second, (
            "whichever came first has the engine that answers one at a time"
        )


async def test_what_was_compared_is_shown_again_and_a_missing_answer_is_brought(launch: LaunchOptions) -> None:
    """As after a kill: the question and one answer stand in the history, the other answer was never begun."""
    async with open_window(launch=launch) as window:
        session = window.chat.talk.session
        assert session is not None
        columns = [launch.engine.model, "+poet"]
        question = session.history.append(session.tree, "user", "hello", details={"compare": columns})
        mark = {"compare": {"column": 0, "text": launch.engine.model}, "model": launch.engine.model}
        session.history.append(session.tree, "assistant", "zero ", state="interrupted", details=mark)
        await window.press("f6")
        await window.until(lambda: isinstance(window.app.screen, ComparisonScreen) and "zero" in window.screen_text())
        await window.press("r")
        await over(window)
        found = screen(window).comparison.answers()
        assert {i: m.text for i, m in found.items()} == {0: "zero one two", 1: "one two"}
        assert {m.parent for m in found.values()} == {question.id}


async def test_names_are_completed_as_they_are_typed(launch: LaunchOptions) -> None:
    files = {"config.json": CONFIG, "model.safetensors": b"weights" * 100}
    user_catalogue(hub_entry("tiny", "owner/tiny", COMMIT_A, files))
    put_into_cache("owner/tiny", COMMIT_A, files)
    async with open_window(launch=launch) as window:
        for typed, whole in (
            ("/comp", "/compare "), ("t", "/compare tiny"), (":", "/compare tiny:int4"),
            ("+cl", "/compare tiny:int4+clerk"), (",te", "/compare tiny:int4+clerk,temperature="),
            ("0 +", "/compare tiny:int4+clerk,temperature=0 +clerk"),
        ):  # fmt: skip
            await window.type(typed)
            await window.until(lambda: window.chat.prompt.suggesting)
            await window.press("tab")
            await window.until(lambda whole=whole: window.chat.prompt.text == whole)  # type: ignore[misc]


async def test_what_cannot_be_compared_is_told_in_the_chat(launch: LaunchOptions) -> None:
    async with open_window(launch=launch) as window:
        for words, told in (("+nobody", "no adapter 'nobody'"), (",colour=1", "colour"), ("", "")):
            await window.send(f"/compare {words}")
            assert isinstance(window.app.screen, ChatScreen) and told in window.notices
        assert window.chat.prompt.text == "/compare "


async def test_a_narrow_terminal_shows_one_column_at_a_time_and_a_click_takes_another(launch: LaunchOptions) -> None:
    async with open_window((50, 16), launch=launch) as window:
        await window.send("/compare +poet +clerk\nhello")
        await over(window)
        assert "+ clerk" not in window.screen_text()
        await window.pilot.click("#tabs", offset=(len(screen(window)._tabs()[0].plain) + 4, 0))
        await window.until(lambda: "+ clerk" in window.screen_text())
        await window.pilot.click(screen(window).columns[1].query_one(".pick"))
        await window.until(lambda: isinstance(window.app.screen, ChatScreen))
        assert window.chat.talk.session is not None and window.chat.talk.session.adapters == (("clerk", 1.0),)


@pytest.mark.parametrize("size", [(120, 26), (60, 20)], ids=["wide", "narrow"])
@pytest.mark.parametrize("word", ["en", "zh"])
def test_two_adapters_and_a_quantisation(
    snap_compare: Any, launch: LaunchOptions, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], word: str
) -> None:
    """The screen after a comparison whose answers are stored; speeds are those of the record."""
    monkeypatch.setattr(ModelConnection, "watch", lambda self: None)
    assert launch.engine.folder is not None
    files = {path.name: path.read_bytes() for path in launch.engine.folder.iterdir() if path.is_file()}
    user_catalogue(hub_entry("smollm2", "owner/tiny", COMMIT_A, files))
    put_into_cache("owner/tiny", COMMIT_A, files)
    launch = replace(launch, engine=replace(launch.engine, model="smollm2"))
    language.choose("zh" if word == "zh" else None)
    try:
        app = make_app(launch)

        async def prepare(pilot: Any) -> None:
            window = Window(app, pilot)
            await window.ready()
            session = window.chat.talk.session
            assert session is not None
            names = ["smollm2", "smollm2:int4+poet", "smollm2+clerk:0.5,temp=0.2"]
            session.history.append(session.tree, "user", "What is a tuple? 元组是什么？", details={"compare": names})
            question = session.tree.leaf
            for number, name in enumerate(names):
                details = {
                    "compare": {"column": number, "text": name}, "model": "smollm2" + ":int4" * (number == 1),
                    "revision": "b179c9523d0e", "quant": "int4-g32" if number == 1 else "q4_1", "seed": 5 + number,
                    "sampling": {"temperature": 0.2 if number == 2 else 0.7, "top_p": 0.9, "top_k": 0},
                    "completion_tokens": 120 + number, "decode_tokens_per_second": 41.2 - number,
                }  # fmt: skip
                session.history.append(
                    session.tree, "assistant", ANSWERS, parent=question, details=details,
                    state="stopped" if number == 2 else "complete",
                )  # fmt: skip
            await window.press("f6")
            await window.until(lambda: isinstance(app.screen, ComparisonScreen) and app.screen.query(ComparisonColumn))
            await window.until(lambda: all(column.state == "done" for column in screen(window).columns))
            await window.press("right")
            await window.until(lambda: screen(window).columns[1].has_class("current"))
            await pilot.pause()

        assert snap_compare(app, run_before=prepare, terminal_size=size)
    finally:
        language.choose(None)
