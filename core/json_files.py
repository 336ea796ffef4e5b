"""Reading JSON files: bounded, regular files alone, and one object in each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from glmchat.core.errors import Damaged
from glmchat.core.files import TooLarge, read_file, unreadable
from glmchat.core.language import tr
from glmchat.core.text import one_line

_MOST_VALUES = 2**21  # in one file: an index of a million tensors has half as many


def read_json(path: Path, most: int | None = None) -> dict[str, Any]:
    """The JSON object in `path`. Raises Damaged if it is anything else, no regular file, or over `most` bytes.

    most: None for what the file's name allows.
    """
    name = one_line(str(path))
    try:
        data = _parsed(read_file(path, most))
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
        data = _parsed(read_file(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _parsed(data: bytes) -> Any:
    """Raises ValueError or RecursionError. An object in memory takes twenty times what "[]," takes in a file."""
    if sum(data.count(sign) for sign in (b"[", b"{", b",")) > _MOST_VALUES:
        raise ValueError(f"more than {_MOST_VALUES} values")
    return json.loads(data)
