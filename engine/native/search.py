"""The search for the scales of a quantised matrix in C (search.c), many groups at a time."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import torch

from glmchat.engine.native.cpu import NativeCpu, native_library

_PART = 1 << 18  # weights that a thread searches at a time


class _Search(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        ("error", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("kind", ctypes.c_int),
        ("lanes", ctypes.c_int),
        ("integer_zero", ctypes.c_int),
        ("symmetric", ctypes.c_int),
        ("fast", ctypes.c_int),
    )


_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# codes [n, group]; scale, low and squared error [n]
SearchResult = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def search_native(
    values: torch.Tensor,
    bits: int,
    *,
    integer_zero: bool = True,
    symmetric: bool = True,
    fast: bool = False,
    lanes: int = 0,
) -> SearchResult | None:
    """int4.search or int8.search in C (search.c): a SearchResult, or None where it is not built.

    lanes: numbers in a vector register at most, for tests; 0 takes what the CPU has.
    """
    if values.dtype not in _KINDS or not values.numel() or NativeCpu().unavailable() is not None:
        return None
    values = values.contiguous()
    count, group = values.shape
    scale, low, error = (torch.zeros(count) for _ in range(3))
    codes = torch.empty(values.shape, dtype=torch.uint8 if bits == 4 else torch.int8)
    run = native_library().glm_search4 if bits == 4 else native_library().glm_search8

    def part(start: int) -> int:
        tensors = (tensor[start:] for tensor in (values, scale, low, error, codes))
        call = _Search(
            *(tensor.data_ptr() for tensor in tensors), min(step, count - start), group,
            _KINDS[values.dtype], lanes, integer_zero, symmetric, fast,
        )  # fmt: skip
        return int(run(ctypes.byref(call)))

    step = -(-max(16, _PART // group) // 16) * 16
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # ctypes lets go of the interpreter
        refused = any(list(pool.map(part, range(0, count, step))))
    return None if refused else (codes, scale, low, error)
