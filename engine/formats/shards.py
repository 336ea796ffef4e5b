"""Weights of a Hugging Face folder: safetensors or .bin, in one file or in shards with an index."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from glmchat.checkpoints.lfs_pointer import refuse_pointer
from glmchat.checkpoints.weight_files import refuse_cut, weight_files
from glmchat.core.errors import Damaged, Hostile
from glmchat.core.language import tr
from glmchat.core.text import one_line

if TYPE_CHECKING:
    import torch

    from glmchat.engine.formats.weights import Stored, WeightSource


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
    return _Safetensors(paths) if paths[0].suffix == ".safetensors" else _TorchShards(paths)


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
    """The tensors of one `torch.save` file, memory-mapped. Raises Damaged, or Hostile if it wants to run code."""
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # what torch warns of in a hostile file is refused below
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except UnpicklingError as error:
        text = str(error)
        if any(sign in text.lower() for sign in ("unsupported global", "unsupported operand", "unpickler error")):
            wanted = re.search(r"GLOBAL ([\w.]{1,100})", text)
            what = f"it asks for {wanted[1]}" if wanted else "it is no plain table of them"
            raise Hostile(
                tr("{name} contains more than tensors: {what}", name=one_line(path.name), what=what),
                hint=tr("the code was not run. Do not use this model, or use its safetensors version"),
                code="weights.pickle",
            ) from None
        raise _unreadable(path, error) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(data, dict):
        raise Damaged(
            tr("{name} contains no table of tensors", name=one_line(path.name)),
            hint=tr("it is not a checkpoint"),
            code="weights.kind",
        )
    return {name: value for name, value in data.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}


def _is_zip(path: Path) -> bool:
    """Files of torch before 1.6 are no zip archives and cannot be mapped."""
    with path.open("rb") as file:
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
