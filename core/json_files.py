"""Reading JSON files: bounded, regular files alone, and one object in each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glmchat.core.errors import Damaged
from glmchat.core.files import TooLarge, bound, read_file, unreadable
from glmchat.core.language import tr
from glmchat.core.text import one_line

# Bytes of a file's bound for each value that may be in it: 64 MB of an index hold those of two million tensors, 4 MB of
# a config.json 131,072.
_BYTES_EACH = 32
_DEEPEST = 64  # levels; who walks through them in Python has a thousand


def read_json(path: Path, most: int | None = None) -> dict[str, Any]:
    """The JSON object in `path`. Raises Damaged if it is anything else, no regular file, or over `most` bytes.

    most: None for what the file's name allows.
    """
    name = one_line(str(path))
    try:
        data = _parsed(read_file(path, most), most or bound(path))
    except TooLarge as error:
        raise Damaged(
            tr("{name} is larger than {most} MB", name=name, most=error.most >> 20),
            hint=tr("no genuine file of this kind is that large"),
            code="config.size",
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise Damaged(
            tr("{name} is not JSON: {reason}", name=name, reason=one_line(str(error), 80)),
            hint=tr("pull the model again"),
            code="config.damaged",
        ) from None
    if not isinstance(data, dict):
        raise Damaged(
            tr("{name} does not contain a JSON object", name=name),
            hint=tr("pull the model again"),
            code="config.damaged",
        )
    return data


def small_json(path: Path) -> dict[str, Any]:
    """As `read_json`; {} where that would raise."""
    try:
        data = _parsed(read_file(path), bound(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _parsed(data: bytes, most: int) -> Any:
    """most: bytes. Raises ValueError or RecursionError. An object in memory takes twenty times what "[]," takes in a
    file, and is read more than once by those who ask for a few of its fields."""
    if sum(data.count(sign) for sign in (b"[", b"{", b",")) > most // _BYTES_EACH:
        raise ValueError(f"more than {most // _BYTES_EACH} values")
    whole = json.loads(data)
    if is_deep(whole):
        raise ValueError(f"more than {_DEEPEST} levels")
    return whole


def is_deep(value: Any) -> bool:
    """Whether it is nested more deeply than those who walk through it in Python, or indent it, are to be asked."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)
