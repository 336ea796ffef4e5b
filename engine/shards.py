"""Weights of a Hugging Face folder: safetensors or .bin, in one file or in shards with an index."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from glmchat.core.errors import Damaged, Hostile
from glmchat.core.text import human_bytes, one_line
from glmchat.engine.config import read_json
from glmchat.engine.weights import Stored, WeightSource

if TYPE_CHECKING:
    import torch

_POINTER = b"version https://git-lfs.github.com/spec/"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,200}")


def refuse_pointer(path: Path) -> None:
    """Raise Damaged, with the real size, if `path` is a git-lfs pointer instead of what it stands for."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        raise Damaged(
            f"{one_line(path.name)} is empty", hint="pull the model again: the download broke off", code="file.empty"
        )
    if head.startswith(_POINTER):
        size = re.search(rb"\nsize (\d{1,18})", head)
        real = f" for a file of {human_bytes(int(size[1]))}" if size else ""
        raise Damaged(
            f"{one_line(path.name)} is a git-lfs pointer{real}, not the file itself",
            hint=f"fetch it with `glmchat pull --into {one_line(str(path.parent))}`, or `git lfs pull` in the folder",
            code="file.lfs_pointer",
        )


def open_folder(folder: Path, config: Mapping[str, Any]) -> WeightSource:
    """The weights of a folder; safetensors before .bin. Raises Damaged with each missing shard named."""
    for stem, kind in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{kind}.index.json", folder / f"{stem}.{kind}"
        if index.is_file():
            names = shards_of(index)
        elif single.is_file():
            names = [single.name]
        else:
            continue
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise Damaged(
                f"{len(missing)} of {len(names)} weight files are missing: {', '.join(missing)}",
                hint="pull the model again: what is here is kept",
                code="weights.missing_shard",
            )
        for name in names:
            refuse_pointer(folder / name)
        paths = [folder / name for name in names]
        return _Safetensors(paths) if kind == "safetensors" else _TorchShards(paths)
    raise Damaged(
        f"{one_line(str(folder))} holds no weights",
        hint="model.safetensors or pytorch_model.bin, or their shards with an index file, are expected",
        code="weights.none",
    )


def shards_of(index: Path) -> list[str]:
    """The weight files that an index names, sorted. Raises Damaged, or Hostile for a name that is a path."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise Damaged(f"{index.name} has no weight_map", hint="pull the model again", code="weights.index")
    names = sorted({name if isinstance(name, str) else "" for name in table.values()})
    for name in names:
        if not _PLAIN_NAME.fullmatch(name):
            raise Hostile(
                f"{index.name} names the file {one_line(repr(name), 80)}",
                hint="an honest index names files beside it: do not use this model",
                code="weights.path",
            )
    return names


def open_files(paths: list[Path]) -> WeightSource:
    """Weights in files of one kind. Raises Damaged or Hostile."""
    for path in paths:
        refuse_pointer(path)
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
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except UnpicklingError as error:
        text = str(error)
        if any(sign in text.lower() for sign in ("unsupported global", "unsupported operand", "unpickler error")):
            raise Hostile(
                f"{one_line(path.name)} holds more than tensors: {one_line(text.splitlines()[-1], 120)}",
                hint="it was not run. Do not use this model, or take its safetensors version",
                code="weights.pickle",
            ) from None
        raise _unreadable(path, error) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(data, dict):
        raise Damaged(
            f"{one_line(path.name)} holds no table of tensors", hint="it is no checkpoint", code="weights.kind"
        )
    return {name: value for name, value in data.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}


def _is_zip(path: Path) -> bool:
    """Files of torch before 1.6 are no zip archives and cannot be mapped."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _unreadable(path: Path, error: Exception) -> Damaged:
    return Damaged(
        f"{one_line(path.name)} cannot be read: {one_line(str(error).splitlines()[0] if str(error) else '', 160)}",
        hint="the download broke off, or the disk damaged it: `glmchat verify`, or pull it again",
        code="weights.damaged",
    )
