"""Four-bit codes for a matrix: one scale and one zero point for each group of inputs, chosen to lose least.

weight = (code - point) * scale, code and point whole numbers in 0..15: what the compressed-tensors format stores and
every other reader understands. A matrix whose groups already lie on a four-bit grid with a zero that is no multiple of
the scale (GGUF's Q4_1) keeps that grid exactly: `offset` is then what the whole-number zero point leaves over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from glmchat.engine.weights import Int4

GROUP_SIZES = (128, 64, 32)
STEPS = 15
# Shares of a group's range that the search tries to cover. Cutting the ends off makes the steps between finer.
_SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68)
_CHUNK = 1 << 18  # weights worked on at a time: what is made of them fits the second-level cache


@dataclass(frozen=True, slots=True)
class Codes4:
    """A quantised matrix [out, in]: weight = (q - point) * scale + offset."""

    q: torch.Tensor  # uint8 [out, in], 0..15
    scale: torch.Tensor  # float32 [out, groups]; every value is exact in the dtype it was asked for
    point: torch.Tensor  # uint8 [out, groups], 0..15
    offset: torch.Tensor | None = None  # float32 [out, groups]

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.scale.shape[1]

    def stored(self) -> Int4:
        """As the engine takes it: weight = (q - 8) * scale + zero."""
        zero = (8.0 - self.point.float()) * self.scale
        return Int4(self.q, self.scale, zero if self.offset is None else zero + self.offset)


def group_size(inputs: int) -> int | None:
    """The largest of 128, 64 and 32 that divides `inputs`, or None."""
    return next((size for size in GROUP_SIZES if inputs % size == 0), None)


def quantise_int4(
    weight: torch.Tensor,
    group: int,
    *,
    fast: bool = False,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> Codes4:
    """Codes for weight [out, in] (any float dtype); `group` divides in.

    The scale of each group is searched for the smallest squared error, without calibration data; `fast` rounds to
    nearest over the full range instead. symmetric: every zero point is 8. Raises ValueError for NaN or infinity.
    """
    rows, columns = weight.shape
    q = torch.empty(rows, columns, dtype=torch.uint8)
    scale = torch.empty(rows, columns // group)
    point = torch.empty(rows, columns // group, dtype=torch.uint8)
    offset = torch.zeros(rows, columns // group)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        at = slice(start, start + step)
        values = weight[at].float().reshape(-1, columns // group, group)
        low, high = values.aminmax(dim=-1)
        if not bool(torch.isfinite(high - low).all()):
            raise ValueError("a weight is not a finite number")
        found = None if symmetric or fast else _on_grid(values, low, high, scale_dtype)
        if found is None:
            found = _search(values, low, high, fast, symmetric, scale_dtype)
        codes, scale[at], point[at], offset[at] = found
        q[at] = codes.view(-1, columns)
    return Codes4(q, scale, point, offset if bool(offset.any()) else None)


_Found = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # codes, scale, point, offset


def _on_grid(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, dtype: torch.dtype) -> _Found | None:
    """The codes of groups that lie on a grid of 16 steps from `low` to `high` already; None if any does not."""
    scale = ((high - low) / STEPS).to(dtype).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    steps = (values[:1] - low[:1, :, None]) / scale[:1, :, None]
    if not bool(((steps - steps.round()).abs() < 0.01).all()):  # nearly every matrix fails on its first row
        return None
    steps = (values - low[..., None]) / scale[..., None]
    codes = steps.round()
    if not bool(((steps - codes).abs() < 0.01).all()):
        return None
    point = (-low / scale).round().clamp_(0, STEPS)
    return codes.byte(), scale, point.byte(), low + point * scale


def _search(
    values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, fast: bool, symmetric: bool, dtype: torch.dtype
) -> _Found:
    """Try each share of the range, keep the best for each group, then fit the scale to the codes once."""
    low, high = low.clamp(max=0), high.clamp(min=0)  # zero is always a code: point lies in 0..15
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best_error: torch.Tensor | None = None
    for share in _SHARES[:1] if fast else _SHARES:
        wide = (high - low) * (share / STEPS)
        scale = _rounded(wide, dtype)
        point = torch.full_like(scale, 8) if symmetric else (-low * share / scale).round_().clamp_(0, STEPS)
        error = _error(values, scale, point)
        if best_error is None:
            best_error, best_scale, best_point = error, scale, point
        else:
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_point = torch.where(better, point, best_point)
    assert best_error is not None
    codes = _codes(values, best_scale, best_point)
    if not fast:
        centred = codes - best_point[..., None]
        fitted = (values * centred).sum(-1) / centred.square().sum(-1).clamp_(min=1)
        fitted = _rounded(torch.where(fitted > 0, fitted, best_scale), dtype)
        better = _error(values, fitted, best_point) < best_error
        best_scale = torch.where(better, fitted, best_scale)
        codes = _codes(values, best_scale, best_point)
    return codes.byte(), best_scale, best_point.byte(), torch.zeros_like(best_scale)


def _rounded(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A scale as it will be stored; a group of zeros gets 1."""
    stored = scale.to(dtype).float()
    return torch.where(stored > 0, stored, torch.ones_like(stored))


def _codes(values: torch.Tensor, scale: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    return (values / scale[..., None]).round_().add_(point[..., None]).clamp_(0, STEPS)


def _error(values: torch.Tensor, scale: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """Squared error of each group."""
    steps = values * (1 / scale)[..., None]
    nearest = steps.round()
    nearest.clamp_(-point[..., None], STEPS - point[..., None])
    distance: torch.Tensor = torch.linalg.vector_norm(nearest.sub_(steps), dim=-1)
    return distance.mul_(scale).square_()
