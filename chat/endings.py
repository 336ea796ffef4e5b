"""What is said beside an answer: why it ended before the model ended it, and where its system prompt went."""

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
            return tr("the limit of tokens was reached; --max-tokens or /set max_tokens raises it")


def system_note(facts: Mapping[str, Any]) -> str:
    """For the first answer of a family that knows no system prompt; "" for all others."""
    if facts.get("system_prepended") is not True:
        return ""
    return tr("this model knows no system prompt: it was put before the first question")
