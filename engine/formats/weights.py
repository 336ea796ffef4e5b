"""Where weights come from: one face over GGUF, safetensors and .bin shards, and the quantised forms they keep.

A source gives each tensor as it is stored. Quantised matrices come as `Int4` or `Int8` records and stay what they are;
formats that spread one matrix over several tensors (THUDM's `weight` and `weight_scale`, compressed-tensors) are
sources that wrap another source.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from safetensors import SafetensorError, safe_open

from glmchat.checkpoints.ties import EMBEDDINGS, HEAD, says_tied
from glmchat.checkpoints.torch_file import read_torch_file
from glmchat.checkpoints.weight_files import is_safetensors, refuse_cut, refuse_pointer, weight_files
from glmchat.core.errors import Damaged
from glmchat.core.files import open_file, read_text
from glmchat.core.language import tr
from glmchat.core.text import one_line

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Int4:
    """weight = (q - 8) * scale + zero, in groups along the inputs."""

    q: torch.Tensor  # uint8 [out, in], 0..15
    scale: torch.Tensor  # float32 [out, in / group]
    zero: torch.Tensor  # float32 [out, in / group]

    def dequantise(self) -> torch.Tensor:
        out, width = self.q.shape
        q = self.q.view(out, self.scale.shape[1], -1).float() - 8
        return (q * self.scale[..., None] + self.zero[..., None]).view(out, width)

    def on(self, bring: Bring) -> Int4:
        return Int4(bring(self.q), bring(self.scale), bring(self.zero))

    @property
    def nbytes(self) -> int:
        return self.q.nbytes

    def rows(self, order: torch.Tensor) -> Int4:
        """The same matrix with its rows in another order; groups lie along the inputs, so this is exact."""
        return Int4(self.q[order], self.scale[order], self.zero[order])


@dataclass(frozen=True, slots=True)
class Int8:
    """weight = q * scale; scale per row, or per row and group along the inputs."""

    q: torch.Tensor  # int8 [out, in]
    scale: torch.Tensor  # float32 [out] or [out, in / group]

    def dequantise(self) -> torch.Tensor:
        out, width = self.q.shape
        scale = self.scale.view(out, -1, 1)
        return (self.q.view(out, scale.shape[1], -1).float() * scale).view(out, width)

    def on(self, bring: Bring) -> Int8:
        return Int8(bring(self.q), bring(self.scale))

    @property
    def nbytes(self) -> int:
        return self.q.nbytes

    def rows(self, order: torch.Tensor) -> Int8:
        """The same matrix with its rows in another order."""
        return Int8(self.q[order], self.scale[order])


@dataclass(frozen=True, slots=True)
class Words:
    """A packed matrix as a card multiplies it, which is how compressed-tensors stores it: weight = code * scale + low.

    words int32 [out, in * bits / 32]: eight codes of 4 bits or four of 8, the first one in the lowest bits; scale and
    low float32 [out, groups].
    """

    words: torch.Tensor
    bits: int
    scale: torch.Tensor
    low: torch.Tensor

    @classmethod
    def of_bytes(cls, octets: torch.Tensor, bits: int, scale: torch.Tensor, low: torch.Tensor) -> Words:
        """octets uint8 [out, in * bits / 8], the first code of a byte in its low half."""
        return cls(octets.contiguous().view(torch.int32), bits, scale, low)

    @property
    def nbytes(self) -> int:
        return self.words.nbytes

    def codes(self) -> torch.Tensor:
        """uint8 [out, in]"""
        octets = self.words.view(torch.uint8)
        return octets if self.bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(1)

    def dequantise(self) -> torch.Tensor:
        codes = self.codes()
        values = codes.view(*self.scale.shape, -1).float() * self.scale[..., None] + self.low[..., None]
        return values.view(codes.shape)

    def rows(self, order: torch.Tensor) -> Words:
        """The same matrix with its rows in another order."""
        order = order.to(self.words.device)
        return Words(self.words[order], self.bits, self.scale[order], self.low[order])


Stored: TypeAlias = torch.Tensor | Int4 | Int8
Bring: TypeAlias = Callable[[torch.Tensor], torch.Tensor]  # a tensor of a file to the device where it will be used


class WeightSource(Protocol):
    """Tensors by their checkpoint names."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape as the model sees it (a packed matrix: [out, in])."""
        ...

    def read(self, name: str) -> Stored:
        """One tensor, memory-mapped where the file allows it. Raises Damaged if the file is not what it claims."""
        ...


def read_on(source: WeightSource, name: str, bring: Bring | None, *, upright: bool = True) -> Stored | Words:
    """As `source.read`; with `bring` on another device, where packed matrices become words without the host's help.

    upright: not for a matrix that must be turned, nor for rows that end within a word.
    """
    if bring is None:
        return source.read(name)
    words: Callable[[str, Bring], Words | None] | None = getattr(source, "words", None)
    found = words(name, bring) if words is not None and upright else None
    if found is not None:
        return found
    stored = source.read(name)
    return bring(stored) if isinstance(stored, torch.Tensor) else stored.on(bring)


_EVERY = 64 * 2**20  # bytes read between two sweeps: looking through the maps takes a millisecond


def let_go(paths: Iterable[Path]) -> None:
    """Take the pages of every private map of these files out of this process. Does nothing outside Linux.

    Nothing may have been written to such a map: what was is lost.
    """
    names = {str(path.resolve()) for path in paths}
    for start, end, access, name in _mapped_files():
        if name in names and access.endswith("p"):
            _give_back(start, end)


