"""Quantises a checkpoint on disk, tensor by tensor, into a folder that stands on its own.

The folder grows beside its place as NAME.incomplete, one weight file after the other; each appears when it is whole. A
run that was killed goes on with the first file that is missing. At the end the folder is renamed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from glmchat.checkpoints.recipe import Recipe
from glmchat.core import locations
from glmchat.core.errors import DoesNotFit, Failed, Interrupted, Usage
from glmchat.core.files import read_text, sync
from glmchat.core.fingerprints import sha256_of
from glmchat.core.json_files import small_json
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.formats.compressed import describe, pack, pack_zero_points
from glmchat.engine.formats.folder_writer import SafetensorsWriter, write_companions
from glmchat.engine.formats.weights import Int4, Int8, Stored, WeightSource, let_go_of
from glmchat.engine.quantize.int4 import Codes4, maker_on, search_device
from glmchat.engine.quantize.int8 import quantise_int8
from glmchat.engine.quantize.plan import QuantizePlan, TensorPlan, incomplete, plan_quantise, shard_name, whole_points
from glmchat.engine.quantize.replace import four_bits, not_finite
from glmchat.engine.quantize.streaming import Arriving

_NOTE = "plan.json"  # in the growing folder: which plan its files belong to
MANIFEST = "glmchat.json"


@dataclass(frozen=True, slots=True)
class QuantizeProgress:
    """Weights done and in all, and the tensor being worked on."""

    done: int
    total: int
    name: str


def execute(
    plan: QuantizePlan,
    *,
    weights: Arriving | None = None,
    manifest: Mapping[str, Any] | None = None,
    on_progress: Callable[[QuantizeProgress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    device: str | None = None,
) -> Path:
    """Do what `plan` says and return the finished folder.

    weights: where they come from, if they are not in the plan's source. device: where scales are searched; None takes a
    card where there is one. It may settle ties otherwise than the CPU does, so the manifest's settings name it.
    manifest: what the store wants to know of it (name, base, repo, revision); files, hashes and settings are added and
    the whole stands in glmchat.json. Raises Usage if the place is taken, Damaged for NaN, infinity or a broken file,
    DoesNotFit if the disk fills up, Interrupted if cancelled; what is done so far is then kept for the next run.
    """
    if plan.out.exists():
        raise Usage(
            tr("{out} already exists", out=one_line(str(plan.out))),
            hint=tr("remove it first, or choose another place with --out"),
            code="quant.exists",
        )
    folder = incomplete(plan.out)
    report = on_progress or (lambda progress: None)
    device = search_device() if device is None else device
    maker = maker_on(device)
    try:
        _prepare(folder, plan, maker)
        source = plan.weights if weights is None else weights
        hashes = _write_shards(plan, folder, source, report, cancelled or (lambda: False), device)
        if weights is not None:
            weights.close()
        _finish(plan, folder, hashes, dict(manifest or {}), maker)
        folder.replace(plan.out)
        sync(plan.out.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DoesNotFit(
                tr("the disk is full: {folder}", folder=one_line(str(folder))),
                hint=tr("free some space and run the same command again: what is done is kept"),
                code="quant.disk",
            ) from None
        raise Failed(
            tr("{folder} cannot be written: {strerror}", folder=one_line(str(folder)), strerror=error.strerror),
            hint=tr("choose another place with --out"),
            code="quant.write",
        ) from None
    finally:
        if folder.is_dir() and [path.name for path in folder.iterdir()] == [_NOTE]:  # nothing to go on with
            shutil.rmtree(folder)
    return plan.out


def _prepare(folder: Path, plan: QuantizePlan, maker: str | None) -> None:
    """An empty folder, or one that an earlier run of the same plan left."""
    note = _fingerprint(plan, maker)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = folder / _NOTE
    if not file.is_file() or read_text(file, errors="replace") != note:
        for path in folder.iterdir():
            path.unlink()
        file.write_text(note, encoding="utf-8")


def _fingerprint(plan: QuantizePlan, maker: str | None) -> str:
    """Of what decides the bytes: settings, tensors, and the source files' sizes and times."""
    files: Any = plan.origin
    if plan.origin is None:
        source = [plan.source] if plan.source.is_file() else sorted(plan.source.iterdir())
        files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in source if p.is_file()]
    data = [asdict(plan.recipe), [asdict(t) for t in plan.tensors], plan.shards, files, *([maker] if maker else [])]
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def _write_shards(
    plan: QuantizePlan,
    folder: Path,
    weights: WeightSource,
    report: Callable[[QuantizeProgress], None],
    cancelled: Callable[[], bool],
    device: str,
) -> dict[str, str]:
    """Write what is missing. Returns the hashes of the files written now; the others are hashed at the end."""
    total = sum(_count(tensor) for tensor in plan.tensors)
    done = 0
    hashes = {}
    for number in range(len(plan.shards)):
        tensors = plan.of_shard(number)
        name = shard_name(number, len(plan.shards))
        if (folder / name).is_file():
            done += sum(_count(tensor) for tensor in tensors)
            continue
        if isinstance(weights, Arriving):
            tensors = tuple(_as_stored(tensor, weights) for tensor in tensors)
        offsets: dict[str, torch.Tensor] = {}
        layout = {entry: what for tensor in tensors for entry, what in tensor.layout().items()}
        with SafetensorsWriter(folder / name, layout) as writer:
            for tensor in tensors:
                if cancelled():
                    raise Interrupted("stopped", hint=tr("run the same command again to resume"), code="quant.stopped")
                report(QuantizeProgress(done, total, tensor.name))
                _write(writer, tensor, weights, plan, offsets, device)
                done += _count(tensor)
            if offsets:  # in place before the weight file: a file that is there is never done again
                save_file(offsets, folder / f"offsets-{number + 1:05}.safetensors")
        hashes[name] = writer.sha256
    report(QuantizeProgress(total, total, ""))
    return hashes


