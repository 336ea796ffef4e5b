"""Four-bit codes for a matrix: one scale and one zero point for each group of inputs, chosen to lose least.

weight = (code - zero point) * scale, code and zero point integers in 0..15: what the compressed-tensors format stores
and every other reader understands. Where no other program reads the folder anyway, a float zero, which is no multiple
of the scale, loses less: `offset` is what the integer leaves.

Errors are weighted by the weights' own size (|w| + rms of the group), as large weights move the output more. With plain
squared errors the search clips too much: measured on SmolLM2, its perplexity is then worse than rounding to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from glmchat.engine.formats.weights import Int4
from glmchat.engine.native.cpu import SearchResult, search_native

STEPS = 15
# What the search cuts off a group's range at its low and high end, as shares of it; cutting makes the steps finer.
_CUTS = ((0.0, 0.0), (-0.025, -0.025), (0.02, 0.02), (0.04, 0.04), (0.06, 0.06))
_ROUNDS = 2  # a choice, then what fits its codes best
_CHUNK = 1 << 18  # weights worked on at a time: what is made of them fits the second-level cache
CARD_CHUNK = 1 << 23  # the same on a card, which wants many and has room


@dataclass(frozen=True, slots=True)
class Codes4:
    """A quantised matrix [out, in]: weight = (q - zero_point) * scale + offset."""

    q: torch.Tensor  # uint8 [out, in], 0..15
    scale: torch.Tensor  # float32 [out, groups], every value exact in float16
    zero_point: torch.Tensor  # uint8 [out, groups], 0..15
    offset: torch.Tensor | None = None  # float32 [out, groups]

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.scale.shape[1]

    def stored(self) -> Int4:
        """As the engine takes it: weight = (q - 8) * scale + zero."""
        zero = (8.0 - self.zero_point.float()) * self.scale
        return Int4(self.q, self.scale, zero if self.offset is None else zero + self.offset)


def quantise_int4(
    weight: torch.Tensor, group: int, *, fast: bool = False, symmetric: bool = False, portable: bool = True
) -> Codes4:
    """Codes for weight [out, in] (any float dtype); `group` divides in.

    The scale and zero of each group are searched for the smallest error, without calibration data; `fast` rounds to
    nearest over the full range instead. symmetric: every zero point is 8. portable: programs that know only integer
    zero points are to read it too. Raises ValueError for NaN or infinity.
    """
    rows, columns = weight.shape
    shape = (rows, columns // group)
    integer_zero = fast or symmetric or portable
    q, scale, low, error = search(weight.reshape(-1, group), integer_zero=integer_zero, symmetric=symmetric, fast=fast)
    if bool(error.isnan().any()):
        raise ValueError("a weight is not a finite number, or too large for a float16 scale")
    scale, low = scale.view(shape), low.view(shape)
    point = (-low / scale).round_().clamp_(0, STEPS)
    return Codes4(q.view(rows, columns), scale, point.byte(), None if integer_zero else low + point * scale)


@cache
def search_device() -> str:
    """Where matrices are searched: "cuda" where there is a card that finds as good a grid as the CPU does."""
    if not torch.cuda.is_available():
        return "cpu"
    values = torch.randn(256, 128, generator=torch.Generator().manual_seed(1))
    try:
        there = search(values.to("cuda"), integer_zero=False)[3].cpu()
    except Exception:  # noqa: BLE001 - too old a card, a full one, a broken driver: the CPU can do it
        return "cpu"
    here = search_torch(values, integer_zero=False)[3]
    return "cuda" if bool((there <= 1.001 * here).all()) else "cpu"


def maker_on(device: str) -> str | None:
    """What is noted of a folder whose grids another device than the CPU searched."""
    if device == "cpu":
        return None
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device
    return f"torch {torch.__version__} on {name}"


def searches(device: str) -> bool:
    """Whether matrices are brought to this device to be searched there, with `search_torch`; else the CPU does it."""
    return torch.device(device).type == "cuda"


def search(values: torch.Tensor, *, integer_zero: bool, symmetric: bool = False, fast: bool = False) -> SearchResult:
    """values [n, group] -> codes uint8 [n, group]; scale, low, weighted error [n]: value = code * scale + low.

    integer_zero: low is a multiple of scale, 0 to -15 times; else any float16 number, as every scale is one. The error
    of a group with a value that is not finite is NaN.
    """
    native = values.is_cpu and search_native(values, 4, integer_zero=integer_zero, symmetric=symmetric, fast=fast)
    if native:
        return native
    step = max(1, (_CHUNK if values.is_cpu else CARD_CHUNK) // values.shape[1])
    parts = (values[start : start + step].float() for start in range(0, len(values), step))
    made = [search_torch(part, integer_zero=integer_zero, symmetric=symmetric, fast=fast) for part in parts]
    codes, scale, low, error = (torch.cat(tensors) for tensors in zip(*made, strict=True))
    return codes, scale, low, error


def search_torch(
    values: torch.Tensor, *, integer_zero: bool, symmetric: bool = False, fast: bool = False
) -> SearchResult:
    """The same without the C kernel: values float32; the steps are those of search.c."""
    low, high = values.aminmax(dim=-1)
    if integer_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    weights = values.abs() + values.square().mean(-1, keepdim=True).sqrt_()
    best = _Best(values, weights, torch.ones_like(low), torch.zeros_like(low) if integer_zero else low.half().float())
    for cut_low, cut_high in _CUTS[:1] if fast else _CUTS:
        scale = ((high - low) * ((1 - cut_low - cut_high) / STEPS)).half().float()
        nearest = torch.where(scale > 0, -low * (1 - 2 * cut_low) / scale, 0).round_()
        for shift in (0,) if fast or symmetric or not integer_zero else (-1, 0, 1):
            point = torch.full_like(low, 8) if symmetric else (nearest + shift).clamp_(0, STEPS)
            choice = (scale, -point * scale if integer_zero else (low + (high - low) * cut_low).half().float())
            for _ in range(1 if fast else _ROUNDS):
                choice = best.offer(*choice, point if integer_zero else None)
    sound = torch.isfinite(values.square().sum(-1)) & (high - low < STEPS * 65504.0)
    error = best.error.where(best.error.isfinite(), 0).where(sound, torch.nan)
    return best.codes(), best.scale, best.low, error


class _Best:
    """The best scale and low that each group was offered."""

    def __init__(self, values: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor, low: torch.Tensor) -> None:
        self._values, self._weights = values, weights
        self.scale, self.low = scale, low
        self.error = torch.full_like(scale, torch.inf)

    def codes(self) -> torch.Tensor:
        return self._codes(self.scale, self.low).byte()

    def _codes(self, scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        return ((self._values - low[:, None]) / scale[:, None]).clamp_(0, STEPS).round_()

    def offer(
        self, scale: torch.Tensor, low: torch.Tensor, point: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take this choice where it is better. Returns the scale and low that fit its codes best (least squares)."""
        usable = scale > 0
        codes = self._codes(scale.where(usable, 1), low)
        distance = codes * scale[:, None] + low[:, None] - self._values
        error = (distance.square_() * self._weights).sum(-1)
        better = usable & (error < self.error)
        self.error = error.where(better, self.error)
        self.scale = scale.where(better, self.scale)
        self.low = low.where(better, self.low)
        total, values = self._weights.sum(-1), (self._weights * self._values).sum(-1)
        weighted = self._weights * codes
        first, second, products = weighted.sum(-1), (weighted * codes).sum(-1), (weighted * self._values).sum(-1)
        if point is not None:
            fitted = (products - point * values) / (second - 2 * point * first + point * point * total)
            moved = -point * fitted.half().float()
        else:
            determinant = total * second - first * first
            fitted = (total * products - values * first) / determinant
            moved = ((second * values - first * products) / determinant).half().float()
        sound = usable & (fitted > 0) & (fitted < 2 * scale)
        return fitted.half().float().where(sound, 0), moved.where(sound, low)
