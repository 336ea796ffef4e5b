"""`glmchat ps` and `glmchat stop`, and one-shots that find their engine warm, through the whole command.

Covers cli/engines.py.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import model_in
from polling import wait_until

from glmchat.chat.shared_engine import end_engine
from glmchat.core import engine_records

Argv = Callable[..., list[str]]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def warm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = Path(tempfile.mkdtemp(prefix="g", dir="/tmp"))  # a path that is short enough for a socket
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("GLMCHAT_KEEP_ALIVE", "5m")
    yield
    for record in engine_records.running():
        end_engine(record)
    shutil.rmtree(folder)


@pytest.fixture
def glmchat(fake_argv: Argv) -> Command:
    def run(*arguments: object, **behaviour: Any) -> subprocess.CompletedProcess[str]:
        argv = fake_argv(behaviour, *arguments)
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)

    return run


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("first", "second"):
        model_in(tmp_path / name)
    return tmp_path / "first", tmp_path / "second"


def rows(glmchat: Command) -> list[dict[str, Any]]:
    return [json.loads(line) for line in glmchat("ps", "--json").stdout.splitlines()]


def test_the_second_one_shot_finds_the_engine_of_the_first(glmchat: Command, models: tuple[Path, Path]) -> None:
    assert [glmchat("run", models[0], "hi").stdout for _ in range(2)] == ["one two\n"] * 2
    (row,) = rows(glmchat)
    assert row["users"] == [] and row["state"] == "ready" and row["memory"] > 1 << 20
    assert 200 < row["seconds_left"] < 300
    shown = glmchat("ps").stdout
    assert str(models[0]) in shown and "nobody" in shown and "4:" in shown


def test_stop_ends_the_one_that_is_named_or_all(glmchat: Command, models: tuple[Path, Path]) -> None:
    for model in models:
        glmchat("run", model, "hi")
    unsaid = glmchat("stop")
    assert unsaid.returncode == 2 and str(models[0]) in unsaid.stderr and "all" in unsaid.stderr
    unknown = glmchat("stop", "third")
    assert unknown.returncode == 2 and str(models[1]) in unknown.stderr, "the way out is named"
    assert glmchat("stop", models[0]).returncode == 0
    assert [row["model"] for row in rows(glmchat)] == [str(models[1])]
    assert glmchat("stop", "all").returncode == 0 and rows(glmchat) == []
    assert glmchat("stop").stderr == "no engine runs\n"


def test_with_a_time_of_nothing_no_engine_is_left(glmchat: Command, models: tuple[Path, Path]) -> None:
    assert glmchat("run", models[0], "hi", "--keep-alive", "0").stdout == "one two\n"
    assert rows(glmchat) == []


def test_ps_names_the_program_that_uses_an_engine(
    glmchat: Command, fake_argv: Argv, models: tuple[Path, Path], tmp_path: Path
) -> None:
    behaviour = {"pieces": ["x "], "seconds_per_token": 0.02, "until": str(tmp_path / "enough"), "device": "cuda:3"}
    argv = fake_argv(behaviour, "run", models[0])
    with subprocess.Popen([*argv, "hi"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None and program.stdout.read(2) == b"x "
        (row,) = rows(glmchat)
        assert row["users"] == [program.pid] and row["seconds_left"] is None
        assert row["device"] == "cuda:3", "where it computes, not what was asked for"
        assert f"glmchat ({program.pid})" in glmchat("ps").stdout
        program.send_signal(signal.SIGKILL)
    wait_until(lambda: rows(glmchat)[0]["users"] == [])
