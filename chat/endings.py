"""Why an answer ended before the model ended it, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glmchat.core.language import tr


def cut_note(facts: Mapping[str, Any]) -> str:
    """For an answer whose finish reason is "length": what the engine said of the limit it met."""
    match facts.get("stopped_by"):
        case "loop":
            return tr("the answer went round in circles and was ended")
        case "context":
            return tr("the context is full")
        case _:
            return tr("the limit of tokens was reached")
