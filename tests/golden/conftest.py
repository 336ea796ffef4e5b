"""What must stay as it is, written down: `golden(name, value)` compares a value with tests/golden/<name>.

After a change that is meant, write the files anew and read the difference in git:

    GLMCHAT_WRITE_GOLDENS=1 pytest tests/golden
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
WRITING = os.environ.get("GLMCHAT_WRITE_GOLDENS") == "1"  # read before `own_home` clears the environment
Golden = Callable[[str, Any], None]


def as_text(value: Any) -> str:
    """A text as it is, anything else as JSON with its keys in order."""
    if isinstance(value, str):
        return value
    return json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


@pytest.fixture
def golden() -> Golden:
    """`golden("keys.json", value)`: the value is what the file says; with GLMCHAT_WRITE_GOLDENS=1 it is written."""

    def compare(name: str, value: Any) -> None:
        path = HERE / name
        if WRITING:
            path.write_text(as_text(value), encoding="utf-8")
        text = path.read_text(encoding="utf-8")
        if isinstance(value, str):
            assert value == text, name
        else:
            assert json.loads(as_text(value)) == json.loads(text), name

    return compare


@pytest.fixture
def writing() -> bool:
    """Whether the files are being written anew."""
    return WRITING
