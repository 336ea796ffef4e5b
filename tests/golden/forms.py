"""The form of a JSON value: its keys and types, without its numbers and texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_NAMES = {bool: "boolean", int: "integer", float: "number", str: "text", type(None): "null"}


def form(value: Any) -> Any:
    """Objects by key, a list as the one form of all its items, everything else as the name of its type."""
    if isinstance(value, dict):
        return {key: form(item) for key, item in value.items()}
    if isinstance(value, list):
        return [merged(form(item) for item in value)] if value else []
    return _NAMES[type(value)]


def merged(forms: Iterable[Any]) -> Any:
    """One form for several: "text|null" where they differ; a key that only some have ends in "?"."""
    different: list[Any] = []
    for one in forms:
        if one not in different:
            different.append(one)
    if len(different) == 1:
        return different[0]
    if all(isinstance(one, dict) for one in different):
        keys = dict.fromkeys(key.removesuffix("?") for one in different for key in one)
        found = {}
        for key in keys:
            having = [one.get(key, one.get(f"{key}?")) for one in different if key in one or f"{key}?" in one]
            always = len(having) == len(different) and not any(f"{key}?" in one for one in different)
            found[key if always else f"{key}?"] = merged(having)
        return found
    if all(isinstance(one, list) for one in different):
        return [merged(item for one in different for item in one)]
    return "|".join(sorted({one if isinstance(one, str) else type(one).__name__ for one in different}))


def forms_by_event(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """JSON lines: the one form of each kind of event."""
    events: dict[str, list[Any]] = {}
    for line in lines:
        events.setdefault(line["event"], []).append(form(line))
    return {event: merged(found) for event, found in events.items()}
