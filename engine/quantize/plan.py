"""What quantising a checkpoint will read, write and cost. Nothing is written; of dense weights only shapes are read."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from glmchat.checkpoints.families import refuse_quantising
from glmchat.checkpoints.fit import stored_bytes
from glmchat.checkpoints.quantised import refuse_unread
from glmchat.checkpoints.readers import Readers, readers_of
from glmchat.checkpoints.recipe import Recipe, is_ours_to_read
from glmchat.core.errors import DoesNotFit, Usage
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line
from glmchat.engine.families import Checkpoint, identify
from glmchat.engine.formats.compressed import packed_width
from glmchat.engine.formats.folder_writer import Layout, file_size
from glmchat.engine.formats.weights import Int4, Int8, WeightSource
from glmchat.engine.loading import match_names, open_weights
from glmchat.engine.quantize.int8 import quantise_int8
from glmchat.engine.quantize.replace import four_bits
from glmchat.engine.quantize.streaming import Announced

SHARD_BYTES = 256 * 2**20  # a kill costs the shard it happens in
_SPARE = 64 * 2**20  # for config, tokenizer and the file system's own needs


# Of a tensor: whether the file holds it as [in, out]; of a matrix that may be packed, its inputs and whether it is
# embedding or head.
_Place: TypeAlias = tuple[bool, tuple[int, bool] | None]


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor: bits 0 is copied as it is, `kept` was quantised by its file and keeps its codes."""

    name: str  # the checkpoint's
    shape: tuple[int, ...]  # [out, in] for a packed matrix
    bits: int
    group: int  # inputs that share a scale; 0: one scale a row
    symmetric: bool
    whole: bool  # its zero points are whole numbers
    kept: bool
    is_end: bool  # embedding or head
    transposed: bool  # the file holds [in, out]
    dtype: str  # of the scales, or of the tensor itself
    bytes_out: int

    @property
    def stem(self) -> str:
        return self.name.removesuffix("weight")

    def layout(self) -> Layout:
        """What is written under which names."""
        if not self.bits:
            return {self.name: (getattr(torch, self.dtype), self.shape)}
        rows, columns = self.shape
        groups = columns // self.group if self.group else 1
        entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            f"{self.stem}weight_packed": (torch.int32, (rows, packed_width(columns, self.bits))),
            f"{self.stem}weight_scale": (getattr(torch, self.dtype), (rows, groups)),
            f"{self.stem}weight_shape": (torch.int64, (2,)),
        }
        if not self.symmetric:
            entries[f"{self.stem}weight_zero_point"] = (torch.int32, (packed_width(rows, 4), groups))
        return entries

    def offsets(self) -> Layout:
        """What a matrix of four bits leaves to the file beside its shard."""
        if self.bits != 4 or self.whole:
            return {}
        groups = self.shape[1] // self.group if self.group else 1
        return {f"{self.stem}weight_offset": (torch.float32, (self.shape[0], groups))}


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """Shown by `--dry-run`, asked before acting, and executed as it is.

    weights: of the checkpoint, open; of weights that arrive, what was announced of them.
    """

    checkpoint: Checkpoint
    weights: WeightSource = field(repr=False)
    out: Path
    recipe: Recipe
    tensors: tuple[TensorPlan, ...]
    shards: tuple[tuple[int, int], ...]  # (first, behind the last) tensor of each file
    bytes_in: int
    bytes_out: int
    bytes_free: int
    seconds: float  # estimated from a short measurement
    readers: Readers  # which other programs read the folder
    dequantize: bool  # how transformers is to read it
    origin: str | None = None  # of weights that arrive file by file: what they are, instead of the files' dates

    @property
    def source(self) -> Path:
        return self.checkpoint.path

    def of_shard(self, number: int) -> tuple[TensorPlan, ...]:
        first, last = self.shards[number]
        return self.tensors[first:last]

    @property
    def label(self) -> str:
        """ "int4-g128", "int4-g32+g64", "int8": the layers' bits, with the group sizes that occur."""
        if self.recipe.bits == 8:
            return "int8"
        groups = sorted({t.group for t in self.tensors if t.bits == 4 and t.group}, reverse=True)
        return "int4-" + "+".join(f"g{group}" for group in groups) if groups else "int4"

    def to_json(self) -> dict[str, Any]:
        """For `--json`: sizes, and how many matrices get which width."""
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            key = "as it is" if not tensor.bits else f"int{tensor.bits}" + (f"-g{tensor.group}" if tensor.group else "")
            counts[key] = counts.get(key, 0) + 1
        return {
            "source": str(self.source),
            "out": str(self.out),
            "quant": self.label,
            "recipe": asdict(self.recipe),
            "tensors": counts,
            "groups": {t.name: t.group for t in self.tensors if t.bits == 4},
            "files": len(self.shards),
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "bytes_free": self.bytes_free,
            "seconds": round(self.seconds, 1),
            "readers": self.readers.to_json(),
        }

    def lines(self, stored: str) -> list[str]:
        """The plan for people. stored: the source's quantisation, "none" for dense weights."""
        widths = ", ".join(f"{count} x {kind}" for kind, count in sorted(self.to_json()["tensors"].items()))
        place = one_line(str(self.out))
        lines = [
            tr(
                "{name} to {quant}: {before} become {after} ({free} free)",
                name=one_line(self.source.name),
                quant=self.label,
                before=human_bytes(self.bytes_in),
                after=human_bytes(self.bytes_out),
                free=human_bytes(self.bytes_free),
            ),
            tr("tensors: {widths}", widths=widths),
            tr("about {minutes} min, into {path}", minutes=f"{self.seconds / 60:.1f}", path=place)
            if self.seconds >= 60
            else tr("less than a minute, into {path}", path=place),
        ]
        if (words := self.readers.words()) is not None:
            lines.append(words)
        if stored != "none" and self.bytes_out > 0.9 * self.bytes_in:
            lines.append(tr("this gains little: the model is already {quant}", quant=one_line(stored)))
        return lines


