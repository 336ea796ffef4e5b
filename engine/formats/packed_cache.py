"""Packed weights in the kernel's own layout, kept on disk and memory-mapped: the second load unpacks nothing.

One file per checkpoint under `core.locations.packed_dir()`, never in a hub's snapshot; it may be deleted at any time.
Its name comes from the content of the weight files as far as that is known without reading them: the sha256 in
glmchat.json or in the name of a hub's blob, else size, time and inode. Processes share the mapped pages.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from glmchat.checkpoints.weight_files import weight_paths
from glmchat.core import locations
from glmchat.core.errors import Failed
from glmchat.core.json_files import small_json
from glmchat.engine.families import Checkpoint
from glmchat.engine.formats.folder_writer import MappedWriter
from glmchat.engine.native.cpu import LAYOUT, fits
from glmchat.engine.quantize.kernels import Shape, choose
from glmchat.engine.quantize.linear import QuantLinear

log = logging.getLogger("glmchat.engine")

FORMAT = 2  # of this file, and of how checkpoints become matrices
_KINDS = (".safetensors", ".bin", ".gguf")
_SMALLEST = 32 * 2**20  # below this unpacking is as fast as opening another file
_OLD = 60 * 86400  # seconds after its last use at which a file is removed
_TENSORS = ("codes", "scales")  # their sizes are multiples of a cache line


class PackedCache:
    """The packed matrices of one checkpoint, by parameter name.

    expected: bytes that they will take, roughly.
    """

    def __init__(self, path: Path, expected: int) -> None:
        self._path = path
        self._expected = expected
        self._shapes: dict[str, list[Any]] = {}  # parameter -> out, in, bits, group, unit
        self._written: dict[str, list[Any]] = {}
        self._file: Any = None
        self._waiting: list[tuple[str, QuantLinear]] = []  # packed now, and together not yet worth a file
        self._writer: MappedWriter | None = None
        self._writes = True
        if path.is_file():
            try:
                self._file = safe_open(path, framework="pt")
                self._shapes = json.loads(self._file.metadata()["shapes"])
                self._writes = False
                os.utime(path)
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                log.warning("the packed weights in %s cannot be used and are made anew: %s", path, error)
                self._file, self._shapes, self._writes = None, {}, True

    def take(self, parameter: str) -> QuantLinear | None:
        """The layer whose weights are cached under this name; its tensors are views of the file."""
        if parameter not in self._shapes:
            return None
        try:
            *measures, unit = self._shapes[parameter]
            shape = Shape(*measures)
            packed = {name: self._file.get_tensor(f"{parameter}.{name}") for name in _TENSORS}
            packed["unit"] = torch.tensor(float(unit))
            if not fits(shape, packed):  # the kernel trusts its sizes
                raise ValueError(f"{parameter} has the wrong size")
        except (SafetensorError, TypeError, ValueError) as error:
            log.warning("the packed weights in %s cannot be used and are made anew: %s", self._path, error)
            self._shapes = {}
            self._path.unlink(missing_ok=True)  # the next load writes all of it again
            return None
        return QuantLinear(shape, choose(shape), packed)

    def add(self, parameter: str, linear: QuantLinear) -> None:
        """Write a layer that was packed now. From then on it lies in the file, mapped, and no longer in memory.

        Nothing is written where all of it is not worth a file or the disk has not the room; failing only costs that.
        """
        if not self._writes or set(linear.packed) != {*_TENSORS, "unit"}:
            return
        self._waiting.append((parameter, linear))
        if self._writer is None and sum(waiting.nbytes for _, waiting in self._waiting) < _SMALLEST:
            return
        try:
            if self._writer is None:
                self._writer = self._begin()
            while self._waiting and self._writer is not None:
                self._write(self._writer, *self._waiting[0])
                self._waiting.pop(0)
        except (OSError, ValueError, Failed) as error:
            self._give_up(error)

    def _write(self, writer: MappedWriter, parameter: str, linear: QuantLinear) -> None:
        """Put a layer's tensors into the file, from which it then works."""
        packed, shape = linear.packed, linear.shape
        views = writer.write({f"{parameter}.{name}": packed[name] for name in _TENSORS})
        linear.hold({**{name: views[f"{parameter}.{name}"] for name in _TENSORS}, "unit": packed["unit"]})
        measures = shape.out_features, shape.in_features, shape.bits, shape.group
        self._written[parameter] = [*measures, float(packed["unit"])]

    def save(self) -> None:
        """Give the file its name, if there is one."""
        if self._writer is not None:
            try:
                self._writer.finish(self._path, {"shapes": json.dumps(self._written)})
            except OSError as error:
                self._give_up(error)
        self._waiting.clear()

    def _begin(self) -> MappedWriter | None:
        locations.private_dir(locations.cache_dir())
        locations.private_dir(self._path.parent)
        _remove_old(self._path.parent)
        if shutil.disk_usage(self._path.parent).free < 2 * self._expected:
            log.info("no room to keep %d bytes of packed weights", self._expected)
            self._writes = False
            self._waiting.clear()
            return None
        return MappedWriter(
            self._path.with_name(f"{self._path.name}.{os.getpid()}.incomplete"), max(2 * self._expected, 2 * _SMALLEST)
        )

    def _give_up(self, error: Exception) -> None:
        """Layers that lie in the file keep it, nameless, for as long as they live."""
        log.warning("packed weights are not kept: %s", error)
        if self._writer is not None:
            self._writer.path.unlink(missing_ok=True)
        self._writer, self._writes = None, False
        self._waiting.clear()


def open_cache(checkpoint: Checkpoint) -> PackedCache | None:
    """The cache of a checkpoint, empty on its first load. None where the kernel has no layout of its own."""
    probe = choose(Shape(64, 64, 4, 64))
    if not probe.name.startswith("native"):
        return None
    files = weight_files_of(checkpoint.path)
    words = [FORMAT, LAYOUT, checkpoint.family.name, *weights_state(checkpoint.path)]
    key = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:32]
    return PackedCache(locations.packed_dir() / f"{key}.safetensors", sum(file.stat().st_size for file in files))


def weight_files_of(path: Path) -> list[Path]:
    """The files of a checkpoint that hold tensors."""
    return (
        weight_paths(path)
        if path.is_file()
        else sorted(p for p in path.iterdir() if p.suffix in _KINDS and p.is_file())
    )


def weights_state(path: Path) -> list[list[Any]]:
    """What is known of the content of these files without reading them; another content has another state."""
    recorded = _recorded(path) if path.is_dir() else {}
    return [_identity(file, recorded) for file in weight_files_of(path)]


def _identity(file: Path, recorded: dict[str, tuple[int, str]]) -> list[Any]:
    status = file.stat()
    size, sha = recorded.get(file.name, (-1, ""))
    if size == status.st_size and sha:
        return [file.name, size, sha, status.st_mtime_ns]
    if file.is_symlink():  # a hub's snapshot: the blob is named by its hash
        return [file.name, status.st_size, file.resolve().name, status.st_mtime_ns]
    return [file.name, status.st_size, status.st_mtime_ns, status.st_ino]


def _recorded(folder: Path) -> dict[str, tuple[int, str]]:
    """Name -> (size, sha256) from the folder's own glmchat.json."""
    try:
        files = small_json(folder / "glmchat.json")["files"]
        return {str(f["path"]): (int(f["size"]), str(f["sha256"] or "")) for f in files}
    except (ValueError, KeyError, TypeError):
        return {}


def _remove_old(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        if time.time() - path.stat().st_mtime > (3600 if path.name.endswith(".incomplete") else _OLD):
            path.unlink(missing_ok=True)
