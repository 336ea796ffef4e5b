"""Rows of 8 bits as a cache stores them, and one row's attention over such, in C (step.h), where torch decodes."""

from __future__ import annotations

import ctypes

import torch

from glmchat.engine.native.cpu import NativeCpu, native_library

CACHE_TYPES = (torch.float32, torch.bfloat16, torch.int8)  # as glm_cache_type counts them
LARGEST_HEAD = 256
SCALE = 4  # bytes behind a row of whole numbers
WIDTH = 16  # lanes of the widest vectors: rows come in multiples of it


def to_int8(rows: torch.Tensor) -> torch.Tensor:
    """Rows [..., width] as whole numbers of -127 to 127, and behind them [..., width + 4] their scale as the bytes of a
    float32. The compiled step stores the same bits (native/step_part.h)."""
    wide = rows.float()
    scale = wide.abs().amax(-1, keepdim=True).div_(127)
    codes = (wide / scale.clamp_min(1e-30)).round_().to(torch.int8)
    return torch.cat((codes, scale.view(torch.int8)), -1)


def from_int8(rows: torch.Tensor) -> torch.Tensor:
    """What `to_int8` was given, in float32, as near as it kept it."""
    scale = rows[..., -SCALE:].contiguous().view(torch.float32)
    return rows[..., :-SCALE].float().mul_(scale)


class CacheState(ctypes.Structure):
    """glm_cache: one sequence's keys and values as they are now."""

    _fields_ = (
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("capacity", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("type", ctypes.c_int32),
    )


def attend_stored(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor | None:
    """What `layers.attend` says of one row, whose query [1, heads, head_dim] looks at all of keys and values.

    These are views [kv_heads, total, bytes of a row] of what a cache stores. None where C does not do it.
    """
    _, heads, head_dim = query.shape
    kv_heads, total, row = keys.shape
    fits = keys.stride() == values.stride() and keys.stride(2) == 1 and keys.stride(1) == row
    if not fits or keys.dtype not in CACHE_TYPES or head_dim % WIDTH or head_dim > LARGEST_HEAD or not keys.is_cpu:
        return None
    if NativeCpu().unavailable():
        return None
    library, pointers = native_library(), [(ctypes.c_void_p * 1)(rows.data_ptr()) for rows in (keys, values)]
    capacity = keys.stride(0) // row if kv_heads > 1 else total
    state = CacheState(*map(ctypes.addressof, pointers), capacity, total, CACHE_TYPES.index(keys.dtype))
    wide, out = query.float().contiguous(), torch.empty(1, heads * head_dim)
    room = torch.empty(library.glm_attend_room(heads, head_dim, total), dtype=torch.uint8)
    library.glm_attend(
        ctypes.addressof(state), wide.data_ptr(), out.data_ptr(), heads, kv_heads, head_dim, room.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out.to(query.dtype)
