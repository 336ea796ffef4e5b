"""Eight-bit codes for a matrix: one scale for each row, symmetric, chosen to lose least."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glmchat.engine.formats.weights import Int8
from glmchat.engine.native.cpu import SearchResult, search_native
from glmchat.engine.quantize.int4 import CARD_CHUNK

LIMIT = 127
# Shares of a row's largest weight that the search covers: from a little more down, while it does not get much worse.
# One outlier otherwise coarsens a whole row.
_FIRST, _STEP, _HOPELESS = 1.02, 0.005, 1.5
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class Codes8:
    """A quantised matrix [out, in]: weight = q * scale."""

    q: torch.Tensor  # int8 [out, in], -127..127
    scale: torch.Tensor  # float32 [out, 1]; every value is exact in float16

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.scale.shape[1]

    def stored(self) -> Int8:
        return Int8(self.q, self.scale)


def quantise_int8(weight: torch.Tensor, *, fast: bool = False) -> Codes8:
    """Codes for weight [out, in] (any float dtype), the scale of each row searched for the smallest squared error.

    fast: the largest weight of a row becomes 127. Raises ValueError for NaN or infinity.
    """
    q, scale, _, error = search(weight, fast=fast)
    if bool(error.isnan().any()):
        raise ValueError("a weight is not a finite number, or too large for a float16 scale")
    return Codes8(q, scale[:, None])


def search(rows: torch.Tensor, *, fast: bool = False) -> SearchResult:
    """rows [n, in] -> codes int8 [n, in]; scale, zeros, squared error [n]: value = code * scale.

    The error of a row with a value that is not finite is NaN.
    """
    native = rows.is_cpu and search_native(rows, 8, fast=fast)
    if native:
        return native
    step = max(1, (_CHUNK if rows.is_cpu else CARD_CHUNK) // rows.shape[1])
    made = [search_torch(rows[start : start + step].float(), fast=fast) for start in range(0, len(rows), step)]
    codes, scale, low, error = (torch.cat(tensors) for tensors in zip(*made, strict=True))
    return codes, scale, low, error


def search_torch(rows: torch.Tensor, *, fast: bool = False) -> SearchResult:
    """The same without the C kernel: rows float32; the steps are those of search.c."""
    largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=1)
    best, chosen = torch.full_like(largest, torch.inf), torch.ones_like(largest)
    share, open_rows = (1.0 if fast else _FIRST), largest > 0
    while share > 0.3 and bool(open_rows.any()):
        scale = (largest * (share / LIMIT)).half().float()
        open_rows &= scale > 0
        inverse = (1 / scale.where(open_rows, 1))[:, None]
        steps = rows * inverse
        error = torch.linalg.vector_norm(steps.round().clamp_(-LIMIT, LIMIT).sub_(steps), dim=1).mul_(scale).square_()
        better = open_rows & (error < best)
        best, chosen = error.where(better, best), scale.where(better, chosen)
        if fast:
            break
        if share < 1:
            open_rows &= error <= _HOPELESS * best
        share -= _STEP
    codes = (rows * (1 / chosen)[:, None]).round_().clamp_(-LIMIT, LIMIT).to(torch.int8)
    sound = torch.isfinite(rows.square().sum(1)) & (largest < LIMIT * 65504.0)
    error = best.where(best.isfinite(), 0).where(sound, torch.nan)
    return codes, chosen, torch.zeros_like(chosen), error
