"""Fields of a config.json that are switches: read strictly, and variants that were never released refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glmchat.core.errors import Damaged
from glmchat.core.text import one_line


def flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """true or false; anything else is refused, so that a list or a word never passes for true."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise Damaged(
            f"{name} is {one_line(repr(value), 60)} in the model's configuration",
            hint="true or false is expected: the file is damaged or no model",
            code="config.absurd",
        )
    return value


def require(config: Mapping[str, Any], name: str, value: bool) -> None:
    """Refuse a variant of the architecture in which `name` is not `value`, the only one that was released."""
    if flag(config, name, value) != value:
        raise Damaged(
            f"{name} is {config[name]!r} in the model's configuration: no released model is built like that",
            hint="glmchat does not compute this variant of the architecture",
            code="config.unsupported",
        )
