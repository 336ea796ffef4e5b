"""What is shown of an answer, where a family's own program cleaned it up. The history keeps what the model said.

ChatGLM's tokenizer makes all punctuation half-width, and its training text held a placeholder for a date; the original
`process_response` puts both right (reference: ChatGLM-6B's modeling code, `process_response`).
"""

from __future__ import annotations

import re

_DATE = ("[[训练时间]]", "2023年")
_FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_PAIRS = tuple(
    (re.compile(rf"([\u4e00-\u9fff]){re.escape(half)}"), re.compile(rf"{re.escape(half)}([\u4e00-\u9fff])"), full)
    for half, full in _FULL_WIDTH.items()
)
_STRIPPED = frozenset({"chatglm", "chatglm2", "chatglm3"})


def shown(text: str, family: str | None) -> str:
    """An answer as a person reads it."""
    if family not in _STRIPPED:
        return text
    text = text.strip().replace(*_DATE)
    if family == "chatglm":
        for after, before, full in _PAIRS:
            text = before.sub(rf"{full}\1", after.sub(rf"\1{full}", text))
    return text


class StreamCleaner:
    """The same, piece by piece: what `feed` and `end` return joins to `shown` of the whole."""

    def __init__(self, family: str | None) -> None:
        self._family = family
        self._held = ""
        self._begun = False

    def feed(self, piece: str) -> str:
        if self._family not in _STRIPPED:
            return piece
        self._held += piece
        if not self._begun:
            self._held = self._held.lstrip()
        # Nothing that is put right spans two characters that are neither punctuation nor space; and a placeholder
        # that has begun is waited for.
        cut = len(self._held) - 1
        if (opened := self._held.rfind("[", max(0, cut - len(_DATE[0]) + 1))) >= 0:
            opened -= self._held[opened - 1 : opened] == "["
            cut = min(cut, opened)
        while cut > 0 and not (_plain(self._held[cut - 1]) and _plain(self._held[cut])):
            cut -= 1
        return self._release(max(cut, 0))

    def end(self) -> str:
        self._held = self._held.rstrip()
        return self._release(len(self._held))

    def _release(self, cut: int) -> str:
        ready, self._held = self._held[:cut], self._held[cut:]
        if not ready:
            return ""
        self._begun = True
        # `shown` strips; in the middle of an answer there is nothing to strip, and the cut is never beside a space.
        return shown(ready, self._family)


def _plain(character: str) -> bool:
    return character not in _FULL_WIDTH and not character.isspace() and character != "["
