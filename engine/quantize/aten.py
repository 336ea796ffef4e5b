"""ATen's fused int4 and int8 products for the CPU, where glmchat's own kernel was not built.

Source of the layout: torch's `_convert_weight_to_int4pack_for_cpu`. A block of output rows (64 with AVX-512, else 32)
is stored as [in, block / 2] bytes: the first half of the rows in the low nibbles, the second half in the high ones.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional

from glmchat.engine.quantize.kernels import BLOCK_VALUES, Kernel, Packed, Shape, half_if_exact

# Above this many rows a dequantised dense product is faster than the fused operator (measured: 4 to 8).
FUSED_ROWS = 4
_FUSED_GROUPS = (32, 64, 128, 256)


@cache
def _block_rows() -> int:
    """Rows per block of the packed layout on this CPU: the row that shares its byte with row 0 tells."""
    codes = torch.zeros(64, 32, dtype=torch.int32)
    codes[0, 0] = 1
    codes[32, 0] = 2
    first = int(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).flatten()[0])
    return 64 if first == 0x21 else 32


class AtenCpu(Kernel):
    name = "aten"

    def unavailable(self) -> str | None:
        missing = [n for n in ("_weight_int4pack_mm_for_cpu", "_weight_int8pack_mm") if not hasattr(torch.ops.aten, n)]
        return f"torch has no {', '.join(missing)}" if missing else None

    def accepts(self, shape: Shape) -> bool:
        if shape.bits == 4:
            return shape.group in _FUSED_GROUPS and shape.out_features % 16 == 0
        return shape.groups == 1

    def pack(
        self, shape: Shape, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        if minimum is None:
            return {"codes": codes.contiguous(), "scale": scale.contiguous(), "scale16": scale[:, 0].bfloat16()}
        fill = -shape.out_features % 64
        wide = functional.pad(codes, (0, 0, 0, fill)).int()
        zero = minimum + 8 * scale
        pairs = torch.stack((scale.T, zero.T), dim=-1)  # [groups, out, 2]
        return {
            "codes": torch.ops.aten._convert_weight_to_int4pack_for_cpu(wide, 1).flatten(),
            "scale": half_if_exact(scale),
            "minimum": half_if_exact(minimum),
            "pairs": functional.pad(pairs, (0, 0, 0, fill)).bfloat16().contiguous(),
        }

    def _codes(self, shape: Shape, packed: Packed, block: torch.Tensor) -> torch.Tensor:
        """Codes of whole blocks [n] -> [n, block rows, in]."""
        size = _block_rows()
        stored = packed["codes"].view(-1, shape.in_features, size // 2)[block]
        return torch.cat((stored & 15, stored >> 4), dim=-1).transpose(1, 2)

    def rows(self, shape: Shape, packed: Packed, ids: torch.Tensor) -> torch.Tensor:
        if shape.bits == 8:
            values: torch.Tensor = packed["codes"][ids].float() * packed["scale"][ids]
            return values
        size = _block_rows()
        stored = packed["codes"].view(-1, shape.in_features, size // 2)
        byte = stored[ids // size, :, ids % (size // 2)]
        codes = torch.where((ids % size < size // 2).unsqueeze(1), byte & 15, byte >> 4)
        return self._scale(shape, packed, codes, ids)

    def _scale(self, shape: Shape, packed: Packed, codes: torch.Tensor, at: slice | torch.Tensor) -> torch.Tensor:
        values = codes.reshape(-1, shape.groups, shape.group).float()
        values *= packed["scale"][at].float().unsqueeze(-1)
        values += packed["minimum"][at].float().unsqueeze(-1)
        return values.reshape(-1, shape.in_features)

    def linear(self, shape: Shape, packed: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.shape[0] > FUSED_ROWS or x.dtype == torch.float32:
            return self._dense(shape, packed, x, bias)
        narrow = x.bfloat16().contiguous()
        y: torch.Tensor
        if shape.bits == 8:
            y = torch.ops.aten._weight_int8pack_mm(narrow, packed["codes"], packed["scale16"])
        else:
            codes = packed["codes"].view(-1, shape.in_features // 2)
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(narrow, codes, shape.group, packed["pairs"])
            y = y[:, : shape.out_features]
        y = y.to(x.dtype)
        return y if bias is None else y + bias.to(y.dtype)

    def _dense(self, shape: Shape, packed: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = x.new_empty(x.shape[0], shape.out_features)
        size = _block_rows() if shape.bits == 4 else 64
        step = max(1, BLOCK_VALUES // shape.in_features // size) * size
        wide = x.float()
        for start in range(0, shape.out_features, step):
            at = slice(start, min(start + step, shape.out_features))
            if shape.bits == 8:
                block = packed["codes"][at].float() * packed["scale"][at]
            else:
                number = torch.arange(start // size, -(-at.stop // size))
                codes = self._codes(shape, packed, number).reshape(-1, shape.in_features)
                block = self._scale(shape, packed, codes[: at.stop - start], at)
            y[:, at] = functional.linear(wide, block)
        return y if bias is None else y.add_(bias.to(y.dtype))
