"""One Triton kernel for CUDA cards that ATen's int4 and int8 operators do not serve: unpack to float16, multiply.

It reads the plain layout of the reference kernel (two codes in a byte, the even input in the low nibble), so lookups
and everything else come from there. Imported only on CUDA; Triton comes with torch's CUDA builds.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

ROWS, OUTPUTS, HALF = 16, 64, 16  # a tile: activation rows, output rows, pairs of inputs (one group holds whole tiles)


@triton.jit  # type: ignore[untyped-decorator]
def multiply(  # type: ignore[no-untyped-def]
    x,
    codes,
    scale,
    low,
    y,
    rows,
    outputs,
    inputs,
    group,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    HALF: tl.constexpr,
):
    """y [rows, outputs] = x [rows, inputs] float16 times the packed matrix, summed in float32.

    Even and odd inputs are two products, so codes are never interleaved.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    pair = tl.arange(0, HALF)
    row_in, output_in = row < rows, output < outputs
    groups = inputs // group
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for start in range(0, inputs // 2, HALF):
        at = start + pair
        pair_in = at < inputs // 2
        x_at = x + row[:, None] * inputs + 2 * at[None, :]
        x_in = row_in[:, None] & pair_in[None, :]
        even, odd = tl.load(x_at, mask=x_in, other=0.0), tl.load(x_at + 1, mask=x_in, other=0.0)
        w_in = pair_in[:, None] & output_in[None, :]
        if BITS == 4:
            packed = tl.load(codes + output[None, :] * (inputs // 2) + at[:, None], mask=w_in, other=0)
            first, second = (packed & 15).to(tl.float32), (packed >> 4).to(tl.float32)
        else:
            code_at = codes + output[None, :] * inputs + 2 * at[:, None]
            first = tl.load(code_at, mask=w_in, other=0).to(tl.float32)
            second = tl.load(code_at + 1, mask=w_in, other=0).to(tl.float32)
        scale_at = output * groups + 2 * start // group
        factor = tl.load(scale + scale_at, mask=output_in, other=0.0).to(tl.float32)[None, :]
        first, second = first * factor, second * factor
        if BITS == 4:
            added = tl.load(low + scale_at, mask=output_in, other=0.0).to(tl.float32)[None, :]
            first, second = first + added, second + added
        total += tl.dot(even, first.to(tl.float16)) + tl.dot(odd, second.to(tl.float16))
    tl.store(y + row[:, None] * outputs + output[None, :], total, mask=row_in[:, None] & output_in[None, :])


def run(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor | None, bits: int, group: int
) -> torch.Tensor:
    """x [rows, inputs] float16 -> float32 [rows, outputs]."""
    rows, inputs = x.shape
    outputs = codes.shape[0]
    y = torch.empty(rows, outputs, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(outputs, OUTPUTS))
    launch: Any = multiply[grid]
    launch(
        x, codes, scale, scale if low is None else low, y, rows, outputs, inputs, group,
        BITS=bits, ROWS=ROWS, OUTPUTS=OUTPUTS, HALF=HALF,
    )  # fmt: skip
    return y
