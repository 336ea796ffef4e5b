"""A process that runs commands, and servers that answer with what they were given."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # commands.py, hostile_inputs.py, replying.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tui"))  # `from windows import open_window`

from commands import Commands
from hostile_inputs import Place
from replying import Replying


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with Commands() as running:
        yield running


@pytest.fixture(scope="module")
def replying() -> Iterator[Replying]:
    with Replying() as running:
        yield running


@pytest.fixture
def place(tmp_path: Path, replying: Replying) -> Place:
    return Place(tmp_path, replying.serves)