def let_go_of(stored: Stored) -> None:
    """The same for one tensor that is mapped; one that lies in memory stays: its pages would come back as zeros."""
    if not isinstance(stored, torch.Tensor):
        return
    start, end = stored.data_ptr(), stored.data_ptr() + stored.nbytes
    start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    for first, last, _, _ in _mapped_files() if start < end else ():
        if first <= start < last:
            _give_back(start, min(end, last))


def _mapped_files() -> Iterator[tuple[int, int, str, str]]:
    """First address, the one behind the last, access ("r--p"), and file of every map of a file in this process."""
    with suppress(OSError):
        for line in read_text(Path("/proc/self/maps"), errors="replace").splitlines():
            span, access, _, _, inode, *name = line.split(maxsplit=5)
            if name and inode != "0":
                start, _, end = span.partition("-")
                yield int(start, 16), int(end, 16), access, name[0]


def _give_back(start: int, end: int) -> None:
    advise = _madvise()
    if advise is not None:
        advise(start, end - start, mmap.MADV_DONTNEED)


class Sweep:
    """Lets go of the pages of `paths` each time enough was read from them."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = tuple(paths)
        self._read = 0

    def read(self, size: int) -> None:
        self._read += size
        if self._read >= _EVERY:
            self.now()

    def now(self) -> None:
        self._read = 0
        let_go(self._paths)


def trim() -> None:
    """Give what the C allocator keeps of freed memory back to the system, where it has a function for that (glibc)."""
    function = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if function is not None:
        function(0)


@cache
def _madvise() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def open_folder(folder: Path) -> WeightSource:
    """The weights of a folder; safetensors before .bin. Raises Damaged with each missing shard named, or Hostile."""
    return _open(weight_files(folder))


def open_files(paths: list[Path]) -> WeightSource:
    """Weights in files of one kind. Raises Damaged or Hostile."""
    for path in paths:
        refuse_pointer(path)
        refuse_cut(path)
    return _open(paths)


def _open(paths: list[Path]) -> WeightSource:
    return _Safetensors(paths) if is_safetensors(paths[0]) else _TorchShards(paths)


class _Safetensors:
    """Tensors of safetensors files, memory-mapped."""

    def __init__(self, paths: list[Path]) -> None:
        self._where: dict[str, Any] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            try:
                file: Any = safe_open(path, framework="pt")
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    self._shapes[name] = tuple(file.get_slice(name).get_shape())
                    self._where[name] = file
            except (SafetensorError, OSError) as error:
                raise _unreadable(path, error) from None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> Stored:
        tensor: torch.Tensor = self._where[name].get_tensor(name)
        return tensor


class _TorchShards:
    """Tensors of `torch.save` files, read by torch's restricted reader: no code of the file runs."""

    def __init__(self, paths: list[Path]) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, Path] = {}
        self._open: Path | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        for path in paths:
            for name, tensor in self._shard(path).items():
                self._shapes[name] = tuple(tensor.shape)
                self._where[name] = path

    def _shard(self, path: Path) -> dict[str, torch.Tensor]:
        """Only one shard stays mapped by us; what was read of the others lives as long as its reader keeps it."""
        if self._open != path:
            self._tensors = {}
            self._tensors, self._open = load_bin(path), path
        return self._tensors

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> Stored:
        return self._shard(self._where[name])[name]


def load_bin(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one `torch.save` file, memory-mapped. Raises Damaged, or Hostile if it wants to run code.

    torch carries out what was looked through before (checkpoints/torch_file.py), and by its restricted reader.
    """
    read_torch_file(path)
    try:
        with warnings.catch_warnings(action="ignore"):
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # noqa: BLE001 - what torch raises for a damaged file is whatever it stumbled over
        raise _unreadable(path, error) from None
    return {name: value for name, value in data.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}


def _is_zip(path: Path) -> bool:
    """Files of torch before 1.6 are no zip archives and cannot be mapped."""
    with open_file(path) as file:
        return file.read(2) == b"PK"


def _unreadable(path: Path, error: Exception) -> Damaged:
    return Damaged(
        tr(
            "{name} cannot be read: {error}",
            name=one_line(path.name),
            error=one_line(str(error).splitlines()[0] if str(error) else "", 160),
        ),
        hint=tr("the download was interrupted, or the disk damaged it: run `glmchat verify`, or pull it again"),
        code="weights.damaged",
    )


def with_own_head_of_bin(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `checkpoints/ties.py` does for safetensors, for weights that only torch reads."""
    if not says_tied(config) or not any(folder.glob("pytorch_model*.bin")):
        return config
    try:
        files = weight_files(folder)
    except Damaged:
        return config  # weights that are still to come, or a folder that is refused when they are opened
    if is_safetensors(files[0]) or not any(HEAD in read_torch_file(path) for path in files):
        return config
    source = open_files(files)
    head, embedding = (next((n for n in names if n in source.shapes()), None) for names in ((HEAD,), EMBEDDINGS))
    if head is None or embedding is None:
        return config
    one, other = source.read(head), source.read(embedding)
    assert isinstance(one, torch.Tensor)
    assert isinstance(other, torch.Tensor)
    return config if torch.equal(one, other) else {**config, "tie_word_embeddings": False}