def _as_stored(tensor: TensorPlan, weights: Arriving) -> TensorPlan:
    """The same plan with the type that the file really has; config.json names one for all tensors."""
    stored = None if tensor.bits else weights.read(tensor.name)
    if not isinstance(stored, torch.Tensor):
        return tensor
    return replace(tensor, dtype=str(stored.dtype).removeprefix("torch."))


def _write(
    writer: SafetensorsWriter,
    tensor: TensorPlan,
    weights: WeightSource,
    plan: QuantizePlan,
    offsets: dict[str, torch.Tensor],
    device: str,
) -> None:
    """A function of its own, so that nothing of a tensor outlives it: the file it is mapped from may be taken away."""
    stored = weights.read(tensor.name)
    try:
        entries = _packed(tensor, stored, plan, offsets, device)
    except torch.OutOfMemoryError:  # of a card that others use too; one matrix is no reason to stop
        entries = _packed(tensor, stored, plan, offsets, "cpu")
    for entry, value in entries.items():
        writer.write(entry, value.cpu())
    let_go_of(stored)  # a mapping of the whole model would otherwise count as our memory


def _count(tensor: TensorPlan) -> int:
    count = 1
    for length in tensor.shape:
        count *= length
    return count


def _packed(
    tensor: TensorPlan, stored: Stored, plan: QuantizePlan, offsets: dict[str, torch.Tensor], device: str
) -> dict[str, torch.Tensor]:
    """The tensors of `tensor.layout()`. An offset, where there is one, goes into `offsets`."""
    try:
        if isinstance(stored, torch.Tensor):
            if not tensor.bits:
                if not bool(torch.isfinite(stored).all()):
                    raise ValueError("a number is not finite")
                return {tensor.name: stored}
            stored = (stored.T if tensor.transposed else stored).to(device)
            if tensor.bits == 4:
                return _four(tensor, four_bits(plan.recipe, stored, tensor.group), offsets)
            eight = quantise_int8(stored, fast=plan.recipe.fast)
            return _eight(tensor, Int8(eight.q, eight.scale))
        if not bool(torch.isfinite(stored.scale).all()):
            raise ValueError("a scale is not a finite number")
    except ValueError as error:
        raise not_finite(_where(plan.source, tensor.name), error) from None
    return _four(tensor, _codes(stored), offsets) if isinstance(stored, Int4) else _eight(tensor, stored)


def _codes(stored: Int4) -> Codes4:
    """Codes that the file holds already, with the nearest integer zero point and what that leaves over."""
    return Codes4(stored.q, stored.scale, *whole_points(stored))


