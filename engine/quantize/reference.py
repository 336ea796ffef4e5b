"""The kernel that runs everywhere: unpack a block of rows with torch, multiply it, forget it."""

from __future__ import annotations

import torch
from torch.nn import functional

from glmchat.engine.quantize.kernels import Kernel, Packed, Shape

BLOCK_VALUES = 1 << 22  # weights unpacked at a time: 16 MB of float32


def half_if_exact(values: torch.Tensor) -> torch.Tensor:
    """float16 where it loses nothing (GGUF's and THUDM's scales are float16), else the float32 that came in."""
    half = values.half()
    return half if torch.equal(half.float(), values) else values


class Reference(Kernel):
    name = "torch"

    def unavailable(self) -> str | None:
        return None

    def pack(
        self, shape: Shape, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        packed = {"scale": half_if_exact(scale)}
        if minimum is not None:
            packed["minimum"] = half_if_exact(minimum)
        if shape.bits == 8 or shape.in_features % 2:
            packed["codes"] = codes.contiguous()
        else:
            packed["codes"] = codes[:, 0::2] | (codes[:, 1::2] << 4)  # low nibble: even input
        return packed

    def _dequantise(self, shape: Shape, packed: Packed, at: slice | torch.Tensor) -> torch.Tensor:
        codes = packed["codes"][at]
        if codes.shape[1] != shape.in_features:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1)
        values = codes.reshape(-1, shape.groups, shape.group).float()
        values *= packed["scale"][at].float().unsqueeze(-1)
        if "minimum" in packed:
            values += packed["minimum"][at].float().unsqueeze(-1)
        return values.reshape(-1, shape.in_features)

    def rows(self, shape: Shape, packed: Packed, ids: torch.Tensor) -> torch.Tensor:
        return self._dequantise(shape, packed, ids)

    def linear(self, shape: Shape, packed: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = x.new_empty(x.shape[0], shape.out_features)
        step = max(1, BLOCK_VALUES // shape.in_features)
        compute = x if x.device.type != "cpu" else x.float()  # no 16-bit dense product is fast on every CPU
        for start in range(0, shape.out_features, step):
            block = self._dequantise(shape, packed, slice(start, start + step)).to(compute.dtype)
            y[:, start : start + step] = functional.linear(compute, block)
        return y if bias is None else y.add_(bias.to(y.dtype))
