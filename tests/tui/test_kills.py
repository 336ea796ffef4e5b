"""A window and its engine, killed while an answer streams. `benchmarks/kill_chat.py` does it a hundred times."""

from __future__ import annotations

import random
from pathlib import Path

from kills import PROMISE, live_and_die


def test_a_killed_engine_and_a_killed_window_lose_nothing_older_than_a_second(tmp_path: Path) -> None:
    answer, losses = live_and_die(tmp_path, "ab", "", random.Random(0))
    assert answer.startswith("a0")
    assert len(losses) == 2 and max(losses) < PROMISE