def plan_quantise(source: Path, out: Path, recipe: Recipe, announced: Announced | None = None) -> QuantizePlan:
    """What `quantiser.execute` would do.

    announced: weights that are not here yet (engine/quantize/streaming.py); `source` then holds everything else.
    Raises Usage if the checkpoint is quantised already or a group size does not divide, DoesNotFit if the disk is too
    small, Damaged if the checkpoint is.
    """
    checkpoint = identify(source)
    refuse_unread(checkpoint.config)
    refuse_quantising(checkpoint.config)
    if is_ours_to_read(checkpoint.config):
        raise Usage(
            tr("{name} is already quantised", name=one_line(source.name)),
            hint=tr("run it as it is, or quantise the model it was made from"),
            code="quant.already",
        )
    weights = open_weights(checkpoint) if announced is None else announced
    names, joined = _matrices(checkpoint, weights)
    inner = [place[0] for _, place in names.values() if place is not None and not place[1]]
    recipe = recipe.settled(checkpoint.spec.family, inner)
    tensors = tuple(_tensors(checkpoint, weights, names, recipe))
    packed = [tensor for tensor in tensors if tensor.bits]
    readers, dequantize = readers_of(
        checkpoint.spec.family,
        {(tensor.bits, tensor.group, tensor.symmetric) for tensor in packed},
        ends=any(tensor.is_end for tensor in packed),
        minima=any(not tensor.whole for tensor in packed),
        joined=joined,
    )
    shards = tuple(_shards(tensors, {} if announced is None else announced.files))
    bytes_out = 0
    for first, last in shards:
        bytes_out += file_size({k: v for t in tensors[first:last] for k, v in t.layout().items()})
        offsets = {k: v for t in tensors[first:last] for k, v in t.offsets().items()}
        bytes_out += file_size(offsets) if offsets else 0
    plan = QuantizePlan(
        checkpoint=checkpoint,
        weights=weights,
        out=out,
        recipe=recipe,
        tensors=tensors,
        shards=shards,
        bytes_in=stored_bytes(checkpoint.path) if announced is None else announced.bytes_in,
        bytes_out=bytes_out,
        bytes_free=shutil.disk_usage(_existing(out)).free,
        seconds=_estimate(tensors, recipe),
        readers=readers,
        dequantize=dequantize,
        origin=None if announced is None else announced.origin,
    )
    if plan.bytes_free < bytes_out + _SPARE - _written(out):
        raise DoesNotFit(
            tr(
                "the quantised copy needs {bytes_out}, but only {bytes_free} are free at {out}",
                bytes_out=human_bytes(bytes_out),
                bytes_free=human_bytes(plan.bytes_free),
                out=one_line(str(_existing(out))),
            ),
            hint=tr("free some space, or choose another place with --out"),
            code="quant.disk",
        )
    return plan


def incomplete(out: Path) -> Path:
    """Where the folder grows until it is whole."""
    return out.with_name(out.name + ".incomplete")


def _matrices(checkpoint: Checkpoint, weights: WeightSource) -> tuple[dict[str, _Place], bool]:
    """Every tensor that is taken along, and whether transformers makes some out of several of them."""
    if checkpoint.family.matrices is not None:
        found = checkpoint.family.matrices(checkpoint, weights.shapes())
        return {name: (name in found.across, found.places.get(name)) for name in weights.shapes()}, found.joined
    places, transposed = checkpoint.spec.matrices(), checkpoint.family.transposed
    table = match_names(weights, checkpoint)
    return {
        name: (transposed is not None and transposed(parameter), places.get(parameter))
        for parameter, name in table.items()
    }, False


