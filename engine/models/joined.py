"""Several linear layers that read the same input as one product, without a second copy of their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from glmchat.engine.quantize.linear import QuantLinear

Projection = Callable[[torch.Tensor], torch.Tensor]


def joined(parts: Sequence[nn.Module]) -> Projection:
    """x [n, in] -> the outputs of all `parts` side by side [n, sum of out].

    Packed layers of one kind become one product over one block of memory, of which they keep views. Anything else
    (dense weights, an adapter on one of them) is computed part by part.
    """
    whole = _packed_together(parts)
    if whole is not None:
        return whole.forward

    def project(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in parts], -1)

    return project


# Joining saves some ten microseconds a call and copies the weights once. Above this many weights a product takes
# milliseconds, and packed weights may be a memory map that several processes share.
_LARGEST = 2**24


def _packed_together(parts: Sequence[nn.Module]) -> QuantLinear | None:
    linears = [part for part in parts if type(part) is QuantLinear]
    if len(linears) != len(parts) or sum(p.in_features * p.out_features for p in linears) > _LARGEST:
        return None
    return QuantLinear.joined(linears)
