"""The window's line to its engine.

Covers tui/connection.py.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from windows import LAUNCH

from glmchat.checkpoints import fit
from glmchat.core.errors import DoesNotFit, EngineDied
from glmchat.tui.connection import EngineLink
from glmchat.tui.messages import EngineLost


def test_what_does_not_fit_is_told_in_the_window_and_no_engine_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"num_layers": 28, "hidden_size": 4096, "num_attention_heads": 32}')
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(12_000_000_000 - 22)
        file.seek(0, 2)
        file.write(b"PK\x05\x06" + bytes(18))  # the end of a zip archive without entries
    monkeypatch.setattr(fit, "available_memory", lambda: 6_000_000_000)
    monkeypatch.setattr(fit, "check_folder", lambda folder: None)  # the sparse file holds no weights
    launch = replace(LAUNCH, engine=replace(LAUNCH.engine, folder=tmp_path))
    started: list[Any] = []
    link = EngineLink(launch, start=lambda options: started.append(options))  # type: ignore[arg-type, return-value]
    told: list[Any] = []
    link.connect(told.append)
    assert not started and isinstance(told[0], EngineLost) and isinstance(told[0].error, DoesNotFit)
    assert "--quant 4" in told[0].error.hint


class _StoppedMeanwhile(EngineLink):
    """Another thread stops the engine between any two looks at it."""

    engine: Any = None

    @property
    def process(self) -> Any:
        seen, self.engine = self.engine, None
        return seen

    @process.setter
    def process(self, engine: Any) -> None:
        self.engine = engine


class _Engine:
    alive = True
    pid = os.getpid()

    def failure(self) -> EngineDied:
        return EngineDied("it was killed", hint="start it again")


def test_an_engine_that_is_stopped_while_the_window_looks_at_it_breaks_no_look() -> None:
    link = _StoppedMeanwhile(LAUNCH)
    link.process = _Engine()
    failure = link.failure()
    assert failure is not None and failure.message == "it was killed"
    assert link.failure() is None
    link.process = _Engine()
    assert link.resources().memory is not None
    assert link.resources().memory is None
