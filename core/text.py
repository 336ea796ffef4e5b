"""Text from outside, made safe to show: control sequences are drawn, never obeyed."""

from __future__ import annotations

import unicodedata

from glmchat.core.language import tr

# Bidi embeddings, overrides and isolates reorder what stands around them ("Trojan source").
_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# U+200D joins emoji and U+200C is needed in Persian; other format characters stay, they draw nothing.
_KEEP = frozenset("\n\t")
_PICTURES = {c: chr(0x2400 + c) for c in range(0x20)} | {0x7F: "\u2421"}


def _shown(character: str) -> str:
    point = ord(character)
    if point in _PICTURES:
        return _PICTURES[point]
    return f"<U+{point:04X}>"


def show_controls(text: str, *, keep: frozenset[str] = _KEEP) -> str:
    """The same text with every control and bidi character replaced by a visible sign.

    Newline and tab stay unless `keep` says otherwise. Safe to write to a terminal.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        _shown(c)
        if c not in keep and (c in _BIDI or c in "\u2028\u2029" or unicodedata.category(c) in ("Cc", "Cs"))
        else c
        for c in text
    )


def one_line(text: str, limit: int = 200) -> str:
    """For names, titles and messages: controls shown, newlines too, cut with an ellipsis at `limit` characters."""
    shown = show_controls(text, keep=frozenset())
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def short_name(model: str) -> str:
    """A model's name where there is little room: a folder's own name instead of its path."""
    return one_line(model.rsplit("/", 1)[-1] if model.startswith("/") else model, 40)


def number_text(value: int | float) -> str:
    """As people write one: 1048576 -> "1,048,576", 1e-06 -> "1e-6", 0.950 -> "0.95"."""
    if isinstance(value, int) or value.is_integer():
        return f"{int(value):,}"
    mantissa, _, power = f"{value:g}".partition("e")
    return f"{mantissa}e{int(power)}" if power else mantissa


def human_bytes(count: int | float) -> str:
    """98362432 -> "98.4 MB" (powers of ten, as disks and hubs count)."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def duration(seconds: float) -> str:
    """ "45 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return tr("{seconds} s", seconds=round(seconds))
    minutes = round(seconds / 60)
    if minutes < 90:
        return tr("{minutes} min", minutes=minutes)
    return tr("{hours} h {minutes} min", hours=minutes // 60, minutes=minutes % 60)


def is_chinese(text: str) -> bool:
    """True if the text holds at least one Han character."""
    return any("\u4e00" <= c <= "\u9fff" or "\u3400" <= c <= "\u4dbf" for c in text)


def whole_text(text: str) -> str:
    """Half a surrogate pair (a terminal may hand one over) is no character and can be neither sent nor stored."""
    return text.encode("utf-8", "replace").decode()
