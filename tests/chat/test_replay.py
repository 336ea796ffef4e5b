"""Replays of the real starter model: three turns, one stop, one continue, then fresh processes.

Covers chat/replay/replay.py, jobs/replay.py, cli/replay.py.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from glmchat.chat.connect import connect, identity_of
from glmchat.chat.history.history import History
from glmchat.chat.launch import LaunchOptions
from glmchat.chat.replay.replay import Outcome, find_answer, plan_replay, run_replay
from glmchat.chat.sampling_choice import SamplingRanks
from glmchat.chat.session import ChatSession
from glmchat.cli.main import run
from glmchat.core import locations
from glmchat.core.engine_options import EngineOptions
from glmchat.core.messages import Piece
from glmchat.engine.native.self_test import coarse_fault


@pytest.fixture(scope="module")
def spoken(starter_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, list[int]]]:
    """A history with three turns of the starter model: its file, the model's, and the answers' numbers."""
    home = tmp_path_factory.mktemp("spoken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLMCHAT_HOME", str(home))
        model = home / "smol.gguf"
        shutil.copyfile(starter_model, model)
        launch = LaunchOptions(EngineOptions(folder=model, model=str(model), threads=1, context=512))
        with History.open(home / "history.db") as history, connect(launch) as connection:
            ranks = SamplingRanks({"flag": {"temperature": 0.9, "top_p": 0.95, "max_tokens": 14, "seed": 11}})
            identity = identity_of(launch, connection.endpoint)
            session = ChatSession(history, connection.endpoint, identity=identity, ranks=ranks)
            list(session.ask("Name three colours of the sky."))
            said = 0
            for event in session.ask("Tell me about one of them."):
                said += isinstance(event, Piece)
                if said == 5:
                    session.stop()
            assert session.tree.path()[-1].state == "stopped"
            list(session.continue_answer())
            list(session.ask("And the others?"))
            list(session.regenerate({"seed": 12}))
            answers = [m.id for m in session.tree.messages.values() if m.role == "assistant"]
        yield home / "history.db", model, answers


def outcome(database: Path, target: str, **options: object) -> Outcome:
    with History.open(database) as history:
        plan = plan_replay(history, target, **options)  # type: ignore[arg-type]
    *_, last = run_replay(plan)
    assert isinstance(last, Outcome)
    return last


def test_every_answer_is_the_same_in_a_fresh_process(spoken: tuple[Path, Path, list[int]]) -> None:
    database, _, answers = spoken
    assert len(answers) == 4
    for number in (answers[1], answers[3]):  # the stopped and continued one; another version of the third
        found = outcome(database, f"m{number}")
        assert found.identical and not found.differences, found
    with History.open(database) as history:
        _, continued = find_answer(history, f"m{answers[1]}")
        stretches = continued.details["stretches"]
        assert len(stretches) == 2 and 0 < stretches[1]["start"] < len(continued.token_ids)
        _, other = find_answer(history, "1")
        assert other.id == answers[3] and other.details["stretches"][0]["cached_n"] > 0
        assert any(len(p) == 4 for p in other.details["stretches"][0]["passes"])  # a batch of which a row was cut off


def test_the_command_says_identical_and_exits_0_and_names_the_setting_that_differs(
    spoken: tuple[Path, Path, list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    source, _, answers = spoken
    with closing(sqlite3.connect(source)) as rows:
        rows.execute("VACUUM INTO ?", (str(locations.private_dir(locations.data_dir()) / "history.db"),))
    assert run(["replay", f"m{answers[0]}", "--json"]) == 0
    start, *_, end = map(json.loads, capsys.readouterr().out.splitlines())
    assert (start["event"], start["message"]) == ("start", answers[0])
    assert (end["event"], end["identical"], end["differences"]) == ("end", True, [])
    code = run(["replay", f"m{answers[0]}", "--set", "temperature=0"])
    told = capsys.readouterr().out
    assert code == 0 and "setting temperature" in told  # that it parts is what was asked for
    assert run(["replay", f"m{answers[0]}", "--set", "hotter"]) == 2


@pytest.mark.parametrize("what", ["products", "cache_type"])
@pytest.mark.skipif(coarse_fault() is not None, reason=f"no products of 8 bits here: {coarse_fault()}")
def test_an_answer_of_8_bits_is_said_again_with_them_and_not_without(
    what: str, starter_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLMCHAT_HOME", str(tmp_path))
    narrow: dict[str, Any] = {what: "int8"}
    options = EngineOptions(folder=starter_model, model="starter", threads=1, context=512, **narrow)
    launch, database = LaunchOptions(options), tmp_path / "history.db"
    with History.open(database) as history, connect(launch) as connection:
        ranks = SamplingRanks({"flag": {"temperature": 1.0, "max_tokens": 60, "seed": 3}})
        identity = identity_of(launch, connection.endpoint)
        list(ChatSession(history, connection.endpoint, identity=identity, ranks=ranks).ask("Tell me a story."))
    found = outcome(database, "1")
    assert found.identical and not found.differences
    with closing(sqlite3.connect(database)) as file, file:
        ((number, details),) = file.execute("SELECT id, details FROM message WHERE role = 'assistant'")
        changed = json.loads(details)
        del changed["stretches"][0][what]
        file.execute("UPDATE message SET details = ? WHERE id = ?", (json.dumps(changed), number))
    without = outcome(database, "1")
    assert not without.identical
    assert what == "cache_type" or any("kernel" in str(one) for one in without.differences)


def test_a_seed_that_was_drawn_is_no_difference_and_zero_is_a_seed(
    spoken: tuple[Path, Path, list[int]], tmp_path: Path
) -> None:
    source, _, answers = spoken
    database = tmp_path / "history.db"
    with closing(sqlite3.connect(source)) as rows:
        rows.execute("VACUUM INTO ?", (str(database),))
    with closing(sqlite3.connect(database)) as rows, rows:
        rows.execute(
            "UPDATE message SET details = json_set(details, '$.stretches[0].sampling.seed', NULL) WHERE id = ?",
            (answers[0],),
        )
    with History.open(database) as history:
        assert plan_replay(history, f"m{answers[0]}").changed == ()
        (changed,) = plan_replay(history, f"m{answers[0]}", changes={"seed": 0}).changed
    assert (changed.what, changed.then, changed.now) == ("setting seed", 11, 0)


def test_a_changed_weight_byte_and_a_changed_setting_are_named(spoken: tuple[Path, Path, list[int]]) -> None:
    database, model, answers = spoken
    kept = model.read_bytes()
    try:
        with model.open("r+b") as file:
            file.seek(len(kept) - 1000)
            file.write(bytes([kept[-1000] ^ 0x40]))
        found = outcome(database, f"m{answers[0]}", changes={"temp": 0.0, "seed": 5})
    finally:
        model.write_bytes(kept)
    (weights,) = [d for d in found.differences if d.what == "weights smol.gguf"]
    assert weights.then.startswith("sha256:") and weights.now.startswith("sha256:") and weights.then != weights.now
    assert {d.what for d in found.differences} == {"weights smol.gguf", "setting temperature", "setting seed"}
    assert found.identical is (found.token is None) and found.tokens == 14
