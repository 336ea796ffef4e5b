"""Memory that loading no longer needs leaves the process, so that its peak is the result and not the way there.

A weight file is read through a private map, and a page that was read once counts as the process's own until the map
goes, which may be when the process ends. The page itself stays in the system's cache and comes back when it is touched.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

_EVERY = 64 * 2**20  # bytes read between two sweeps: looking through the maps takes a millisecond


def let_go(paths: Iterable[Path]) -> None:
    """Take the pages of every private map of these files out of this process. Does nothing outside Linux.

    Nothing may have been written to such a map: what was is lost.
    """
    advise = _madvise()
    if advise is None:
        return
    names = {str(path.resolve()) for path in paths}
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
            span, access, _, _, _, *name = line.split(maxsplit=5)
            if name and name[0] in names and access.endswith("p"):
                start, end = (int(part, 16) for part in span.split("-"))
                advise(start, end - start, mmap.MADV_DONTNEED)


class Sweep:
    """Lets go of the pages of `paths` each time enough was read from them."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = tuple(paths)
        self._read = 0

    def read(self, size: int) -> None:
        self._read += size
        if self._read >= _EVERY:
            self.now()

    def now(self) -> None:
        self._read = 0
        let_go(self._paths)


def trim() -> None:
    """Give what the C allocator keeps of freed memory back to the system, where it has a function for that (glibc)."""
    function = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if function is not None:
        function(0)


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
