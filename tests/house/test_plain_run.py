"""A plain `pytest` says at its end what it left out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
THREE_SKIPPED = """
import pytest

@pytest.mark.parametrize("n", [1, 2])
def test_wants_a_card(n):
    pytest.skip("no card")

@pytest.mark.skip(reason="no network")
def test_wants_a_network():
    pass

def test_wants_nothing():
    pass
"""


def run(folder: Path, tests: str) -> str:
    (folder / "test_some.py").write_text(tests, encoding="utf-8")
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", str(folder)]
    done = subprocess.run(
        [*command, "-p", "conftest", "test_some.py"],
        cwd=folder,
        env={"PYTHONPATH": str(TESTS), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout


def test_a_run_says_how_many_tests_were_skipped_for_each_reason(tmp_path: Path) -> None:
    lines = run(tmp_path, THREE_SKIPPED).splitlines()
    assert [line for line in lines if line.startswith("skipped")] == ["skipped 2: no card", "skipped 1: no network"]


def test_a_run_that_skips_nothing_says_nothing_of_it(tmp_path: Path) -> None:
    assert "skipped" not in run(tmp_path, "def test_wants_nothing():\n    pass\n")
