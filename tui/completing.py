"""What may be typed next in the prompt: commands, and behind some commands the names they take."""

from __future__ import annotations

from dataclasses import dataclass

from glmchat.chat.commands import table as commands
from glmchat.core.errors import GlmchatError
from glmchat.core.text import one_line

_MOST = 40


@dataclass(frozen=True, slots=True)
class Suggestion:
    """text: what the prompt becomes; shown, argument and summary: how it is listed."""

    text: str
    shown: str
    argument: str = ""
    summary: str = ""


def suggestions(text: str) -> list[Suggestion]:
    """For a prompt that holds `text`; empty where nothing is to be completed."""
    found = [
        Suggestion(f"/{c.name} " if c.argument else f"/{c.name}", f"/{c.name}", c.argument, commands.summary(c))
        for c in commands.completions(text)
    ]
    return found or _names(text)


def _names(text: str) -> list[Suggestion]:
    """Names for the last word of `/model`, `/adapter` and `/compare`."""
    if not text.startswith("/") or text.startswith("//") or "\n" in text or " " not in text:
        return []
    command = commands.BY_NAME.get(text[1:].split(" ", 1)[0].lower())
    if command is None or command.name not in ("model", "adapter", "compare"):
        return []
    from glmchat.chat.compare import columns

    before, _, word = text.rpartition(" ")
    try:
        if command.name == "adapter":
            words = [name[1:] for name in columns.completions(f"+{word}")]
        else:
            words = columns.completions(word)
    except GlmchatError:  # a catalogue that cannot be read: the command itself says so
        return []
    return [Suggestion(f"{before} {name}", one_line(name, 60)) for name in words[:_MOST] if name != word]
