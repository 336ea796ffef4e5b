"""What the C library keeps of freed memory."""

from __future__ import annotations

_M_MMAP_THRESHOLD = -3  # malloc.h
_BIG = 256 * 1024


def return_big_blocks() -> None:
    """Freed blocks above 256 kB go back to the system at once. Does nothing where the C library is not glibc.

    glibc begins so, but each big block that is freed raises its limit, up to 32 MB. A long answer is a string that is
    replaced by a longer one many times a second: below the limit, each leaves a hole in a heap that only grows.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _BIG)
