"""Packed matrices as a card multiplies them: the words of the file, and a pair (scale, low) for each group.

A weight is `code * scale + low`. Eight INT4 codes or four INT8 codes (as code + 128) stand in each int32 word, the
first in its lowest bits, row after row: byte for byte what compressed-tensors folders hold. One row of input goes
through `kernels.product`; more rows are multiplied by the vendor's own product after `kernels.unpack` wrote the weights
in the activations' type.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from itertools import cycle
from typing import Any

import torch
from torch.nn import functional

from glmchat.engine.formats.weights import Words
from glmchat.engine.quantize.kernels import Kernel, Packed, Shape, half_if_exact

ROWS, BLOCK = 8, 128  # of a program of `product`: output rows, words of a row at a time
_UNPACK_ROWS, _UNPACK_BLOCK = 4, 256
SCRATCH = 1 << 27  # weights unpacked at a time at most: 256 MB in 16 bits, more than any matrix of a layer of 6B
_FEW = 1  # rows of input that go through `product`


def kernels() -> Any:
    """The Triton kernels, imported when a card is first used: their import decides who runs them."""
    return import_module("glmchat.engine.gpu.kernels")


def rows_of_a_program(outputs: int) -> int:
    """Output rows of a program: enough programs to fill a card, few enough to share what they read of the input.

    Sixteen would take 167 registers a thread, and a card then holds too few programs to hide what memory takes.
    """
    return 4 if outputs < 4096 else 8


_ROOM: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}


def _scratch(numbers: int, like: torch.Tensor) -> torch.Tensor:
    """The one place on this device for unpacked weights of this type, as large as the largest that was asked for."""
    key = (like.device, like.dtype)
    if key not in _ROOM or len(_ROOM[key]) < numbers:
        _ROOM.pop(key, None)  # before there is another
        _ROOM[key] = like.new_empty(numbers)
    return _ROOM[key][:numbers]


class CardWords(Kernel):
    """`packed` holds "codes" int32 [out, in / codes of a word] and "pairs" [out, groups, 2]."""

    name = "triton"

    def unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return "no CUDA device"
        return None if find_spec("triton") else "triton is not installed"

    def accepts(self, shape: Shape) -> bool:
        per_word = 32 // shape.bits
        return shape.in_features % 32 == 0 and shape.group % per_word == 0

    def pack(
        self, shape: Shape, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        low = minimum
        if low is None:
            codes, low = (codes.to(torch.int16) + 128).to(torch.uint8), -128 * scale
        if shape.bits == 4:
            codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
        return self.pack_words(shape, Words.of_bytes(codes, shape.bits, scale, low))

    def pack_words(self, shape: Shape, stored: Words) -> dict[str, torch.Tensor]:
        pairs = half_if_exact(torch.stack((stored.scale, stored.low), -1))
        return {"codes": stored.words, "pairs": pairs.contiguous()}

    def rows(self, shape: Shape, packed: Packed, ids: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(ids), shape.in_features, device=ids.device)
        return self._unpack(shape, packed["codes"][ids], packed["pairs"][ids], out)

    def _unpack(self, shape: Shape, words: torch.Tensor, pairs: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        grid = (-(-words.shape[0] // _UNPACK_ROWS), -(-words.shape[1] // _UNPACK_BLOCK))
        kernels().unpack[grid](
            words, pairs, out, words.shape[0], shape.in_features, BITS=shape.bits, GROUP=shape.group,
            GROUPS=shape.groups, ROWS=_UNPACK_ROWS, BLOCK=_UNPACK_BLOCK,
        )  # fmt: skip
        return out

    def linear(self, shape: Shape, packed: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.shape[0] > _FEW:
            return self._many(shape, packed, x, None if bias is None else bias.to(x.dtype))
        per_word = 32 // shape.bits
        planes = x.float().view(-1, per_word).t().contiguous().view(-1)
        y = torch.empty(shape.out_features, dtype=torch.float32, device=x.device)
        rows = rows_of_a_program(shape.out_features)
        unused = y  # a pointer for what this form of the kernel does not read
        kernels().product[(-(-shape.out_features // rows),)](
            planes, packed["codes"], packed["pairs"], unused if bias is None else bias, unused, unused, unused, unused,
            unused, y, unused, shape.in_features, shape.out_features, 0.0, 1.0, BITS=shape.bits, BFLOAT=False,
            GROUP=shape.group, GROUPS=shape.groups, NORM=0, KEEP_NORMED=0, GATED=False, ACTIVATION=0,
            HAS_BIAS=bias is not None, HAS_RESIDUAL=False, RANK=0, RANK_BLOCK=1, OUT_PLANES=1, RESIDUAL_PLANES=1,
            ROWS=rows, BLOCK=BLOCK,
        )  # fmt: skip
        return y.to(x.dtype).view(1, -1)

    def _many(self, shape: Shape, packed: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Many rows, by the vendor's product over weights that are unpacked for it, in one place for all matrices."""
        height = min(shape.out_features, SCRATCH // shape.in_features)
        room = _scratch(height * shape.in_features, x).view(height, shape.in_features)
        if height == shape.out_features:
            return functional.linear(x, self._unpack(shape, packed["codes"], packed["pairs"], room), bias)
        y = x.new_empty(x.shape[0], shape.out_features)
        for start in range(0, shape.out_features, height):
            rows = slice(start, min(start + height, shape.out_features))
            words, pairs = packed["codes"][rows], packed["pairs"][rows]
            weight = self._unpack(shape, words, pairs, room[: len(words)])
            y[:, rows] = functional.linear(x, weight, None if bias is None else bias[rows])
        return y

    def fuse(self, parts: Sequence[tuple[Shape, Packed]]) -> tuple[dict[str, torch.Tensor], list[Packed]] | None:
        first = parts[0][0]
        if any((shape.in_features, shape.bits, shape.group) != (first.in_features, first.bits, first.group)
               for shape, _ in parts) or len({packed["pairs"].dtype for _, packed in parts}) > 1:  # fmt: skip
            return None
        whole = {name: torch.cat([packed[name] for _, packed in parts]) for name in ("codes", "pairs")}
        heights = [shape.out_features for shape, _ in parts]
        views = zip(*(torch.split(whole[name], heights) for name in ("codes", "pairs")), strict=True)
        return whole, [{"codes": codes, "pairs": pairs} for codes, pairs in views]


class Upload:
    """Brings tensors of mapped files to a device; to an NVIDIA card through pinned memory, which the card reads itself.

    While it copies one half, the host reads the file into the other.
    """

    def __init__(self, device: str, *, half_bytes: int = 64 << 20, pinned: bool | None = None) -> None:
        """pinned: whether to go through two halves; None where the device is a CUDA card."""
        self._device = torch.device(device)
        on_cuda = self._device.type == "cuda"
        self._halves: Any = None
        if on_cuda if pinned is None else pinned:
            halves = [torch.empty(half_bytes, dtype=torch.uint8, pin_memory=on_cuda) for _ in range(2)]
            marks: Any = [torch.cuda.Event() if on_cuda else None for _ in range(2)]  # type: ignore[no-untyped-call]
            self._halves = cycle(zip(halves, marks, strict=True))

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._halves is None or not tensor.dim():
            return tensor.to(self._device)
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
        source, target = (t.view(-1).view(torch.uint8) for t in (tensor.contiguous(), there))
        start = 0
        while start < len(source):
            half, mark = next(self._halves)
            if mark is not None:
                mark.synchronize()  # of the copy that read this half before
            count = min(len(half), len(source) - start)
            half[:count].copy_(source[start : start + count])
            target[start : start + count].copy_(half[:count], non_blocking=True)
            if mark is not None:
                mark.record()
            start += count
        return there
