"""Runs the command line with a fake engine behind it: a real child process and server that say what they were told."""

from __future__ import annotations

import functools
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_server import fake_command
from fakes import model_in

from glmchat.chat import connect, shared_engine
from glmchat.cli import main as cli

HERE = Path(__file__).resolve().parent
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that stands for a checkpoint."""
    return model_in(tmp_path / "model")


@pytest.fixture
def fake_argv() -> Callable[..., list[str]]:
    """`fake_argv(behaviour, *arguments)`: a command line, for tests that need a process of its own."""

    def argv(behaviour: dict[str, Any], *arguments: object) -> list[str]:
        return [sys.executable, "-P", str(HERE / "with_fake_engine.py"), json.dumps(behaviour), *map(str, arguments)]

    return argv


@pytest.fixture
def glmchat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`glmchat(*arguments, stdin=b"", **behaviour)`: the command to its end, here; the engine is a child."""

    def run(*arguments: object, stdin: bytes = b"", **behaviour: Any) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        start = functools.partial(shared_engine.start_engine, command=fake_command(**behaviour))
        with monkeypatch.context() as patch:
            patch.setattr(connect, "start_engine", start)
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
            code = cli.run([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess([*map(str, arguments)], code, out, err)

    return run
