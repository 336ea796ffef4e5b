"""A history on a disk of its own, and a foreign server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from glmchat.chat.history.history import History

sys.path.insert(0, str(Path(__file__).parent))  # speakers.py, foreign_server.py
from foreign_server import Foreign, serving


@pytest.fixture
def history_path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "history.db"


@pytest.fixture
def history(history_path: Path) -> Iterator[History]:
    with History.open(history_path) as opened:
        yield opened


@pytest.fixture
def foreign() -> Iterator[Foreign]:
    with serving() as server:
        yield server