def _four(tensor: TensorPlan, codes: Codes4, offsets: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    entries = {
        f"{tensor.stem}weight_packed": pack(codes.q, 4),
        f"{tensor.stem}weight_scale": codes.scale.to(getattr(torch, tensor.dtype)),
        f"{tensor.stem}weight_shape": torch.tensor(codes.q.shape),
    }
    if not tensor.symmetric:
        entries[f"{tensor.stem}weight_zero_point"] = pack_zero_points(codes.zero_point)
    if codes.offset is not None:
        offsets[f"{tensor.stem}weight_offset"] = codes.offset.cpu()
    return entries


def _eight(tensor: TensorPlan, stored: Int8) -> dict[str, torch.Tensor]:
    scale = stored.scale.view(tensor.shape[0], -1)
    return {
        f"{tensor.stem}weight_packed": pack(stored.q.view(torch.uint8) ^ 0x80, 8),
        f"{tensor.stem}weight_scale": scale.to(getattr(torch, tensor.dtype)),
        f"{tensor.stem}weight_shape": torch.tensor(stored.q.shape),
    }


def _where(source: Path, name: str) -> str:
    """The tensor, and the shard it stands in if an index says."""
    for index in sorted(source.glob("*.index.json")) if source.is_dir() else []:
        table = small_json(index).get("weight_map")
        if isinstance(table, Mapping) and isinstance(table.get(name), str):
            return f"{name} in {table[name]}"
    return name


def _finish(
    plan: QuantizePlan, folder: Path, hashes: dict[str, str], manifest: dict[str, Any], maker: str | None
) -> None:
    names = [shard_name(number, len(plan.shards)) for number in range(len(plan.shards))]
    table = {
        entry: name
        for number, name in enumerate(names)
        for tensor in plan.of_shard(number)
        for entry in tensor.layout()
    }
    index = {"metadata": {"total_size": sum((folder / name).stat().st_size for name in names)}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    write_companions(plan.checkpoint, folder, _description(plan))
    (folder / _NOTE).unlink()
    files = []
    for path in sorted(p for p in folder.iterdir() if p.name != MANIFEST):
        sha = hashes.get(path.name) or sha256_of(path)
        files.append({"path": path.name, "size": path.stat().st_size, "sha256": sha})
        sync(path)
    manifest = {
        "format": 1,
        "kind": "quantized",
        "source": "made",
        "quant": plan.label,
        "family": plan.checkpoint.spec.family,
        "name": plan.out.name,
        "complete": True,
        **manifest,
        "root": str(plan.out),
        **({"readers": plan.readers.to_json()} if plan.readers.reasons else {}),
        "settings": asdict(plan.recipe) | ({"maker": maker} if maker else {}),
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, indent=1), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def _description(plan: QuantizePlan) -> dict[str, Any]:
    schemes: dict[tuple[int, int, bool], list[str]] = {}
    dense = []
    for tensor in plan.tensors:
        module = tensor.name.removesuffix(".weight")
        if tensor.bits:
            schemes.setdefault((tensor.bits, tensor.group, tensor.symmetric), []).append(module)
        elif len(tensor.shape) == 2:
            dense.append(module)
    return describe(schemes, dense, dequantize=plan.dequantize)


Report = Callable[[str, float], None]


def kept_copy(source: Path, bits: int, out: Path, manifest: Mapping[str, Any], report: Report) -> Path:
    """The folder `out`, quantised now if it is not there. report("quantize", 0..1) while that takes its time.

    Two processes that want the same copy make it once: the second waits. Raises what planning and quantising raise.
    """
    locations.private_dir(locations.data_dir())
    locations.private_dir(out.parent)
    with _only_one(out.with_name(f".{out.name}.lock")):
        if not out.exists():
            report("quantize", 0.0)
            try:
                plan = plan_quantise(source, out, Recipe(bits))
                execute(plan, manifest=manifest, on_progress=lambda p: report("quantize", p.done / max(p.total, 1)))
            except DoesNotFit as error:
                hint = "make room, or add --no-keep to quantise in memory only"
                raise DoesNotFit(error.message, hint=hint, code=error.code) from None
    return out


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    number = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)
