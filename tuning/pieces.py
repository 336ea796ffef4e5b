"""Tensors of which each process holds a piece (torch's DTensor), and what takes a tensor of either kind."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def whole_of(value: torch.Tensor) -> torch.Tensor:
    """All of it. Where it lies in pieces, every process has to ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def own_of(value: torch.Tensor) -> torch.Tensor:
    """What this process holds of it, sharing its memory."""
    return value.to_local() if isinstance(value, DTensor) else value


def cut_as(like: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """A whole tensor, which every process has, on the device of `like` and in pieces where that is."""
    value = value.to(like.device)
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
