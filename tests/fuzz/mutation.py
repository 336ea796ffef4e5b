"""Inputs made from good ones: flipped bits, spliced parts, lengths that lie, JSON with other values in it.

Each input is a pure function of (target, seed, number), so that what was found is made again by its number. hypothesis
has no mutation of whole files; what it would add, shrinking, costs runs of readers that may hang.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from random import Random
from typing import Any

_NUMBERS = (0, 1, -1, 2, 7, 127, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64)
_FLOATS = (0.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"))
_TEXTS = (
    "", "x", "../../x", "/etc/hostname", "a/b", "\0", "\x1b]0;owned\x07", "\u202e", "\ud800", "\U0001f600", "null",
    "1e999", "9" * 5000, "A" * 70_000, "https://x:[", "con", "%00", "..", "{{ 1 }}",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    *_NUMBERS, *_FLOATS, *_TEXTS, None, True, False, [], {}, [[]], [0, 1], {"a": 1}, [None], 10**400, [{}],
)  # fmt: skip
_BYTES = (b"\0", b"\xff", b"\x80", b"\n", b"\r\n", b"{", b"[", b'"', b"\xed\xa0\x80", b"\xef\xbb\xbf", b"PK\x03\x04")
_LINE = re.compile(rb"(?m)^[^{\n]{0,200}\{")
_LONGEST = 4 * 2**20  # characters of JSON that are changed, or that a change makes: what is made here counts as growth
_DEEP = 2000  # brackets; Python's own reader gives up at about 1000


def mutate(random: Random, seeds: Sequence[bytes], tokens: Sequence[bytes] = ()) -> bytes:
    """One input from one of `seeds`. tokens: words of the format, to be put in."""
    data = random.choice(seeds)
    for _ in range(1 + int(random.expovariate(0.7))):
        changed = _other_json(random, data) if random.random() < 0.7 else None
        data = changed if changed is not None else _other_bytes(random, data, seeds, tokens)
    return data


def _other_json(random: Random, data: bytes) -> bytes | None:
    """The same input with another value somewhere in its first, or one of its, JSON objects; None where it has none."""
    starts = [match.end() - 1 for match in _LINE.finditer(data[:200_000])]
    if not starts:
        return None
    start = random.choice(starts)
    if len(data) > _LONGEST:
        return None
    text = data[start:].decode("utf-8", "surrogateescape")
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    _change(random, value)
    try:
        written = json.dumps(value, ensure_ascii=random.random() < 0.9).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, UnicodeError):
        return None
    return data[:start] + written + text[end:].encode("utf-8", "surrogateescape")


def _change(random: Random, root: Any) -> None:
    """One change in place: a value exchanged, doubled, moved, taken out, renamed, or nested far too deep."""
    places = list(_places(root))
    if not places:
        return
    holder, key = random.choice(places)
    draw = random.random()
    if draw < 0.55:
        holder[key] = random.choice(_VALUES)
    elif draw < 0.7:
        other, name = random.choice(places)
        holder[key] = json.loads(json.dumps(other[name]))  # a copy: a value may not come to hold itself
    elif draw < 0.8:
        del holder[key]
    elif draw < 0.9 and isinstance(holder, dict):
        holder[random.choice(_TEXTS[:19])] = holder.pop(key)
    elif draw < 0.93:
        deep: Any = holder[key]
        for _ in range(random.choice((10, 200, 900))):
            deep = [deep] if random.random() < 0.5 else {"a": deep}
        holder[key] = deep
    elif isinstance(holder, list):
        holder *= _often(random.choice((2, 100)), holder)
    else:
        holder[key] = [holder[key]] * _often(random.choice((2, 1000)), holder[key])


def _often(times: int, value: Any) -> int:
    return times if times * len(json.dumps(value)) < _LONGEST else 1


def _places(root: Any) -> list[tuple[Any, Any]]:
    """(holder, key) of every value in it, the first 20,000 of them."""
    found: list[tuple[Any, Any]] = []
    waiting = [root]
    while waiting and len(found) < 20_000:
        one = waiting.pop()
        keys: Any = one if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in keys:
            found.append((one, key))
            waiting.append(one[key])
    return found


def _other_bytes(random: Random, data: bytes, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    if not data:
        return random.choice(_BYTES)
    # Headers are where lies lie: half of all changes fall into the first kilobyte.
    at = random.randrange(min(len(data), 1024) if random.random() < 0.5 else len(data))
    match random.randrange(9):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at] + random.randbytes(random.choice((1, 2, 4, 16))) + data[at + random.choice((0, 1, 4)) :]
        case 2:
            width = random.choice((1, 2, 4, 8))
            number = random.choice(_NUMBERS) % (1 << 8 * width)
            return data[:at] + number.to_bytes(width, random.choice(("little", "big"))) + data[at + width :]
        case 3:
            return data[:at]
        case 4:
            end = min(len(data), at + random.choice((1, 8, 100, 10_000)))
            return data[:at] + data[end:]
        case 5:
            end = min(len(data), at + random.choice((1, 8, 100, 10_000)))
            return data[:at] + data[at:end] * random.choice((2, 3, 50)) + data[end:]
        case 6:
            other = random.choice(seeds) or b"\0"
            cut = random.randrange(len(other))
            return data[:at] + other[cut:]
        case 7:
            word = random.choice((*tokens, *_BYTES))
            return data[:at] + word + data[at + random.choice((0, len(word))) :]
        case _:
            return data[:at] + random.choice((b"[", b"{", b'{"a":', b"(", b"<")) * _DEEP + data[at:]
