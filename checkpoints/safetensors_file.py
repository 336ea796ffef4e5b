"""The header of a safetensors file, read without torch and in one pass that never builds more than it keeps.

The header is JSON of up to 100 MB that a stranger wrote; a general reader of JSON takes seconds and gigabytes for what
no safetensors file holds. Here it is matched against the one form that there is, and what it says of each tensor is
compared with the bytes that are really there, as the format asks: github.com/huggingface/safetensors, README and
safetensors/src/tensor.rs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from glmchat.checkpoints.weight_choice import damaged_weights
from glmchat.core.errors import Damaged
from glmchat.core.files import open_file
from glmchat.core.language import tr
from glmchat.core.text import one_line

_LARGEST_HEADER = 100_000_000  # bytes: the format's own limit
_MOST_TENSORS = 131_072  # the largest mixtures of experts have 100,000, in all their files together
_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

_WORD = rb'"(?:[^"\\\x00-\x1f]++|\\.)*+"'
_BEGIN = re.compile(rb"\s*+\{\s*+")
_METADATA = re.compile(
    rb'"__metadata__"\s*+:\s*+(?:null|\{\s*+(?:%b\s*+:\s*+%b\s*+,?+\s*+)*+\})\s*+([,}])\s*+' % (_WORD, _WORD)
)
_ENTRY = re.compile(rb"(%b)\s*+:\s*+\{([^{}]{1,2000})\}\s*+([,}])\s*+" % _WORD)
_USUAL = re.compile(  # the order in which the format's own library writes
    rb'\s*"dtype"\s*:\s*"(\w{1,12})"\s*,\s*"shape"\s*:\s*\[([\d,\s]*)\]\s*,'
    rb'\s*"data_offsets"\s*:\s*\[\s*(\d{1,19})\s*,\s*(\d{1,19})\s*\]\s*'
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies."""

    dtype: str  # the format's name of it
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int


def read_safetensors(path: Path) -> Mapping[str, StoredTensor]:
    """Name -> tensor, in the order of the header. Raises Damaged. A file that has not changed is not read again."""
    state = path.stat()
    return _read(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=256)
def _read(path: Path, size: int, modified: int) -> Mapping[str, StoredTensor]:
    with open_file(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= size - 8:
            raise damaged_weights(path, tr("it ends too early"))
        if length > _LARGEST_HEADER:
            raise damaged_weights(path, tr("its header is larger than the format allows"))
        header = file.read(length)
    tensors, data = _entries(path, header), 8 + length
    at = data
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
        if tensor.start != at:
            raise damaged_weights(path, tr("its tensors overlap or leave a hole"))
        at = tensor.end
    if at != size:
        raise damaged_weights(path, tr("its tensors take {n} bytes, the file has {size}", n=at, size=size))
    return tensors


def _entries(path: Path, header: bytes) -> dict[str, StoredTensor]:
    if header.count(b"data_offsets") > _MOST_TENSORS:
        raise damaged_weights(path, tr("it names more than {n} tensors", n=f"{_MOST_TENSORS:,}"))
    begin = _BEGIN.match(header)
    if begin is None:
        raise _no_header(path)
    at, last, data = begin.end(), b"", 8 + len(header)
    tensors: dict[str, StoredTensor] = {}
    if header[at : at + 1] == b"}":
        at, last = at + 1, b"}"
    while last != b"}":
        if told := _METADATA.match(header, at):
            at, last = told.end(), told[1]
            continue
        entry = _ENTRY.match(header, at)
        if entry is None:
            raise _no_header(path)
        name = _text(path, entry[1])
        if name in tensors:
            raise damaged_weights(path, tr("{name} stands in it twice", name=one_line(name, 60)))
        tensors[name] = _tensor(path, name, entry[2], data)
        at, last = entry.end(), entry[3]
    if header[at:].strip():
        raise _no_header(path)
    return tensors


def _tensor(path: Path, name: str, inside: bytes, data: int) -> StoredTensor:
    try:
        if usual := _USUAL.fullmatch(inside):
            dtype, start, end = usual[1].decode(), int(usual[3]), int(usual[4])
            shape = [int(extent) for extent in usual[2].split(b",")] if usual[2].strip() else []
        else:
            told = json.loads(b"{" + inside + b"}")
            dtype, shape, (start, end) = told["dtype"], told["shape"], told["data_offsets"]
        numbers = (start, end, *shape)
        if dtype not in _BITS or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError
        if math.prod(shape) * _BITS[dtype] != 8 * (end - start):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        words = tr("{name} has an impossible type, shape or place", name=one_line(name, 60))
        raise damaged_weights(path, words) from None
    return StoredTensor(dtype, tuple(shape), data + start, data + end)


def _text(path: Path, quoted: bytes) -> str:
    try:
        return str(json.loads(quoted)) if b"\\" in quoted else quoted[1:-1].decode()
    except ValueError:
        raise _no_header(path) from None


def _no_header(path: Path) -> Damaged:
    return damaged_weights(path, tr("its header is not a table of tensors"))
