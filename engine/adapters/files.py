"""An adapter with its tensors: safetensors, GGUF, what torch saved, or the shards of a model's folder.

Only names and shapes are read until a tensor is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from glmchat.checkpoints.adapter_check import gguf_shapes
from glmchat.checkpoints.adapter_files import AdapterFacts, find_weights, recognise, shapes_of_safetensors
from glmchat.checkpoints.file_kinds import kind_of_file
from glmchat.checkpoints.gguf_file import adapter_config, adapter_name, open_gguf
from glmchat.checkpoints.weight_files import refuse_pointer
from glmchat.core.errors import Damaged
from glmchat.core.files import open_file
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line
from glmchat.engine.formats.weights import Int4, Int8, load_bin, open_folder

if TYPE_CHECKING:
    import torch

    from glmchat.engine.formats.weights import Stored, WeightSource

_LARGEST_UNMAPPED = 2 * 2**30  # files of torch before 1.6 cannot be mapped and are read whole


@dataclass(frozen=True, slots=True)
class Adapter(AdapterFacts):
    """A recognised adapter with its tensors, of which none has been read yet."""

    tensors: WeightSource = field(repr=False, kw_only=True)


def read_adapter(path: Path, *, alpha: float | None = None, force: bool = False) -> Adapter:
    """Recognise the adapter at `path` (a folder or a file) from its configuration and the names of its tensors.

    alpha: for a raw file that does not say it. Raises NotInstalled, Usage, Damaged or Hostile.
    """
    path = path.expanduser().absolute()
    file, config = find_weights(path)
    tensors = open_folder(file) if file.is_dir() else _open_file(file)
    if isinstance(tensors, _Gguf):
        config = tensors.config
    facts = recognise(path, tensors.shapes(), config, alpha=alpha, force=force)
    return Adapter(**{each.name: getattr(facts, each.name) for each in fields(facts)}, tensors=tensors)


def _open_file(path: Path) -> WeightSource:
    refuse_pointer(path)
    kind = kind_of_file(path)
    if kind == "gguf":
        return _Gguf(path)
    if kind == "safetensors" or path.suffix == ".safetensors":
        return _Safetensors(path)
    with open_file(path) as file:
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
        self._shapes = shapes_of_safetensors(path)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> torch.Tensor:
        try:
            if self._file is None:
                self._file = safe_open(self._path, framework="pt")
            tensor: torch.Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError) as error:  # changed or taken away since its header was read
            raise Damaged(
                tr("{name} cannot be read: {error}", name=one_line(self._path.name), error=one_line(str(error), 120)),
                hint=tr("it is truncated, or claims more than it contains: fetch it again"),
                code="adapter.damaged",
            ) from None
        return tensor


class _Gguf:
    """A LoRA as llama.cpp takes it, under PEFT's names. Rows of queries and keys stay in its order (`paired`)."""

    def __init__(self, path: Path) -> None:
        self._file = open_gguf(path)
        self.config = adapter_config(self._file)
        self.paired = self._file.metadata.get("general.architecture") == "llama"
        self._tensors = {adapter_name(name): tensor for name, tensor in self._file.tensors.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return gguf_shapes(self._file)

    def read(self, name: str) -> Stored:
        from glmchat.engine.formats.gguf import decode

        stored = decode(self._file, self._tensors[name])
        dense = stored.dequantise() if isinstance(stored, Int4 | Int8) else stored
        return dense.t() if ".lora_embedding_A" in name else dense


class _Torch:
    def __init__(self, path: Path) -> None:
        self._tensors = load_bin(path)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]
