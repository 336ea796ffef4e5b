"""Several linear layers that read the same input as one product, without a second copy of their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from glmchat.engine.adapters.low_rank import bare, side_by_side
from glmchat.engine.quantize.linear import QuantLinear

Projection = Callable[[torch.Tensor], torch.Tensor]


def joined(parts: Sequence[nn.Module]) -> Projection:
    """x [n, in] -> the outputs of all `parts` side by side [n, sum of out].

    Packed layers of one kind become one product over one block of memory, of which they keep views; anything else is
    computed part by part. What adapters add to some of the parts is added to the whole.
    """
    bases = [bare(part) for part in parts]
    project = _project(bases)
    change = side_by_side(parts)
    if change is None:
        return project

    def changed(x: torch.Tensor) -> torch.Tensor:
        return change.add(project(x), x)

    return changed


def _project(parts: Sequence[nn.Module]) -> Projection:
    whole = _packed_together(parts)
    if whole is not None:
        return whole.forward

    def project(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in parts], -1)

    return project


def _packed_together(parts: Sequence[nn.Module]) -> QuantLinear | None:
    linears = [part for part in parts if type(part) is QuantLinear]
    if len(linears) != len(parts):
        return None
    return QuantLinear.joined(linears)
