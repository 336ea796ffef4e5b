"""Reading JSON files: bounded, regular files alone, and one object in each."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from glmchat.core.errors import Damaged
from glmchat.core.language import tr
from glmchat.core.text import one_line

LARGEST = 16 * 2**20  # bytes


def read_json(path: Path, most: int = LARGEST) -> dict[str, Any]:
    """The JSON object in `path`. Raises Damaged if it is anything else, no regular file, or over `most` bytes."""
    name = one_line(str(path))
    try:
        data = _load(path, most)
    except OSError as error:
        raise Damaged(
            tr("cannot read {name}: {reason}", name=name, reason=error.strerror or "?"),
            hint=tr("pull the model again"),
            code="config.unreadable",
        ) from None
    except OverflowError:
        raise Damaged(
            tr("{name} is larger than {most} MB", name=name, most=most >> 20),
            hint=tr("no genuine file of this kind is that large"),
            code="config.size",
        ) from None
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
        data = _load(path, LARGEST)
    except (OSError, ValueError, RecursionError, OverflowError):
        return {}
    return data if isinstance(data, dict) else {}


def _load(path: Path, most: int) -> Any:
    """Raises OSError, OverflowError for a file that is too large, ValueError or RecursionError for no JSON."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):  # a pipe would be waited for
        raise OSError(0, "no regular file")
    if state.st_size > most:
        raise OverflowError
    return json.loads(path.read_text(encoding="utf-8"))
