"""The files of an adapter as people have them: a PEFT folder, THUDM's prefix folder, a training output, one file.

Only names and shapes are read here, so a wrong adapter is known before any of its numbers are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from glmchat.checkpoints.lfs_pointer import refuse_pointer
from glmchat.checkpoints.weight_files import checkpoints
from glmchat.core.errors import Damaged, NotInstalled, Usage
from glmchat.core.json_files import read_json
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line
from glmchat.engine.formats.shards import load_bin, open_folder
from glmchat.engine.formats.weights import WeightSource

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
_PEFT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
_MODEL_NAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")
# What a training run leaves beside its weights.
_TRAINING = re.compile(r"(optimizer|scheduler|scaler|rng_state\w*|training_args|\w+_states|global_step\w*)\.\w+")
_LARGEST_UNMAPPED = 2 * 2**30  # files of torch before 1.6 cannot be mapped and are read whole


def open_tensors(path: Path) -> tuple[WeightSource, Path, dict[str, Any]]:
    """The tensors of the adapter at `path`, the file or folder they stand in, and its config ({} if it has none).

    Raises NotInstalled if nothing is there, Damaged, Hostile, or Usage for a folder that holds no adapter or several.
    """
    if not path.exists():
        raise NotInstalled(
            tr("there is no adapter at {path}", path=one_line(str(path))),
            hint="glmchat adapters list",
            code="adapter.no_path",
        )
    if path.is_file():
        beside = path.parent / CONFIG
        named = path.name in _PEFT_NAMES or len(_weight_files(path.parent)) == 1
        return _open_file(path), path, read_json(beside) if named and beside.is_file() else {}
    config = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
    for name in _PEFT_NAMES:
        if (path / name).is_file():
            return _open_file(path / name), path / name, config
    if any((path / name).is_file() for name in _MODEL_NAMES):
        return open_folder(path), path, config
    files = _weight_files(path)
    if len(files) == 1:
        return _open_file(files[0]), files[0], config
    raise _no_adapter(path, files)


def weight_files(path: Path) -> list[Path]:
    """The files that `open_tensors` reads the weights of this adapter from."""
    if path.is_file():
        return [path]
    for name in _PEFT_NAMES:
        if (path / name).is_file():
            return [path / name]
    named = [path / name for name in _MODEL_NAMES if (path / name).is_file()]
    if named and named[0].suffix == ".json":
        table = read_json(named[0]).get("weight_map")
        return [named[0], *sorted({path / str(name) for name in table.values()})] if isinstance(table, dict) else named
    return named[:1] or _weight_files(path)


def _weight_files(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.is_file() and p.suffix in _SUFFIXES and not _TRAINING.fullmatch(p.name)
    )


def _no_adapter(folder: Path, files: list[Path]) -> Usage:
    name = one_line(str(folder))
    if files:
        names = ", ".join(one_line(p.name, 60) for p in files[:4])
        return Usage(
            tr("{name} holds several files of weights: {names}", name=name, names=names),
            hint=tr("name one of them"),
            code="adapter.several",
        )
    if saved := checkpoints(folder):
        return Usage(
            tr("{name} is a training output with {saved}", name=name, saved=", ".join(p.name for p in saved[-4:])),
            hint=tr("name one of them: {saved}", saved=one_line(str(saved[-1]))),
            code="adapter.several",
        )
    return Usage(
        tr("{name} holds no adapter: no weights are there", name=name),
        hint=tr("adapter_model.safetensors, adapter_model.bin, pytorch_model.bin or one .pt file is expected"),
        code="adapter.empty",
    )


def _open_file(path: Path) -> WeightSource:
    refuse_pointer(path)
    if path.suffix == ".safetensors":
        return _Safetensors(path)
    with path.open("rb") as file:
        mapped = file.read(2) == b"PK"
    if not mapped and path.stat().st_size > _LARGEST_UNMAPPED:
        raise Damaged(
            tr(
                "{name} has {st_size} in a format that must be read whole",
                name=one_line(path.name),
                st_size=human_bytes(path.stat().st_size),
            ),
            hint=tr("save it again with torch 1.6 or later, or as safetensors"),
            code="adapter.size",
        )
    return _Torch(path)


class _Safetensors:
    """Names and shapes come from the header without torch, whose import takes longer than a refusal may."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = None
        try:
            header: Any = safe_open(path, framework="np")
            self._shapes = {name: tuple(header.get_slice(name).get_shape()) for name in list(header.keys())}
        except (SafetensorError, OSError) as error:
            raise self._unreadable(error) from None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> torch.Tensor:
        try:
            if self._file is None:
                self._file = safe_open(self._path, framework="pt")
            tensor: torch.Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:  # changed or taken away since its header was read
            raise self._unreadable(error) from None
        return tensor

    def _unreadable(self, error: Exception) -> Damaged:
        return Damaged(
            tr("{name} cannot be read: {error}", name=one_line(self._path.name), error=one_line(str(error), 120)),
            hint=tr("it is cut off or claims more than it holds: fetch it again"),
            code="adapter.damaged",
        )


class _Torch:
    def __init__(self, path: Path) -> None:
        self._tensors = load_bin(path)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]
