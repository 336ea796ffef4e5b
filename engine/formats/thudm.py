"""THUDM's own INT8 and INT4 checkpoints: a matrix is `weight` (int8) and `weight_scale` (one number per row).

Four-bit files hold two columns in a byte: the even one in the high nibble, the odd one in the low, both in two's
complement. Symmetric: weight = scale * code, multiplied in float32 (THUDM's quantization.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from glmchat.core.errors import Damaged
from glmchat.core.language import tr
from glmchat.engine.formats.weights import Int4, Int8, Stored, WeightSource

_SCALE = "_scale"
_GROUPS = (128, 64, 32)  # what the fused kernels take; a row's scale is repeated, which changes nothing


def open_official(source: WeightSource, config: Mapping[str, Any]) -> WeightSource:
    """`source` itself, or its packed matrices put together, if it has any.

    Whether a byte holds one column or two is read from the tensors' shapes, not from `quantization_bit`, which people
    forget when they copy a config.json. Raises Damaged for quantised embeddings.
    """
    shapes = source.shapes()
    packed = {name for name in shapes if f"{name}{_SCALE}" in shapes}
    if not packed:
        return source
    for name in packed:
        if "word_embeddings" in name or name == "lm_head.weight":
            raise Damaged(
                tr(
                    "{name} is quantised (a chatglm-6b-int4-qe checkpoint), a layout that was never documented",
                    name=name,
                ),
                hint=tr("use chatglm-6b-int4, or chatglm-6b with --quant 4"),
                code="model.quantised_embeddings",
            )
    return _Official(source, packed, _columns_per_byte(shapes, packed, config))


def _columns_per_byte(shapes: Mapping[str, tuple[int, ...]], packed: set[str], config: Mapping[str, Any]) -> int:
    hidden = config.get("hidden_size", 4096)
    widths = {shapes[name][1] for name in packed if name.endswith("query_key_value.weight")}
    for columns in (1, 2):
        if widths == {hidden // columns}:
            return columns
    raise Damaged(
        tr(
            "the packed matrices are {widths} bytes wide, but the model is {hidden} wide",
            widths=sorted(widths),
            hidden=hidden,
        ),
        hint=tr("config.json and the weights belong to different models: pull the model again"),
        code="weights.packed",
    )


class _Official:
    def __init__(self, source: WeightSource, packed: set[str], columns: int) -> None:
        self._source = source
        self._packed = packed
        self._columns = columns

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        found = {}
        for name, shape in self._source.shapes().items():
            if name.endswith(_SCALE) and name.removesuffix(_SCALE) in self._packed:
                continue
            found[name] = (shape[0], shape[1] * self._columns) if name in self._packed else shape
        return found

    def read(self, name: str) -> Stored:
        stored = self._source.read(name)
        if name not in self._packed:
            return stored
        scale = self._source.read(name + _SCALE)
        assert isinstance(stored, torch.Tensor)
        assert isinstance(scale, torch.Tensor)
        if stored.dtype != torch.int8 or scale.shape != stored.shape[:1] or not scale.is_floating_point():
            raise Damaged(
                tr(
                    "{name} is {dtype} with scales {shape}: no packed matrix by THUDM looks like this",
                    name=name,
                    dtype=stored.dtype,
                    shape=list(scale.shape),
                ),
                hint=tr("pull the model again"),
                code="weights.packed",
            )
        if self._columns == 1:
            return Int8(stored, scale.float())
        return _four_bits(stored, scale.float())


def _four_bits(stored: torch.Tensor, scale: torch.Tensor) -> Int4:
    """stored int8 [out, in / 2], scale [out] -> codes 0..15 [out, in] with scales per group."""
    code = stored.view(torch.uint8) ^ 0x88  # two's complement -8..7 -> 0..15, both nibbles at once
    q = torch.stack((code >> 4, code & 15), dim=-1).flatten(1)
    width = q.shape[1]
    group = next((g for g in _GROUPS if width % g == 0), width)
    scales = scale[:, None].repeat(1, width // group)
    return Int4(q, scales, torch.zeros_like(scales))
