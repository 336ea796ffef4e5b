"""Layers that add an adapter's low-rank product to what the base layer computes (Hu et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn


class LowRank:
    """y * gain + offset + (x @ down) @ up: all active adapters of one layer in two small products.

    down [in, rank], up [rank, out], both in float32 whatever the activations are. gain and offset [out], or None.
    """

    def __init__(
        self,
        down: torch.Tensor,
        up: torch.Tensor,
        gain: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
    ) -> None:
        self.down, self.up, self.gain, self.offset = down, up, gain, offset

    def add(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The base's output y [..., out] for the input x [..., in], changed; y itself may be overwritten."""
        if self.gain is not None:
            y = y * self.gain.to(y.dtype)
        if self.offset is not None:
            y = y + self.offset.to(y.dtype)
        if not self.down.shape[1]:
            return y
        if y.dim() == 2 and y.dtype == x.dtype == self.up.dtype:  # decoding counts operations: two, and no more
            return y.addmm_(torch.mm(x, self.down), self.up)
        return y + (x.to(self.down.dtype) @ self.down @ self.up).to(y.dtype)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.down, self.up, self.gain, self.offset) if t is not None)


class AdaptedLinear(nn.Module):
    """A linear layer, dense or packed, with its active adapters. `base` is the very module that it stands in for."""

    def __init__(self, base: nn.Module, change: LowRank) -> None:
        super().__init__()
        self.base = base
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.change.add(self.base(x), x)


class AdaptedEmbedding(nn.Module):
    """An embedding with its active adapters; a tied head goes on multiplying by `base`, as it does in PEFT."""

    def __init__(self, base: nn.Module, down: torch.Tensor, up: torch.Tensor, rows: nn.Module | None = None) -> None:
        """down [vocab, rank], up [rank, width] in float32. rows: trained rows in the place of the base's."""
        super().__init__()
        self.base = base
        self.rows = rows
        self.down, self.up = down, up

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = cast(torch.Tensor, (self.base if self.rows is None else self.rows)(ids))
        if not self.down.shape[1]:
            return found.to(self.dtype) if self.rows is not None else found
        return found + (self.down[ids] @ self.up).to(found.dtype)

    @property
    def dtype(self) -> torch.dtype:
        weight = getattr(self.base, "weight", None)
        return weight.dtype if isinstance(weight, torch.Tensor) else cast(torch.dtype, self.base.dtype)


def bare(module: nn.Module) -> nn.Module:
    """The base layer behind an adapted one, else the module itself."""
    return module.base if isinstance(module, AdaptedLinear | AdaptedEmbedding) else module


def side_by_side(parts: Sequence[nn.Module]) -> LowRank | None:
    """The changes of layers that read one input, as one change of their outputs side by side.

    None if none of them has one. `up` is then block-diagonal; with ranks of 8 to 64 its zeros cost less than further
    products would.
    """
    changes = [part.change if isinstance(part, AdaptedLinear) else None for part in parts]
    if not any(changes):
        return None
    widths = [_width(bare(part)) for part in parts]
    device = next(change.down.device for change in changes if change)
    down = torch.cat([change.down for change in changes if change], 1)
    up = torch.zeros(down.shape[1], sum(widths), device=device)
    gain = torch.ones(sum(widths), device=device)
    offset = torch.zeros(sum(widths), device=device)
    row = column = 0
    for change, width in zip(changes, widths, strict=True):
        if change is not None:
            rank = change.up.shape[0]
            up[row : row + rank, column : column + width] = change.up
            row += rank
            if change.gain is not None:
                gain[column : column + width] = change.gain
            if change.offset is not None:
                offset[column : column + width] = change.offset
        column += width
    gains = any(change and change.gain is not None for change in changes)
    offsets = any(change and change.offset is not None for change in changes)
    return LowRank(down, up, gain if gains else None, offset if offsets else None)


def _width(module: nn.Module) -> int:
    return int(cast(int, module.out_features))