def _tensors(
    checkpoint: Checkpoint,
    weights: WeightSource,
    names: Mapping[str, _Place],
    recipe: Recipe,
) -> Iterator[TensorPlan]:
    shapes = weights.shapes()
    for name, (turned, place) in names.items():
        stored = weights.read(name)
        shape = shapes[name][::-1] if turned else shapes[name]
        if isinstance(stored, Int4 | Int8):
            yield _quantised_already(checkpoint, name, shape, stored, recipe, is_end=place is not None and place[1])
            continue
        bits = group = 0
        if place is not None and name.endswith("weight"):
            bits, group = recipe.choose(name.removesuffix(".weight"), *place)
        if bits:
            symmetric = recipe.symmetric or bits == 8
            whole = symmetric or recipe.fast or recipe.portable is not False
            is_end = place is not None and place[1]
            yield _sized(TensorPlan(name, shape, bits, group, symmetric, whole, False, is_end, turned, "float16", 0))
        else:
            dtype = str(stored.dtype).removeprefix("torch.")
            yield _sized(TensorPlan(name, shapes[name], 0, 0, True, True, False, False, turned, dtype, 0))


def _quantised_already(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], stored: Int4 | Int8, recipe: Recipe, *, is_end: bool
) -> TensorPlan:
    bits = 4 if isinstance(stored, Int4) else 8
    if bits != recipe.bits and not is_end:
        raise Usage(
            tr(
                "{name} already has {bits} bits and cannot be converted to {bits2}",
                name=one_line(checkpoint.path.name),
                bits=bits,
                bits2=recipe.bits,
            ),
            hint=tr("quantise the original weights"),
            code="quant.already",
        )
    groups = 1 if stored.scale.dim() == 1 else stored.scale.shape[1]
    group = 0 if groups == 1 else shape[1] // groups
    symmetric = bits == 8 or not bool(stored.zero.any())  # type: ignore[union-attr]
    exact = torch.equal(stored.scale.half().float(), stored.scale)
    whole = isinstance(stored, Int8) or whole_points(stored)[1] is None
    dtype = "float16" if exact else "float32"
    return _sized(TensorPlan(name, shape, bits, group, symmetric, whole, True, is_end, False, dtype, 0))


def whole_points(stored: Int4) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The nearest whole zero points [out, groups], and what they leave; None where they leave nothing."""
    point = (8 - stored.zero / stored.scale.where(stored.scale != 0, 1)).round().clamp(0, 15)
    offset = stored.zero - (8 - point) * stored.scale
    return point.byte(), offset if bool(offset.any()) else None


def _sized(tensor: TensorPlan) -> TensorPlan:
    size = file_size(tensor.layout())
    return TensorPlan(**{**asdict(tensor), "shape": tensor.shape, "bytes_out": size})


def shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05}-of-{count:05}.safetensors"


def missing_shards(plan: QuantizePlan) -> list[int]:
    """The files of the growing folder that are not whole yet. All of them, if there is no folder."""
    folder, count = incomplete(plan.out), len(plan.shards)
    return [number for number in range(count) if not (folder / shard_name(number, count)).is_file()]


def files_needed(plan: QuantizePlan, announced: Announced) -> list[str]:
    """The files that a run of this plan would still ask for, in order; those of finished parts are not among them."""
    numbers = missing_shards(plan)
    return list(dict.fromkeys(announced.files[t.name] for n in numbers for t in plan.of_shard(n)))


def _shards(tensors: tuple[TensorPlan, ...], files: Mapping[str, str]) -> Iterator[tuple[int, int]]:
    """files: tensor -> file of weights that arrive; none of ours then needs two of theirs."""
    first = size = 0
    for index, tensor in enumerate(tensors):
        other = index > 0 and files.get(tensor.name) != files.get(tensors[index - 1].name)
        if size and (other or size + tensor.bytes_out > SHARD_BYTES):
            yield first, index
            first, size = index, 0
        size += tensor.bytes_out
    yield first, len(tensors)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _written(out: Path) -> int:
    folder = incomplete(out)
    return sum(p.stat().st_size for p in folder.iterdir() if p.is_file()) if folder.is_dir() else 0


def _estimate(tensors: tuple[TensorPlan, ...], recipe: Recipe) -> float:
    """Seconds, from a tenth of a second of the same work per width."""
    counts: dict[int, int] = {}
    for tensor in tensors:
        if tensor.bits and not tensor.kept:
            counts[tensor.bits] = counts.get(tensor.bits, 0) + tensor.shape[0] * tensor.shape[1]
    sample = torch.randn(128, 4096, generator=torch.Generator().manual_seed(1))
    speeds: Mapping[int, float] = {bits: _speed(sample, bits, recipe) for bits in counts}
    copied = sum(tensor.bytes_out for tensor in tensors)
    return sum(count / speeds[bits] for bits, count in counts.items()) + copied / 300e6


def _speed(sample: torch.Tensor, bits: int, recipe: Recipe) -> float:
    """Weights per second; the first run warms up."""
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        if bits == 4:
            four_bits(recipe, sample, recipe.group or 128)
        else:
            quantise_int8(sample, fast=recipe.fast)
        seconds = time.perf_counter() - started
    return sample.numel() / seconds
