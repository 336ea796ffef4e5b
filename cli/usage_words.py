"""What Typer says of a wrong command line, in the chosen language."""

from __future__ import annotations

import re
from functools import cache

from glmchat.core.language import tr

# As Typer words them; each is a key of core/zh.toml. What is not here (a newer Typer's sentence) stays as it is.
SENTENCES = (
    "No such command {name}. Did you mean {names}?",
    "No such command {name}.",
    "No such option: {name} (Possible options: {names})",
    "No such option: {name}",
    "Missing argument {name}.",
    "Missing option {name}.",
    "Missing command.",
    "Option {name} does not take a value.",
    "Option {name} requires an argument.",
    "Got unexpected extra argument(s) ({names})",
    "Invalid value for {name}: {reason}",
    "Input should be a valid integer, unable to parse string as an integer",
    "Input should be a valid number, unable to parse string as a number",
)


def usage_words(said: str) -> str:
    """The same sentence in the chosen language; `said` itself where there is none."""
    for sentence in SENTENCES:
        if found := _pattern(sentence).fullmatch(said):
            values = found.groupdict()
            if "reason" in values:
                values["reason"] = usage_words(values["reason"])
            return tr(sentence, **values)
    return said


@cache
def _pattern(sentence: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+?)", re.escape(sentence)), re.DOTALL)
