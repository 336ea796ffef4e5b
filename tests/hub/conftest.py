"""The loopback hub for every test of this room."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # loopback_hub.py is a program as well as a module

from loopback_hub import LoopbackHub


@pytest.fixture
def loopback_hub() -> Iterator[LoopbackHub]:
    """A running hub with nothing in it; see loopback_hub.py."""
    with LoopbackHub() as hub:
        yield hub
