"""Command lines that a person copies into a shell."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from glmchat.core.text import show_controls

# shlex.quote's own, without its re.ASCII: letters and digits of any script mean nothing to a shell.
_PLAIN = re.compile(r"[\w@%+=:,./-]+")


def shell_word(text: str) -> str:
    """`text` as one word: 小星 as it stands, 'two words' quoted, and $'\\x1b' for what would not survive a screen."""
    if _PLAIN.fullmatch(text):
        return text
    if show_controls(text, keep=frozenset()) == text:
        return "'" + text.replace("'", "'\"'\"'") + "'"
    plain = b"'\\"
    return "$'" + "".join(
        chr(byte) if 0x20 <= byte < 0x7F and byte not in plain else f"\\x{byte:02x}" for byte in os.fsencode(text)
    ) + "'"  # fmt: skip


def shell_line(words: Iterable[str]) -> str:
    """The words as a line that a shell takes apart into just these."""
    return " ".join(map(shell_word, words))
