"""`glmchat bench`: what it measured, for people and for programs.

Covers cli/bench.py, jobs/bench.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from glmchat.cli.main import run

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))

import engine_builders


def test_each_prompt_that_fits_is_timed_and_the_machine_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = engine_builders.write_folder(tmp_path / "tiny")
    assert run(["bench", str(model), "--context", "200", "--threads", "1", "--json"]) == 0
    load, *lengths, machine = map(json.loads, capsys.readouterr().out.splitlines())
    assert (load["event"], load["threads"]) == ("bench.load", 1) and load["load_seconds"] > 0
    assert [one["prompt_tokens"] for one in lengths] == [32, 128]  # an answer of 64 tokens fits behind these
    assert all(one["prefill_tokens_per_second"] > 0 < one["decode_tokens_per_second"] for one in lengths)
    assert machine["event"] == "bench.machine" and machine["threads"] == 1
    assert machine["weights_bytes"] > 0 < machine["read_bytes_per_second"]
    fastest = max(one["decode_tokens_per_second"] for one in lengths)
    share = fastest * machine["weights_bytes"] / machine["read_bytes_per_second"]
    assert machine["decode_fraction"] == pytest.approx(share) and share < 1.000001  # no loop reads faster than the bus


def test_without_a_model_it_says_how_to_name_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench"]) == 2
    assert "glmchat bench NAME" in capsys.readouterr().err
