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

from safetensors import SafetensorError, safe_open

from glmchat.core import locations
from glmchat.core.errors import Failed
from glmchat.engine.families import Checkpoint
from glmchat.engine.quantize.cpu_native import LAYOUT, fits
from glmchat.engine.quantize.kernels import Shape, choose
from glmchat.engine.quantize.linear import QuantLinear
from glmchat.engine.quantize.safetensors_writer import Layout, SafetensorsWriter

log = logging.getLogger("glmchat.engine")

FORMAT = 1  # of this file, and of how checkpoints become matrices
_KINDS = (".safetensors", ".bin", ".gguf")
_SMALLEST = 32 * 2**20  # below this unpacking is as fast as opening another file
_OLD = 60 * 86400  # seconds after its last use at which a file is removed
_TENSORS = ("codes", "scales", "unit")  # codes first: their sizes are multiples of a cache line


class PackedCache:
    """The packed matrices of one checkpoint, by parameter name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new: dict[str, QuantLinear] = {}
        self._shapes: dict[str, list[int]] = {}
        self._file: Any = None
        if path.is_file():
            try:
                self._file = safe_open(path, framework="pt")
                self._shapes = json.loads(self._file.metadata()["shapes"])
                os.utime(path)
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                log.warning("the packed weights in %s cannot be used and are made anew: %s", path, error)
                self._file, self._shapes = None, {}

    def take(self, parameter: str) -> QuantLinear | None:
        """The layer whose weights are cached under this name; its tensors are views of the file."""
        if parameter not in self._shapes:
            return None
        try:
            shape = Shape(*self._shapes[parameter])
            packed = {name: self._file.get_tensor(f"{parameter}.{name}") for name in _TENSORS}
            if not fits(shape, packed):  # the kernel trusts its sizes
                raise ValueError(f"{parameter} has the wrong size")
        except (SafetensorError, TypeError, ValueError) as error:
            log.warning("the packed weights in %s cannot be used and are made anew: %s", self._path, error)
            self._shapes = {}
            return None
        return QuantLinear(shape, choose(shape), packed)

    def add(self, parameter: str, linear: QuantLinear) -> None:
        """Remember a layer that was packed now; `save` writes it."""
        if set(linear.packed) == set(_TENSORS):
            self._new[parameter] = linear

    def save(self) -> None:
        """Write what was added, if it is worth a file and the disk has twice the room. Failing only costs the cache."""
        size = sum(linear.nbytes for linear in self._new.values())
        if size < _SMALLEST or self._shapes:
            return
        try:
            locations.private_dir(locations.cache_dir())
            locations.private_dir(self._path.parent)
            _remove_old(self._path.parent)
            if shutil.disk_usage(self._path.parent).free < 2 * size:
                log.info("no room to keep %d bytes of packed weights", size)
                return
            self._write()
        except (OSError, Failed) as error:
            log.warning("packed weights are not kept: %s", error)

    def _write(self) -> None:
        entries = {f"{p}.{name}": linear.packed[name] for name in _TENSORS for p, linear in self._new.items()}
        layout: Layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in entries.items()}
        measures = ((parameter, linear.shape) for parameter, linear in self._new.items())
        shapes = {parameter: [s.out_features, s.in_features, s.bits, s.group] for parameter, s in measures}
        with SafetensorsWriter(self._path, layout, {"shapes": json.dumps(shapes)}) as writer:
            for name, tensor in entries.items():
                writer.write(name, tensor)


def open_cache(checkpoint: Checkpoint) -> PackedCache | None:
    """The cache of a checkpoint, empty on its first load. None where the kernel has no layout of its own."""
    probe = choose(Shape(64, 64, 4, 64))
    if not probe.name.startswith("native"):
        return None
    path = checkpoint.path
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in _KINDS and p.is_file())
    recorded = _recorded(path) if path.is_dir() else {}
    words = [FORMAT, LAYOUT, checkpoint.family.name, *(_identity(file, recorded) for file in files)]
    key = hashlib.sha256(json.dumps(words).encode()).hexdigest()[:32]
    return PackedCache(locations.packed_dir() / f"{key}.safetensors")


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
        data = json.loads((folder / "glmchat.json").read_text(encoding="utf-8"))
        return {str(f["path"]): (int(f["size"]), str(f["sha256"] or "")) for f in data["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _remove_old(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        if time.time() - path.stat().st_mtime > (3600 if path.name.endswith(".incomplete") else _OLD):
            path.unlink(missing_ok=True)
