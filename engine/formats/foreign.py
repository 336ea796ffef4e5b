"""Matrices that other programs packed, as codes, scales and zero points: GPTQ, AWQ, mlx_lm, HQQ and bitsandbytes.

Sources: AutoGPTQ's and AutoAWQ's packing (`WQLinear_GEMM`), MLX's `quantize`, HQQ's `Quantizer`, bitsandbytes'
`QuantState`. A matrix
`x.weight` [out, in] is stored as
    GPTQ          x.qweight int32 [in * bits / 32, out], x.qzeros int32 [groups, out * bits / 32],
                  x.scales [groups, out], x.g_idx int32 [in]: the group of each input
    AWQ           x.qweight int32 [in, out / 8], x.qzeros int32 [groups, out / 8], x.scales [groups, out]; the eight
                  outputs of a word stand in the order 0 2 4 6 1 3 5 7
    MLX           x.weight uint32 [out, in * bits / 32], x.scales and x.biases [out, groups]: code * scale + bias
    HQQ           x.W_q uint8, the first codes in the highest bits (three bits: ten in an int32), of the matrix as
                  [in * out / group, group], or [group, in * out / group] of axis 0; x.scale, x.zero: (code - zero) *
                  scale; x.nbits, x.group_size, x.axis and x.shape as tensors
    bitsandbytes  x.weight uint8, two codes a byte, with a table of 16 values and one scale for 64 (NF4, FP4); or
                  int8 [out, in] with x.SCB, 127 times the scale of a row
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError

from glmchat.checkpoints.quantised import PARTS, Packing, grouped_shape, packing_of
from glmchat.core.errors import Damaged
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.formats.weights import Int4, Int8, Stored, WeightSource

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word output 0, 1, 2 … of eight stands


def open_foreign(source: WeightSource, config: Mapping[str, Any]) -> WeightSource:
    """`source` itself, or its packed matrices put together under the names `….weight`."""
    packing = packing_of(config)
    if packing is None:
        return source
    if packing.method == "bitsandbytes":
        return _BitsAndBytes(source)
    if packing.method == "hqq":
        return _HQQ(source)
    return _Grouped(source, packing)


def _damaged(name: str, what: str) -> Damaged:
    return Damaged(
        tr("{name} cannot be unpacked: {what}", name=one_line(name), what=what),
        hint=tr("the folder is damaged: run `glmchat verify`, or pull the model again"),
        code="weights.packed",
    )


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of the last axis' words, the first in the lowest bits: uint8 [..., n * 32 / bits]."""
    codes = words.contiguous().view(torch.uint8)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    return codes


