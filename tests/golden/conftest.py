"""The golden files of this folder; golden_files.py says how they are written anew."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `from golden_files import Golden`

from golden_files import Golden


@pytest.fixture
def golden() -> Golden:
    return Golden()
