"""Writes a safetensors file tensor by tensor, so that no more than one tensor is in memory."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
}
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def file_size(layout: Layout) -> int:
    """Bytes of the file, header included."""
    return len(_header(layout)) + sum(_size(*entry) for entry in layout.values())


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    count = dtype.itemsize
    for length in shape:
        count *= length
    return count


def _header(layout: Layout, metadata: Mapping[str, str] | None = None) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + _size(dtype, shape)
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)  # what is mapped begins on a cache line
    return len(text).to_bytes(8, "little") + text


class SafetensorsWriter:
    """The header is written first, so every tensor must come in the order, dtype and shape of `layout`.

    The file appears under its name when all of it is on the disk: `.incomplete`, fsync, rename.
    """

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".incomplete")
        self._waiting = list(layout.items())
        self._hash = hashlib.sha256()
        self._file = self._partial.open("wb")
        self._put(_header(layout, metadata))

    def _put(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._file.write(data)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor. Raises ValueError if it is not the one whose turn it is."""
        expected, (dtype, shape) = self._waiting.pop(0)
        if (name, tensor.dtype, tuple(tensor.shape)) != (expected, dtype, shape):
            raise ValueError(f"{name} {tensor.dtype} {tuple(tensor.shape)} came, {expected} {dtype} {shape} was due")
        if tensor.numel():
            self._put(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            if self._waiting:
                raise ValueError(f"{self._waiting[0][0]} was not written")
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        """Of the whole file, once everything is written."""
        return self._hash.hexdigest()
