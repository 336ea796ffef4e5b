"""Eight-bit codes for a matrix: one scale for each row, symmetric, chosen to lose least."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glmchat.engine.weights import Int8

LIMIT = 127
# Shares of a row's largest weight that the search tries to cover; one outlier otherwise coarsens a whole row.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class Codes8:
    """A quantised matrix [out, in]: weight = q * scale."""

    q: torch.Tensor  # int8 [out, in], -127..127
    scale: torch.Tensor  # float32 [out, 1]; every value is exact in the dtype it was asked for

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.scale.shape[1]

    def stored(self) -> Int8:
        return Int8(self.q, self.scale)


def quantise_int8(weight: torch.Tensor, *, fast: bool = False, scale_dtype: torch.dtype = torch.float16) -> Codes8:
    """Codes for weight [out, in] (any float dtype), the scale of each row searched for the smallest squared error.

    fast: the largest weight of a row becomes 127. Raises ValueError for NaN or infinity.
    """
    rows, columns = weight.shape
    q = torch.empty(rows, columns, dtype=torch.int8)
    scale = torch.empty(rows, 1)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        at = slice(start, start + step)
        values = weight[at].float()
        largest = torch.linalg.vector_norm(values, ord=torch.inf, dim=1, keepdim=True)
        if not bool(torch.isfinite(largest).all()):
            raise ValueError("a weight is not a finite number")
        best: torch.Tensor | None = None
        for share in _SHARES[:1] if fast else _SHARES:
            candidate = (largest * (share / LIMIT)).to(scale_dtype).float()
            candidate = torch.where(candidate > 0, candidate, torch.ones_like(candidate))
            steps = values * (1 / candidate)
            error = steps.round().clamp_(-LIMIT, LIMIT).sub_(steps)
            squared = torch.linalg.vector_norm(error, dim=1, keepdim=True).mul_(candidate)
            if best is None:
                best, chosen = squared, candidate
            else:
                chosen = torch.where(squared < best, candidate, chosen)
                best = torch.minimum(squared, best)
        scale[at] = chosen
        q[at] = (values / chosen).round_().clamp_(-LIMIT, LIMIT).to(torch.int8)
    return Codes8(q, scale)
