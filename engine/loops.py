"""Has an answer begun to say the same thing for ever?"""

from __future__ import annotations

from collections.abc import Sequence

# An exact repetition this long is no list, no table and no refrain. Asked for 500 zeros, a model may give fewer.
_LENGTH = 512
_LONGEST_PERIOD = 64
_EVERY = 32  # looked at this often


def goes_round(ids: Sequence[int]) -> bool:
    """True if the last 512 ids repeat a run of at most 64 of them exactly."""
    if len(ids) < _LENGTH or len(ids) % _EVERY:
        return False
    tail = list(ids[-_LENGTH:])
    return any(tail[period:] == tail[:-period] for period in range(1, _LONGEST_PERIOD + 1))
