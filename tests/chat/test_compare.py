"""Comparisons: columns in words, answers side by side in one tree, failures, stops and kills.

Covers chat/compare/columns.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_server import fake_command
from fakes import model_in

from glmchat.chat import connect, engine_process, shared_engine
from glmchat.chat.compare import columns
from glmchat.chat.compare.columns import OneByOne, Together, parse_columns, versions
from glmchat.chat.compare.compare import ColumnFailed, Comparison, Said, resume
from glmchat.chat.history.history import History
from glmchat.chat.launch import LaunchOptions
from glmchat.checkpoints import card_fit
from glmchat.core import locations
from glmchat.core.engine_options import EngineOptions
from glmchat.core.errors import GlmchatError, UnknownModel, Usage
from glmchat.core.messages import Piece
from glmchat.core.settings import Settings

Fake = Callable[..., None]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = model_in(tmp_path / "model")
    adapter = locations.adapters_dir() / "poet"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    return folder


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    """`engine(pieces=…)`: what every engine started from now on says."""

    def become(**behaviour: object) -> None:
        start = functools.partial(shared_engine.start_engine, command=fake_command(**behaviour))
        monkeypatch.setattr(connect, "start_engine", start)

    become()
    yield become


def texts(comparison: Comparison) -> dict[int, str]:
    return {column: answer.text for column, answer in comparison.answers().items()}


def test_a_column_is_a_name_with_adapters_and_settings() -> None:
    first, second, third = parse_columns(["chatglm3-6b:int4+poet:0.5+calm,temp=0.2,top_k=4", "+poet", ",seed=3"])
    assert first.name == "chatglm3-6b:int4" and first.adapters == (("poet", 0.5), ("calm", 1.0))
    assert first.sampling == {"temperature": 0.2, "top_k": 4}
    assert second.name == third.name == first.name and second.adapters == (("poet", 1.0),)
    assert third.sampling == {"seed": 3}


@pytest.mark.parametrize(
    "text",
    ["+poet", "a+poet:much", "a+poet:nan", "a+poet:inf", "a+poet:1e3", "a,colour=3", "a,temp=warm", "a,temp=9", "a+"],
)
def test_a_column_that_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(Usage):
        parse_columns([text])


def test_a_path_may_hold_a_plus(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    assert parse_columns([f"{tmp_path}/a+b,temp=0"])[0].name == f"{tmp_path}/a+b"


def test_columns_of_one_model_share_one_engine_and_one_question(history: History, model: Path, engine: Fake) -> None:
    columns = parse_columns([str(model), "+poet:0.5", ",temp=0.1"])
    comparison = Comparison(history, columns, Settings(), base=LaunchOptions(sampling={"seed": 5}))
    events = list(comparison.ask("hello"))
    assert events[0] == Together(1, None)
    assert texts(comparison) == {0: "one two", 1: "one two", 2: "one two"}
    answers = comparison.answers()
    assert {a.parent for a in answers.values()} == {comparison.question and comparison.question.id}
    assert [answers[i].details["sampling"]["temperature"] for i in (0, 1, 2)] != [0.1] * 3
    assert answers[2].details["sampling"]["temperature"] == 0.1
    assert all(a.details["sampling"]["seed"] == 5 for a in answers.values())
    assert answers[1].details["adapters"] == [{"name": "poet", "scale": 0.5}]
    assert answers[1].details["facts"]["adapters"] == [{"name": "poet", "scale": 0.5}]
    assert answers[0].details["facts"]["adapters"] == []
    said = [(e.column, e.event.text) for e in events if isinstance(e, Said) and isinstance(e.event, Piece)]
    assert sorted(said) == [(c, word) for c in range(3) for word in ("one ", "two")]


def test_one_engine_is_asked_for_eight_columns_at_a_time(history: History, model: Path, engine: Fake) -> None:
    engine(parallel=16)
    comparison = Comparison(history, parse_columns([str(model), *["+poet"] * 9]), Settings())
    assert next(comparison.ask("hello")) == Together(1, None, lots=2)
    list(comparison.ask("hello"))
    assert texts(comparison) == dict.fromkeys(range(10), "one two")


def test_columns_of_one_engine_that_differ_in_settings_are_answered_together(
    history: History, model: Path, engine: Fake, tmp_path: Path
) -> None:
    go_on = tmp_path / "go on"
    engine(until=str(go_on), seconds_per_token=0.01, parallel=3)
    comparison = Comparison(history, parse_columns([str(model), ",temp=0.1", ",temp=0.2"]), Settings())
    seen: set[int] = set()
    for event in comparison.ask("hello"):
        if isinstance(event, Said) and isinstance(event.event, Piece):
            seen.add(event.column)
            if seen == {0, 1, 2}:
                go_on.touch()  # no column ends before all have begun
    assert seen == {0, 1, 2} == set(comparison.answers())
    assert [comparison.answers()[i].details["sampling"]["temperature"] for i in (1, 2)] == [0.1, 0.2]


def test_whoever_compares_speeds_has_one_answer_written_at_a_time(history: History, model: Path, engine: Fake) -> None:
    engine(parallel=2)
    comparison = Comparison(history, parse_columns([str(model), ",temp=0.1"]), Settings(), one_by_one=True)
    how, *events = comparison.ask("hello")
    assert isinstance(how, OneByOne)
    said = [e.column for e in events if isinstance(e, Said) and isinstance(e.event, Piece)]
    assert said == [0, 0, 1, 1]


def test_an_engine_that_dies_under_several_columns_is_told_to_each(history: History, model: Path, engine: Fake) -> None:
    engine(die_after=1, parallel=2)
    comparison = Comparison(history, parse_columns([str(model), ",temp=0.1", "+poet"]), Settings())
    failures = [e for e in comparison.ask("hello") if isinstance(e, ColumnFailed)]
    assert sorted(f.column for f in failures) == [0, 1, 2]
    assert {f.error.code for f in failures} == {"engine.killed"}


@pytest.mark.parametrize(("seed", "seeds"), [(None, [None] * 3), (7, [7, 8, 9]), (2**63 - 1, [2**63 - 1, 0, 1])])
def test_versions_are_columns_of_what_answers_with_seeds_that_differ(seed: int | None, seeds: list[int | None]) -> None:
    columns = versions("tiny:int4", [("poet", 0.5)], 3, ["temp=0.9"], seed)
    assert [c.sampling.get("seed") for c in columns] == seeds
    assert {(c.name, c.adapters, c.sampling["temperature"]) for c in columns} == {("tiny:int4", (("poet", 0.5),), 0.9)}
    assert parse_columns([c.text for c in columns]) == columns, "the texts are kept, and stand for themselves"


def test_picking_an_answer_opens_its_branch_with_its_model_and_settings(
    history: History, history_path: Path, model: Path, engine: Fake
) -> None:
    comparison = Comparison(history, parse_columns([str(model), "+poet:0.5,top_p=0.3", ""]), Settings())
    list(comparison.ask("hello"))
    comparison.pick(1)
    with History.open(history_path) as other:
        tree = other.load(comparison.tree.conversation.id)
    assert tree.leaf == comparison.answers()[1].id
    assert tree.conversation.settings.adapters == (("poet", 0.5),)
    assert tree.conversation.settings.sampling == {"top_p": 0.3}
    assert len(tree.siblings(tree.path()[-1])) == 3
    with pytest.raises(Usage):
        comparison.pick(7)


def test_two_models_take_turns_where_the_machine_is_too_small_and_it_is_said(
    history: History, model: Path, tmp_path: Path, engine: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = model_in(tmp_path / "other")
    monkeypatch.setattr(columns, "physical_cores", lambda: 8)
    monkeypatch.setattr(card_fit, "available_memory", lambda: 10**9)
    asked = parse_columns([str(model), str(other)])
    first, *_ = Comparison(history, asked, Settings()).ask("hello")
    monkeypatch.setattr(card_fit, "available_memory", lambda: 5 * 10**8)
    comparison = Comparison(history, asked, Settings())
    second, *_ = comparison.ask("hello")
    assert first == Together(2, 4)
    assert isinstance(second, OneByOne) and "memory" in second.reason
    assert texts(comparison) == {0: "one two", 1: "one two"}


def test_a_column_that_fails_does_not_stop_the_others(history: History, model: Path, engine: Fake) -> None:
    engine(context=40)
    long = Comparison(history, parse_columns([str(model), ",max_tokens=1"]), Settings())
    failures = [
        e for e in long.ask("a question of more than forty characters, which none takes") if isinstance(e, ColumnFailed)
    ]
    assert sorted(f.column for f in failures) == [0, 1]
    engine(load_failure=GlmchatError("no weights", hint="", code="x").to_json())
    broken = Comparison(history, parse_columns([str(model), "+poet"]), Settings())
    assert [e.error.message for e in broken.ask("hello") if isinstance(e, ColumnFailed)] == ["no weights"] * 2


def test_a_model_that_does_not_load_is_told_and_the_other_answers(
    history: History, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = model_in(tmp_path / "other")
    broken = GlmchatError("no weights", hint="", code="x").to_json()

    def start(options: EngineOptions) -> engine_process.RunningEngine:
        behaviour = {"load_failure": broken} if options.folder == model else {}
        return shared_engine.start_engine(options, command=fake_command(**behaviour))

    monkeypatch.setattr(connect, "start_engine", start)
    comparison = Comparison(history, parse_columns([str(model), str(other)]), Settings(), one_by_one=True)
    failures = [e for e in comparison.ask("hello") if isinstance(e, ColumnFailed)]
    assert [(f.column, f.error.message) for f in failures] == [(0, "no weights")]
    assert texts(comparison) == {1: "one two"} and comparison.missing() == [0]


def test_a_stop_keeps_what_was_said_and_begins_no_other(history: History, model: Path, engine: Fake) -> None:
    engine(repeat=200, seconds_per_token=0.02)
    comparison = Comparison(history, parse_columns([str(model), "+poet"]), Settings(), one_by_one=True)
    for event in comparison.ask("hello"):
        if isinstance(event, Said) and isinstance(event.event, Piece):
            comparison.stop()
    (answer,) = comparison.answers().values()
    assert answer.state == "stopped" and answer.text.startswith("one ")


def test_what_a_kill_left_missing_is_brought_and_what_stood_is_continued(
    history: History, model: Path, engine: Fake
) -> None:
    comparison = Comparison(
        history, parse_columns([str(model), ",temp=0"]), Settings(), base=LaunchOptions(sampling={"seed": 9})
    )
    question = history.append(
        comparison.tree, "user", "hello", details={"compare": [str(model), ",temp=0"], "sampling": {"seed": 9}}
    )
    mark = {"compare": {"column": 0, "text": str(model)}, "model": str(model)}
    half = history.append(
        comparison.tree, "assistant", "zero ", state="interrupted", parent=question.id, details=mark, token_ids=(4,)
    )
    again = resume(history, history.load(comparison.tree.conversation.id), Settings())
    assert again.missing() == [0, 1]
    list(again.go_on())
    answers = again.answers()
    assert answers[0].id == half.id and answers[0].text == "zero one two" and answers[1].text == "one two"
    assert answers[1].details["sampling"]["seed"] == 9 and again.missing() == []
    with pytest.raises(Usage):
        resume(history, history.new(), Settings())


def test_an_adapter_that_is_not_here_is_told_before_anything_loads(history: History, model: Path) -> None:
    with pytest.raises(UnknownModel) as unknown:
        Comparison(history, parse_columns([str(model), "+nobody"]), Settings())
    assert (unknown.value.code, unknown.value.exit) == ("adapter.unknown", 2)
    with pytest.raises(Usage):
        Comparison(history, parse_columns([str(model)]), Settings())
    assert json.loads((model / "config.json").read_text())
