"""Weights that their makers packed: compressed-tensors' `pack-quantized`, and THUDM's own INT8 and INT4 checkpoints.

Source: compressed-tensors 0.20, `compressors/pack_quantized`. A matrix `x.weight` is stored as
    x.weight_packed      int32 [out, ceil(in * bits / 32)]: code + 2^(bits-1), the first input in the lowest bits
    x.weight_scale       [out, groups]
    x.weight_zero_point  int32 [ceil(out * bits / 32), groups], packed along the rows; only if asymmetric
    x.weight_shape       int64 [2]
    x.weight_g_idx       int32 [in], the group of each input; only of older folders with activation order "group"
and weight = (code - zero point) * scale. glmchat's own addition: `x.weight_offset` float32 [out, groups], in files that
the index does not list, for grids whose zero is no multiple of the scale.

THUDM: a matrix is `weight` (int8) and `weight_scale` (one number per row). Four-bit files hold two columns in a byte:
the even one in the high nibble, the odd one in the low, both in two's complement. Symmetric: weight = scale * code,
multiplied in float32 (THUDM's quantization.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.nn import functional

from glmchat.checkpoints.readers import Scheme
from glmchat.checkpoints.recipe import FORMAT, METHOD, is_ours_to_read
from glmchat.core.errors import Damaged
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.formats.weights import Bring, Int4, Int8, Stored, WeightSource, Words

SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_offset")


def packed_width(inputs: int, bits: int) -> int:
    """int32 words in a packed row."""
    return -(-inputs * bits // 32)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes uint8 [rows, columns] below 2^bits -> int32 [rows, packed_width]."""
    fill = -codes.shape[1] % (32 // bits)
    codes = functional.pad(codes, (0, fill)) if fill else codes
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return codes.flatten().view(torch.int32).view(len(codes), -1)


def unpack(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 [rows, columns]."""
    codes = words.flatten().view(torch.uint8).view(len(words), -1)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    return codes[:, :columns].contiguous()


def pack_zero_points(points: torch.Tensor) -> torch.Tensor:
    """Four-bit zero points uint8 [out, groups] -> int32 [ceil(out / 8), groups]."""
    return pack(points.T.contiguous(), 4).T.contiguous()


def unpack_zero_points(words: torch.Tensor, rows: int, bits: int = 4) -> torch.Tensor:
    return unpack(words.T.contiguous(), bits, rows).T.contiguous()


def describe(
    schemes: Mapping[Scheme, Iterable[str]], dense: Iterable[str], *, dequantize: bool = True
) -> dict[str, Any]:
    """The `quantization_config` of a folder.

    schemes: how matrices are packed -> module names. dense: modules left as they are. dequantize: transformers unpacks
    every matrix by the first scheme; else each by its own, which takes no zero points and no packed embedding.
    """
    groups = {}
    for number, ((bits, group, symmetric), names) in enumerate(sorted(schemes.items())):
        groups[f"group_{number}"] = {
            "targets": sorted(names),
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "group" if group else "channel",
                "group_size": group or None,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "dequantize": dequantize,
        "config_groups": groups,
        "ignore": sorted(dense),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


_PACKED = ".weight_packed"


def open_compressed(source: WeightSource, config: Mapping[str, Any], folder: Path) -> WeightSource:
    """`source` itself, or its packed matrices put together under the names `….weight`.

    Raises Damaged if the tensors are packed and config.json says nothing that can be read, or the other way round.
    """
    names = [name for name in source.shapes() if name.endswith(_PACKED)]
    described = config.get("quantization_config")
    if not names and not is_ours_to_read(config):
        return source
    if not names or not is_ours_to_read(config):
        kind = described.get("format") if isinstance(described, Mapping) else None
        raise Damaged(
            tr("the weights are packed, but config.json does not say how")
            if described is None
            else tr("the weights do not match the quantization_config {kind!r}", kind=one_line(str(kind), 60)),
            hint=tr("use config.json and weights from the same folder: run `glmchat verify`, or quantise again"),
            code="weights.packed",
        )
    return _Compressed(source, names, folder)


class _Compressed:
    def __init__(self, source: WeightSource, packed: list[str], folder: Path) -> None:
        self._source = source
        self._stems = {name.removesuffix("_packed"): name.removesuffix("weight_packed") for name in packed}
        self._belonging = {f"{stem}{suffix}" for stem in self._stems.values() for suffix in SUFFIXES}
        self._offsets = _offsets(folder)
        self._shapes: dict[str, tuple[int, ...]] = {}
        shapes = source.shapes()
        for name, shape in shapes.items():
            if name not in self._belonging:
                self._shapes[name] = shape
        for name, stem in self._stems.items():
            if f"{stem}weight_scale" not in shapes or f"{stem}weight_shape" not in shapes:
                raise _damaged(name, "its scales or its shape are missing")
            self._shapes[name] = self._shape_of(name, stem)
        # A packed matrix is [out, in] even in a family whose files hold [in, out].
        self.upright = self.packed = frozenset(self._stems)

    def _shape_of(self, name: str, stem: str) -> tuple[int, ...]:
        shape = tuple(int(n) for n in self._dense(f"{stem}weight_shape").flatten())
        shapes = self._source.shapes()
        words, scales = shapes[f"{stem}weight_packed"], shapes[f"{stem}weight_scale"]
        fits = len(shape) == len(words) == len(scales) == 2 and words[0] == scales[0] == shape[0] > 0 < shape[1]
        if not fits or shape[1] % scales[1] or words[1] not in (packed_width(shape[1], 4), packed_width(shape[1], 8)):
            raise _damaged(name, f"{list(words)} words and {list(scales)} scales do not make {list(shape)}")
        return shape

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def _dense(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def read(self, name: str) -> Stored:
        stem = self._stems.get(name)
        if stem is None:
            return self._source.read(name)
        words, bits, scale, zero = self._grid(name, stem, lambda tensor: tensor)
        codes = unpack(words, bits, self._shapes[name][1])
        order = self._order(stem, codes.shape[1] // scale.shape[1])
        if order is not None or (bits == 8 and zero is not None):  # there is no packed form of these
            group = torch.arange(codes.shape[1]) // (codes.shape[1] // scale.shape[1]) if order is None else order
            values: torch.Tensor = (codes.float() - 2.0 ** (bits - 1)) * scale[:, group]
            return values if zero is None else values + zero[:, group]
        return Int8((codes ^ 0x80).view(torch.int8), scale) if zero is None else Int4(codes, scale, zero)

    def words(self, name: str, bring: Bring) -> Words | None:
        """See `weights.read_on`."""
        stem = self._stems.get(name)
        if stem is None or self._shapes[name][1] % 8 or f"{stem}weight_g_idx" in self._source.shapes():
            return None
        words, bits, scale, zero = self._grid(name, stem, bring)
        if words.shape[1] * 32 != self._shapes[name][1] * bits or (bits == 8 and zero is not None):
            return None
        return Words(words, bits, scale, -128 * scale if zero is None else zero - 8 * scale)

    def _order(self, stem: str, size: int) -> torch.Tensor | None:
        """The group of each input, where those of a group lie apart."""
        name = f"{stem}weight_g_idx"
        if name not in self._source.shapes():
            return None
        order = self._dense(name).long()
        return None if torch.equal(order, torch.arange(len(order)) // size) else order

    def _grid(self, name: str, stem: str, bring: Bring) -> tuple[torch.Tensor, int, torch.Tensor, torch.Tensor | None]:
        """Words, bits, scale [out, groups], and the zero: weight = (code - 2^(bits - 1)) * scale + zero. None: no zero
        points at eight bits."""
        rows, columns = self._shapes[name]
        words = bring(self._dense(f"{stem}weight_packed"))
        scale = bring(self._dense(f"{stem}weight_scale")).float()
        if words.dtype != torch.int32 or not bool(torch.isfinite(scale).all()):
            raise _damaged(name, "its words are no int32, or a scale is not a finite number")
        bits = 4 if words.shape[1] == packed_width(columns, 4) else 8
        point_name = f"{stem}weight_zero_point"
        if point_name in self._source.shapes():
            points = unpack_zero_points(bring(self._dense(point_name)), rows, bits)
            zero = (2.0 ** (bits - 1) - points.float()) * scale
        elif bits == 8:
            return words, bits, scale, None
        else:
            zero = torch.zeros_like(scale)
        if f"{stem}weight_offset" in self._offsets:
            zero = zero + bring(self._offsets[f"{stem}weight_offset"].get_tensor(f"{stem}weight_offset"))
        return words, bits, scale, zero


def _offsets(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("offsets-*.safetensors")):
        try:
            file: Any = safe_open(path, framework="pt")
            found.update(dict.fromkeys(file.keys(), file))
        except (SafetensorError, OSError) as error:
            raise _damaged(path.name, str(error).splitlines()[0]) from None
    return found


def _damaged(name: str, what: str) -> Damaged:
    return Damaged(
        tr("{name} cannot be unpacked: {what}", name=one_line(name), what=one_line(what, 160)),
        hint=tr("the folder is damaged: run `glmchat verify`, or quantise again"),
        code="weights.packed",
    )


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
        shapes = {}
        for name, shape in self._source.shapes().items():
            if name.endswith(_SCALE) and name.removesuffix(_SCALE) in self._packed:
                continue
            shapes[name] = (shape[0], shape[1] * self._columns) if name in self._packed else shape
        return shapes

    def read(self, name: str) -> Stored:
        if name not in self._packed:
            return self._source.read(name)
        stored, scale = self._pair(name)
        return Int8(stored, scale.float()) if self._columns == 1 else _four_bits(stored, scale.float())

    def words(self, name: str, bring: Bring) -> Words | None:
        """See `weights.read_on`."""
        if name not in self._packed:
            return None
        stored, scale = self._pair(name)
        if stored.shape[1] % 4:
            return None
        code, scale = bring(stored).view(torch.uint8), bring(scale).float()[:, None]
        if self._columns == 1:
            return Words.of_bytes(code ^ 0x80, 8, scale, -128 * scale)
        code = code ^ 0x88
        scale = scale.repeat(1, 2 * code.shape[1] // _group(2 * code.shape[1]))
        return Words.of_bytes((code >> 4) | (code << 4), 4, scale, -8 * scale)

    def _pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        stored, scale = self._source.read(name), self._source.read(name + _SCALE)
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
        return stored, scale


def _group(width: int) -> int:
    return next((group for group in _GROUPS if width % group == 0), width)


def _four_bits(stored: torch.Tensor, scale: torch.Tensor) -> Int4:
    """stored int8 [out, in / 2], scale [out] -> codes 0..15 [out, in] with scales per group."""
    code = stored.view(torch.uint8) ^ 0x88  # two's complement -8..7 -> 0..15, both nibbles at once
    q = torch.stack((code >> 4, code & 15), dim=-1).flatten(1)
    width = q.shape[1]
    scales = scale[:, None].repeat(1, width // _group(width))
    return Int4(q, scales, torch.zeros_like(scales))