class _Source:
    """What the formats share: tensors that are no part of a packed matrix come as they are."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.packed: frozenset[str] = frozenset()  # names of the matrices that are put together

    @property
    def upright(self) -> frozenset[str]:
        """Packed matrices are [out, in] even in a family whose files hold [in, out]."""
        return self.packed

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def _dense(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        assert isinstance(tensor, torch.Tensor)
        return tensor


class _Grouped(_Source):
    """Codes with a scale and a zero for each group of inputs."""

    def __init__(self, source: WeightSource, packing: Packing) -> None:
        super().__init__(source)
        self._packing = packing
        shapes = source.shapes()
        parts = PARTS[packing.method]
        self._stems = {
            f"{name.removesuffix(parts[0])}weight": name.removesuffix(parts[0])
            for name in shapes
            if name.endswith(f".{parts[0]}") and f"{name.removesuffix(parts[0])}scales" in shapes
        }
        self.packed = frozenset(self._stems)
        belonging = {f"{stem}{part}" for stem in self._stems.values() for part in parts}
        self._shapes = {name: shape for name, shape in shapes.items() if name not in belonging}
        for name, stem in self._stems.items():
            self._shapes[name] = self._shape_of(name, shapes[f"{stem}{parts[0]}"], shapes[f"{stem}scales"])

    def _shape_of(self, name: str, words: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, ...]:
        shape = grouped_shape(self._packing, words, scales)
        if shape is None:
            raise _damaged(name, f"{list(words)} words and {list(scales)} scales")
        return shape

    def read(self, name: str) -> Stored:
        stem = self._stems.get(name)
        if stem is None:
            return self._source.read(name)
        read = {"gptq": self._gptq, "awq": self._awq, "mlx": self._mlx}[self._packing.method]
        try:
            return read(name, stem)
        except (RuntimeError, IndexError, KeyError, TypeError) as error:
            raise _damaged(name, one_line(str(error).splitlines()[0], 120)) from None

    def _gptq(self, name: str, stem: str) -> Stored:
        bits, (rows, columns) = self._packing.bits, self._shapes[name]
        codes = _unpack(self._dense(f"{stem}qweight").t(), bits)  # [out, in]
        scales = self._dense(f"{stem}scales").t().float()  # [out, groups]
        points = _unpack(self._dense(f"{stem}qzeros"), bits)[:, :rows].t().float() + float(self._packing.one_less)
        if f"{stem}g_idx" in self._source.shapes():
            groups = self._dense(f"{stem}g_idx").long()
            size = columns // scales.shape[1]
            if not torch.equal(groups, torch.arange(columns) // size):  # inputs of a group lie apart: no packed form
                return (codes.float() - points[:, groups]) * scales[:, groups]
        return _affine(codes, scales, -points * scales, bits)

    def _awq(self, name: str, stem: str) -> Stored:
        order = torch.tensor(_AWQ_ORDER)

        def outputs(words: torch.Tensor) -> torch.Tensor:
            codes = _unpack(words, 4)
            return codes.view(len(codes), -1, 8)[..., order].flatten(1)

        scales = self._dense(f"{stem}scales").t().float()
        points = outputs(self._dense(f"{stem}qzeros")).t().float()
        codes = outputs(self._dense(f"{stem}qweight")).t().contiguous()
        return _affine(codes, scales, -points * scales, 4)

    def _mlx(self, name: str, stem: str) -> Stored:
        words, columns = self._dense(f"{stem}weight"), self._shapes[name][1]
        bits = words.shape[1] * 32 // columns  # some layers may have more than config.json says of all
        if bits not in (4, 8) or words.shape[1] * 32 != bits * columns:
            raise _damaged(name, f"{bits} bits")
        scales, biases = self._dense(f"{stem}scales").float(), self._dense(f"{stem}biases").float()
        return _affine(_unpack(words, bits), scales, biases, bits)


def _affine(codes: torch.Tensor, scales: torch.Tensor, low: torch.Tensor, bits: int) -> Stored:
    """code * scale + low, packed where there is a form for it. codes [out, in], scales and low [out, groups]"""
    if bits == 4:
        return Int4(codes.contiguous(), scales.contiguous(), (low + 8 * scales).contiguous())
    if torch.equal(low, -128 * scales):
        return Int8((codes.contiguous() ^ 0x80).view(torch.int8), scales.contiguous())
    rows, columns = codes.shape
    groups = codes.view(rows, scales.shape[1], -1).float()
    return (groups * scales[..., None] + low[..., None]).view(rows, columns)


class _HQQ(_Source):
    """What a layer is packed with stands beside it in tensors. Fewer than four bits are held as four."""

    def __init__(self, source: WeightSource) -> None:
        super().__init__(source)
        shapes = source.shapes()
        self._stems = {name.removesuffix("W_q") + "weight": name.removesuffix("W_q") for name in shapes
                       if name.endswith(".W_q")}  # fmt: skip
        self.packed = frozenset(self._stems)
        kept = {f"{stem}bias" for stem in self._stems.values()}
        for name, shape in shapes.items():
            if name in kept or not name.startswith(tuple(self._stems.values())):
                self._shapes[name] = shape
        for name, stem in self._stems.items():
            try:
                rows, columns = (int(n) for n in self._dense(f"{stem}shape"))
            except (KeyError, ValueError, TypeError, SafetensorError):
                raise _damaged(name, "its shape is missing") from None
            self._shapes[name] = (rows, columns)

    def read(self, name: str) -> Stored:
        stem = self._stems.get(name)
        if stem is None:
            return self._source.read(name)
        try:
            return self._unpacked(stem, *self._shapes[name])
        except (RuntimeError, KeyError, IndexError, ValueError, SafetensorError) as error:
            raise _damaged(name, one_line(str(error).splitlines()[0], 120)) from None

    def _unpacked(self, stem: str, rows: int, columns: int) -> Stored:
        group, axis = (int(self._dense(f"{stem}{part}")) for part in ("group_size", "axis"))
        bits = math.ceil(float(self._dense(f"{stem}nbits")))  # there is 1.58 too
        bits = 8 if bits > 4 else bits
        scale, zero = (self._dense(f"{stem}{part}").float() for part in ("scale", "zero"))
        words = self._dense(f"{stem}W_q")
        if words.is_floating_point():  # bytes that were stored as numbers of the activations' type
            words = words.view(torch.int32 if bits == 3 else torch.uint8)
        count, top = (10, 27) if bits == 3 else (8 // bits, 8 - bits)
        codes = torch.cat([(words >> (top - bits * part)) & (2**bits - 1) for part in range(count)])
        lines = group if axis == 0 else rows * columns // group
        codes = codes[:lines]
        if axis == 0 or columns % group:
            return ((codes.float() - zero) * scale).view(rows, columns)
        scale, zero = scale.view(rows, -1), zero.view(rows, -1)
        return _affine(codes.byte().view(rows, columns), scale, -zero * scale, max(bits, 4))


class _BitsAndBytes(_Source):
    """NF4 and FP4 are tables of 16 values, which no group of equal steps holds: they come dense."""

    def __init__(self, source: WeightSource) -> None:
        super().__init__(source)
        shapes = source.shapes()
        self._states: dict[str, str] = {}
        self._rows = {name.removesuffix("SCB") + "weight": name for name in shapes if name.endswith(".SCB")}
        for name in shapes:
            weight, mark, _ = name.partition(".quant_state.bitsandbytes__")
            if mark:
                self._states[weight] = name
        for name, shape in shapes.items():
            stem = name.partition(".weight")[0] + ".weight"
            if name in self._states:
                self._shapes[name] = tuple(int(n) for n in self._state(name)["shape"])
            elif stem not in self._states and not name.endswith((".SCB", ".weight_format")):
                self._shapes[name] = shape
        self.packed = frozenset((*self._states, *self._rows))

    def _state(self, name: str) -> dict[str, Any]:
        try:
            state = json.loads(self._dense(self._states[name]).numpy().tobytes())
            _ = [int(n) for n in state["shape"]], int(state["blocksize"])
        except (ValueError, KeyError, TypeError):
            raise _damaged(name, "its quant_state is no JSON") from None
        return dict(state)

    def read(self, name: str) -> Stored:
        if name in self._rows:
            return Int8(self._dense(name), self._dense(self._rows[name]).float() / 127)
        if name not in self._states:
            return self._source.read(name)
        state = self._state(name)
        try:
            codes = self._dense(name).flatten()
            codes = torch.stack((codes >> 4, codes & 15), -1).flatten().long()
            values = self._dense(f"{name}.quant_map").float()[codes]
            scales = self._scales(name, state)
            return (values.view(-1, int(state["blocksize"])) * scales[:, None]).view(self._shapes[name])
        except (RuntimeError, IndexError, KeyError) as error:
            raise _damaged(name, one_line(str(error).splitlines()[0], 120)) from None

    def _scales(self, name: str, state: Mapping[str, Any]) -> torch.Tensor:
        """One for each block; of themselves quantised in blocks, with what was taken off them before."""
        stored = self._dense(f"{name}.absmax")
        if f"{name}.nested_absmax" not in self._source.shapes():
            return stored.float()
        table = self._dense(f"{name}.nested_quant_map").float()[stored.long()]
        size = int(state["nested_blocksize"])
        outer = self._dense(f"{name}.nested_absmax").float().repeat_interleave(size)[: len(table)]
        return table * outer + float(state["nested_offset"])
