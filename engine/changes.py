"""Counts what is exchanged in loaded models: a layer swapped, weights held elsewhere, another type of activations.

What is derived from a whole model (the compiled step) remembers the count and is derived anew when it has moved.
"""

from __future__ import annotations

_count = 0


def note_change() -> None:
    """Say that some layer is no longer what it was."""
    global _count
    _count += 1


def changes() -> int:
    return _count
