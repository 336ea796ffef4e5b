"""Where a file is tested has an answer by name: tests/<room>/test_<file>.py, or the "Covers" of a test's docstring."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("core", "checkpoints", "hub", "engine", "tuning", "jobs", "serve", "chat", "tui", "cli")
SMALL = 40  # lines; a smaller file is tested with the one that uses it


def covered(test: Path) -> list[str]:
    """The files that the docstring of a test says it covers."""
    said = re.search(r"^Covers ([^.]+(?:\.py[^.]*)*)\.$", ast.get_docstring(ast.parse(test.read_text())) or "", re.M)
    return re.findall(r"[\w/]+\.py", said[1]) if said else []


TESTS = sorted((ROOT / "tests").glob("*/test_*.py"))
COVERED = {test: files for test in TESTS if (files := covered(test))}


@pytest.mark.parametrize("room", ROOMS)
def test_every_file_has_a_test_of_its_name_or_one_that_says_it_covers_it(room: str) -> None:
    named = {name for files in COVERED.values() for name in files}
    orphans = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / room).rglob("*.py"))
        if len(path.read_text(encoding="utf-8").splitlines()) > SMALL
        and not (ROOT / "tests" / room / f"test_{path.name}").exists()
        and str(path.relative_to(ROOT)) not in named
    ]
    assert not orphans


@pytest.mark.parametrize("test", COVERED, ids=lambda test: f"{test.parent.name}/{test.name}")
def test_what_a_test_says_it_covers_is_there(test: Path) -> None:
    assert [name for name in COVERED[test] if not (ROOT / name).is_file()] == []
