"""What is typed while the window's code is still being loaded waits for it: it is not shown twice and not lost.

This is imported before everything else, so it imports next to nothing.
"""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Sequence
from typing import Any

_ELSEWHERE = ("-h", "--help", "-p", "--prompt", "--plain", "--json", "--messages", "--complete", "--version")
_before: list[Any] | None = None  # what the terminal was set to


def may_open_window(arguments: Sequence[str]) -> bool:
    """As far as it can be told at once. A mistake costs nothing: `release` or `hold` follow when it is known."""
    words = list(arguments)
    if "--lang" in words:
        at = words.index("--lang")
        del words[at : at + 2]
    names = [word for word in words if not word.startswith("-")]
    is_chat = names[0] in ("run", "chat") if names else True
    return is_chat and not any(word.partition("=")[0] in _ELSEWHERE for word in words) and len(names) < 3


def hold() -> list[Any] | None:
    """Show nothing of what is typed and leave it as it was typed, until `release`.

    What the terminal was set to before; None without one.
    """
    global _before
    if _before is not None:
        return _before
    try:
        if not os.isatty(1):
            return None
        before = termios.tcgetattr(sys.stdin.fileno())
        quiet = [*before]
        quiet[0] &= ~termios.ICRNL  # else Enter would come as Ctrl+J
        quiet[3] &= ~(termios.ECHO | termios.ICANON)
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, quiet)
    except (OSError, ValueError, AttributeError, termios.error):  # no terminal
        return None
    _before = before
    return before


def release() -> None:
    """Give the terminal back as it was."""
    global _before
    before, _before = _before, None
    if before is not None:
        try:
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, before)
        except (OSError, ValueError, AttributeError, termios.error):  # it may be gone
            return
