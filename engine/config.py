"""Reading config.json: either spelling of a field, and no value that would take memory it has no right to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glmchat.core.errors import Damaged
from glmchat.core.text import one_line

_LARGEST_CONFIG = 16 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises Damaged if it is anything else, or a git-lfs pointer, or over 16 MB."""
    name = one_line(str(path))
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise Damaged(f"{name} is larger than 16 MB", hint="no honest file of this kind is", code="config.size")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Damaged(
            f"cannot read {name}: {error.strerror}", hint="pull the model again", code="config.unreadable"
        ) from None
    except (ValueError, RecursionError) as error:
        raise Damaged(
            f"{name} is not JSON: {one_line(str(error), 80)}", hint="pull the model again", code="config.damaged"
        ) from None
    if not isinstance(data, dict):
        raise Damaged(f"{name} holds no JSON object", hint="pull the model again", code="config.damaged")
    return data


def integer(config: Mapping[str, Any], *names: str, low: int = 1, high: int = 2**24, default: int | None = None) -> int:
    """The first of `names` that the config holds, checked against its range.

    Raises Damaged, which names the field, if it is absent without a default, no integer, or out of range.
    """
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise Damaged(
                f"{name} is {one_line(repr(value), 60)} in the model's configuration",
                hint=f"a whole number between {low} and {high} is expected: the file is damaged or no model",
                code="config.absurd",
            )
        return value
    if default is not None:
        return default
    raise Damaged(
        f"the model's configuration names no {names[0]}",
        hint="the folder holds another kind of model, or config.json is incomplete",
        code="config.missing",
    )


def number(
    config: Mapping[str, Any], *names: str, low: float = 0.0, high: float = 1e12, default: float | None = None
) -> float:
    """Like `integer`, for real numbers; NaN is out of every range."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise Damaged(
                f"{name} is {one_line(repr(value), 60)} in the model's configuration",
                hint=f"a number between {low:g} and {high:g} is expected",
                code="config.absurd",
            )
        return float(value)
    if default is not None:
        return default
    raise Damaged(
        f"the model's configuration names no {names[0]}", hint="config.json is incomplete", code="config.missing"
    )


def token_ids(value: Any, vocab_size: int) -> tuple[int, ...]:
    """`eos_token_id` as it is written (absent, one id, a list) as ids that the vocabulary holds."""
    values = value if isinstance(value, list) else [value]
    return tuple(
        dict.fromkeys(v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < vocab_size)
    )
