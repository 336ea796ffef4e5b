"""Memory of caches on the CPU, whose pages several can hold together: a beginning that they share is there once.

A cache is private memory of the system. Of a beginning that another is to hold too, the pages are put into a file that
lies in memory and has no name; both map them privately from there, in the place where they stood. Who writes gets a
page of its own from the system, so nobody has to know: attention, files and cuts see one block as before. The file's
pages are gone with the last who maps them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from math import prod
from typing import Any

import torch

_PAGE = mmap.PAGESIZE
_IS_LINUX = sys.platform == "linux"
_FIXED, _NO_RESERVE = 0x10, 0x4000  # flags of Linux's mmap that Python does not name
LEAST_BYTES = 1 << 20  # of a beginning: less is copied as fast
MOST_RANGES = 1024  # mappings of one cache: a process has 65,530


def empty(shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.Tensor:
    """As torch.empty, of pages on the CPU. Raises MemoryError or torch's error where there are none."""
    size = prod(shape) * dtype.itemsize
    if not _IS_LINUX or size < _PAGE or torch.device(device).type != "cpu":
        return torch.empty(*shape, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    except OSError as error:
        raise MemoryError(str(error)) from None
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


class Book:
    """The pages of the first `end` positions of some cache, in a file that is never written again."""

    def __init__(self, end: int) -> None:
        self.end = end
        self.file = os.memfd_create("glmchat-kv", os.MFD_CLOEXEC)

    def __del__(self) -> None:
        with suppress(OSError, AttributeError):  # it was never opened
            os.close(self.file)


def share(mine: Any, other: Any, end: int) -> bool:
    """Let the cache `mine` hold the first `end` positions of the cache `other`, in the same pages where that saves
    memory; False where it must copy them."""
    tensors = [(*one.keys, *one.values) for one in (mine, other)]
    shapes = {(t.shape, t.dtype, t.data_ptr() % _PAGE, t.is_contiguous()) for both in tensors for t in both}
    if not _IS_LINUX or mine is other or len(shapes) != 1 or not tensors[0][0].is_cpu:
        return False
    shape, dtype, offset, _ = shapes.pop()
    ranges = list(_ranges(shape[0], shape[1] * shape[2] * dtype.itemsize, end * shape[2] * dtype.itemsize))
    inner = sum(last - first for _, first, last, _ in ranges)
    if offset or len(ranges) * len(tensors[0]) > MOST_RANGES or inner * len(tensors[0]) < LEAST_BYTES:
        return False
    size = -(-prod(shape) * dtype.itemsize // _PAGE) * _PAGE
    try:
        if other.book is None or other.shared < end:
            other.book, other.shared = _publish(tensors[1], ranges, size, end), end
    except OSError:  # no memory for a moment, or no more files
        return False
    for number, (to, given) in enumerate(zip(*tensors, strict=True)):
        for start, first, last, stop in ranges:
            if _map(other.book.file, to.data_ptr() + first, last - first, number * size + first):
                _move(to, given, start, first)
                _move(to, given, last, stop)
            else:
                _move(to, given, start, stop)
    mine.book, mine.shared = other.book, end
    return True


def _ranges(heads: int, stride: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """Of each head, in bytes: where its rows begin, its first whole page, the end of the last one, and of its rows."""
    for start in range(0, heads * stride, stride):
        first, last = -(-start // _PAGE) * _PAGE, (start + length) // _PAGE * _PAGE
        if last <= first:
            first = last = start
        yield start, first, last, start + length


def _publish(tensors: Sequence[torch.Tensor], ranges: Sequence[tuple[int, int, int, int]], size: int, end: int) -> Book:
    """Raises OSError; the cache then holds what it held."""
    book = Book(end)
    os.ftruncate(book.file, size * len(tensors))
    for number, tensor in enumerate(tensors):
        for _, first, last, _ in ranges:
            at = first
            while at < last:
                pages = (ctypes.c_char * (last - at)).from_address(tensor.data_ptr() + at)
                at += os.pwrite(book.file, pages, number * size + at)
    for number, tensor in enumerate(tensors):
        for _, first, last, _ in ranges:
            _map(book.file, tensor.data_ptr() + first, last - first, number * size + first)
    return book


def _move(to: torch.Tensor, given: torch.Tensor, start: int, stop: int) -> None:
    ctypes.memmove(to.data_ptr() + start, given.data_ptr() + start, stop - start)


@cache
def _system() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
    return library


def _map(file: int, address: int, length: int, offset: int) -> bool:
    """Put pages of a file in the place of those at `address`, for this cache alone once it writes."""
    if not length:
        return False
    flags = mmap.MAP_PRIVATE | _FIXED | _NO_RESERVE
    found = _system().mmap(address, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, offset)
    return bool(found == address)
