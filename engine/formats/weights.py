"""Where weights come from: one face over GGUF, safetensors and .bin shards, and the quantised forms they keep.

A source gives each tensor as it is stored. Quantised matrices come as `Int4` or `Int8` records and stay what they are;
formats that spread one matrix over several tensors (THUDM's `weight` and `weight_scale`, compressed-tensors) are
sources that wrap another source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Int4:
    """weight = (q - 8) * scale + zero, in groups along the inputs."""

    q: torch.Tensor  # uint8 [out, in], 0..15
    scale: torch.Tensor  # float32 [out, in / group]
    zero: torch.Tensor  # float32 [out, in / group]

    def dequantise(self) -> torch.Tensor:
        out, width = self.q.shape
        q = self.q.view(out, self.scale.shape[1], -1).float() - 8
        return (q * self.scale[..., None] + self.zero[..., None]).view(out, width)

    def rows(self, order: torch.Tensor) -> Int4:
        """The same matrix with its rows in another order; groups lie along the inputs, so this is exact."""
        return Int4(self.q[order], self.scale[order], self.zero[order])


@dataclass(frozen=True, slots=True)
class Int8:
    """weight = q * scale; scale per row, or per row and group along the inputs."""

    q: torch.Tensor  # int8 [out, in]
    scale: torch.Tensor  # float32 [out] or [out, in / group]

    def dequantise(self) -> torch.Tensor:
        out, width = self.q.shape
        scale = self.scale.view(out, -1, 1)
        return (self.q.view(out, scale.shape[1], -1).float() * scale).view(out, width)

    def rows(self, order: torch.Tensor) -> Int8:
        """The same matrix with its rows in another order."""
        return Int8(self.q[order], self.scale[order])


Stored: TypeAlias = "torch.Tensor | Int4 | Int8"


class WeightSource(Protocol):
    """Tensors by their checkpoint names."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape as the model sees it (a packed matrix: [out, in])."""
        ...

    def read(self, name: str) -> Stored:
        """One tensor, memory-mapped where the file allows it. Raises Damaged if the file is not what it claims."""
        ...
