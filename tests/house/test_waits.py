"""No test waits a fixed time: what comes later is waited for by `polling`, until it is there or a deadline is over."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
LONG_SLEEP = re.compile(r"sleep\((?!0?\.0)[\d.]")  # in a script for a child; it may look up every few hundredths
POLLING = TESTS / "polling.py"


def fixed_waits(source: str) -> list[int]:
    """Lines that sleep, or let a pilot pause, for a time of their own. A fake may be as slow as its caller says."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            chosen_here = any(isinstance(part, ast.Constant) for argument in node.args for part in ast.walk(argument))
            if (name in ("sleep", "pause") and chosen_here) or name == "Timer":
                lines.append(node.lineno)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and LONG_SLEEP.search(node.value):
            lines.append(node.lineno)
    return lines


def test_no_test_sleeps_for_a_time_that_somebody_guessed() -> None:
    waits = {
        f"{path.relative_to(TESTS)}:{line}"
        for path in TESTS.rglob("*.py")
        if path not in (POLLING, Path(__file__).resolve())
        for line in fixed_waits(path.read_text(encoding="utf-8"))
    }
    assert not waits, "wait for what is meant, with polling.wait_until or eventually"


def test_a_guessed_time_is_seen_in_every_form() -> None:
    guesses = (
        "time.sleep(0.2)",
        "sleep(1 + n)",
        "await pilot.pause(0.1)",
        "Timer(0.3, stop).start()",
        "s = 'sleep(9)'",
    )
    assert [fixed_waits(line) for line in guesses] == [[1]] * len(guesses)
    assert not fixed_waits("await pilot.pause()\ntime.sleep(self.seconds_per_token)")
