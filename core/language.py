"""The interface in English and Simplified Chinese.

English sentences are the keys: `tr("{n} models", n=3)`. The Chinese ones stand in `zh.toml` beside this file, as
`"{n} models" = "{n} 个模型"`. A sentence without a translation is shown in English; a test finds those.
"""

from __future__ import annotations

import os
import tomllib
from contextvars import ContextVar
from functools import cache
from importlib.resources import files
from typing import Any

_chosen: str | None = None
_asked: ContextVar[str | None] = ContextVar("asked", default=None)


def choose(language: str | None) -> None:
    """Fix the language for this process ("en", "zh"); None goes back to the locale."""
    global _chosen
    _chosen = language


def answer_in(language: str | None) -> None:
    """What is said from here on in this context (one request to an engine that several programs share) is said in this
    language; None and what is no language of ours change nothing."""
    if language in ("en", "zh"):
        _asked.set(language)


def chosen() -> str | None:
    """What was fixed; None while the locale decides."""
    return _chosen


def language() -> str:
    """ "zh" or "en": `--lang`, then GLMCHAT_LANG, then the POSIX locale variables in their order."""
    if chosen := _asked.get() or _chosen:
        return chosen
    for name in ("GLMCHAT_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        if value := os.environ.get(name):
            return "zh" if value.lower().startswith("zh") else "en"
    return "en"


@cache
def _table() -> dict[str, str]:
    data = tomllib.loads((files("glmchat.core") / "zh.toml").read_text(encoding="utf-8"))
    return {key: value for key, value in data.items() if isinstance(value, str)}


def tr(sentence: str, **values: Any) -> str:
    """The sentence in the chosen language with `{name}` fields filled in."""
    if language() == "zh":
        sentence = _table().get(sentence, sentence)
    return sentence.format(**values) if values else sentence


def said_here(sentence: str | None) -> str | None:
    """A sentence of ours that a process in another language said, in the language of this one. What is no whole
    sentence of the table, as one with values in it, stays as it came."""
    if sentence is None or language() == "zh":
        return None if sentence is None else _table().get(sentence, sentence)
    return next((english for english, chinese in _table().items() if chinese == sentence), sentence)
