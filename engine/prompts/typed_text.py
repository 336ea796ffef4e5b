"""Text that knows, character by character, whose words it is: the template's, a person's, or the model's own.

Chat templates cut, trim, search and join what they are given. Each of these operations here does to a text what `str`
does, and carries the owners along, so that a template finds in a message whatever it looks for, and a control token
that a person typed is still known as typed when it stands among the template's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

TEMPLATE, TYPED, MODEL = "t", "p", "m"  # one letter for each character
_OTHERS = re.compile(f"{TYPED}+|{MODEL}+")


class OwnedText(str):
    """`owners` has one letter for each character. What no method below makes is plain `str`: the template's own."""

    owners: str

    def __new__(cls, text: str, owners: str | None = None) -> OwnedText:
        """owners None: nobody knows, so a person."""
        owned_text = super().__new__(cls, text)
        owned_text.owners = TYPED * len(text) if owners is None else owners
        return owned_text

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> OwnedText:
        return OwnedText(str.__add__(self, other), self.owners + owners_of(other))

    def __radd__(self, other: str) -> OwnedText:
        return OwnedText(str.__add__(other, self), owners_of(other) + self.owners)

    def __mul__(self, count: SupportsIndex) -> OwnedText:
        return OwnedText(str.__mul__(self, count), self.owners * count)

    __rmul__ = __mul__

    def __getitem__(self, key: SupportsIndex | slice) -> OwnedText:
        return OwnedText(str.__getitem__(self, key), self.owners[key])

    def __iter__(self) -> Iterator[OwnedText]:
        return (OwnedText(*pair) for pair in zip(str.__iter__(self), self.owners, strict=True))

    def strip(self, chars: str | None = None) -> OwnedText:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> OwnedText:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None) -> OwnedText:
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str) -> OwnedText:
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str) -> OwnedText:
        return self[: len(str.removesuffix(self, suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.split(self, sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.rsplit(self, sep, maxsplit)[::-1], len(sep or ""), backwards=True)[::-1]

    def splitlines(self, keepends: bool = False) -> list[str]:
        return self._located(str.splitlines(self, keepends))

    def partition(self, sep: str) -> tuple[str, str, str]:
        head, found, tail = str.partition(self, sep)
        return self[: len(head)], self[len(head) : len(head) + len(found)], self[len(self) - len(tail) :]

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        head, found, tail = str.rpartition(self, sep)
        return self[: len(head)], self[len(head) : len(head) + len(found)], self[len(self) - len(tail) :]

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        if not old:  # between all characters, which no template means
            return OwnedText(text := str.replace(self, old, new, count), TYPED * len(text))
        return joined(new, self.split(old, count))

    def join(self, parts: Iterable[str]) -> str:
        return joined(self, list(parts))

    def _located(self, parts: list[str], between: int = 0, *, backwards: bool = False) -> list[str]:
        """The pieces of a split, found again in their order, so that each has its owners.

        between: the least number of characters from one to the next.
        """
        found: list[str] = []
        at = len(self) if backwards else 0
        for part in parts:
            begin = str.rfind(self, part, 0, at) if backwards else str.find(self, part, at)
            found.append(self[begin : begin + len(part)])
            at = begin - between if backwards else begin + len(part) + between
        return found


def owners_of(text: str) -> str:
    return text.owners if isinstance(text, OwnedText) else TEMPLATE * len(text)


def joined(between: str, parts: list[str]) -> str:
    """`str.join`, with the owners of all of them."""
    text = str.join(between, parts)
    if not any(isinstance(part, OwnedText) for part in (between, *parts)):
        return text
    return OwnedText(text, owners_of(between).join(map(owners_of, parts)))


def concatenated(parts: Iterable[Any]) -> str:
    """What Jinja joins output by."""
    return joined("", [written(part) for part in parts])


def written(value: Any) -> str:
    """What Jinja prints of a value: of a list or an object its form in Python, which belongs to who is in it."""
    text = value if isinstance(value, str) else inherited(str(value), value)
    assert isinstance(text, str)
    return text


def owned(value: Any, owner: str) -> Any:
    """A JSON value whose texts all belong to `owner`; the names of its fields too."""
    if isinstance(value, str):
        return OwnedText(value, owner * len(value))
    if isinstance(value, Mapping):
        return {owned(key, owner): owned(item, owner) for key, item in value.items()}
    return [owned(item, owner) for item in value] if isinstance(value, list | tuple) else value


def inherited(result: Any, *sources: Any) -> Any:
    """`result` of an operation that carries no owners along: a person's as a whole if any of `sources` was."""
    plain = _is_plain(result) or (isinstance(result, list | tuple) and any(map(_is_plain, result)))
    owners = set().union(*map(_owners_in, sources)) if plain else set()
    owner = next((owner for owner in (TYPED, MODEL) if owner in owners), TEMPLATE)
    if owner == TEMPLATE:
        return result
    if isinstance(result, str):
        return owned(result, owner)
    return [owned(item, owner) if _is_plain(item) else item for item in result]


def _is_plain(value: Any) -> bool:
    """A text without owners: `str`, or what Jinja makes of one to mark it as escaped."""
    return isinstance(value, str) and not isinstance(value, OwnedText)


def _owners_in(value: Any) -> set[str]:
    if isinstance(value, OwnedText):
        return set(value.owners)
    parts = [*value, *value.values()] if isinstance(value, Mapping) else value
    return set().union(*map(_owners_in, parts)) if isinstance(parts, list | tuple) else set()


def spans(text: str) -> list[tuple[int, int, str]]:
    """Where the text is not the template's own: (begin, end, owner)."""
    return [(m.start(), m.end(), m[0][0]) for m in _OTHERS.finditer(owners_of(text))]


def from_spans(text: str, where: Iterable[tuple[int, int, str]]) -> OwnedText:
    """The text again, as `spans` told of it."""
    parts: list[str] = []
    end = 0
    for begin, stop, owner in where:
        parts += [TEMPLATE * (begin - end), owner * (stop - begin)]
        end = stop
    return OwnedText(text, "".join(parts) + TEMPLATE * (len(text) - end))
