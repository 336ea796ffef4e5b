"""Weights that arrive file by file while they are quantised: never more than one file of them is on the disk.

The index names the tensors of every file, and the network of this configuration their shapes; so the plan is made
before the first file is here. `bring` fetches a file when its first tensor is asked for, `drop` takes it away again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from glmchat.checkpoints.weight_files import shards_of
from glmchat.core.errors import Damaged, Usage
from glmchat.core.json_files import read_json
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.families import Checkpoint
from glmchat.engine.formats.weights import Stored, WeightSource, open_files

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def index_of(folder: Path) -> Path | None:
    """The index file of a checkpoint in several files; None if it has none."""
    return next((folder / name for name in _INDEXES if (folder / name).is_file()), None)


class Announced:
    """Every tensor that the index promises, with the shape that the configuration gives it, and no numbers yet.

    origin: what the files are (repository, commit, hashes): a run that was killed goes on only with the very same.
    """

    def __init__(self, checkpoint: Checkpoint, index: Path, origin: str, bytes_in: int) -> None:
        """Raises Damaged or Hostile for a bad index, Usage for weights that are quantised already."""
        if checkpoint.config.get("quantization_bit") or checkpoint.config.get("quantization_config"):
            raise Usage(
                tr("{family}: these weights are already quantised", family=one_line(checkpoint.spec.family)),
                hint=tr("pull them as they are, without --quant"),
                code="quant.already",
            )
        self.origin, self.bytes_in = origin, bytes_in
        files = shards_of(index)
        table = read_json(index)["weight_map"]
        self.files: Mapping[str, str] = dict(sorted(table.items(), key=lambda item: files.index(item[1])))
        self._shapes = _shapes(checkpoint, self.files)
        named = checkpoint.config.get("torch_dtype") or checkpoint.config.get("dtype")
        dtype = getattr(torch, str(named), torch.float16)
        self._dtype = dtype if isinstance(dtype, torch.dtype) else torch.float16

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> Stored:
        """A tensor without numbers."""
        return torch.empty(self._shapes[name], dtype=self._dtype, device="meta")


def _shapes(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """{} where some tensor's is not known before its file is here."""
    if checkpoint.family.matrices is not None:
        names = list(names)
        known = checkpoint.family.matrices(checkpoint, names).shapes
        return {name: known[name] for name in names} if all(name in known for name in names) else {}
    expected = checkpoint.spec.shapes()
    transposed = checkpoint.family.transposed
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        parameter = checkpoint.family.rename(name)
        shape = expected.get(parameter, ()) if parameter is not None else ()
        turned = parameter is not None and transposed is not None and transposed(parameter)
        shapes[name] = shape[::-1] if turned else shape
    return shapes


class Arriving:
    """A `WeightSource` for `quantiser.execute`: files come when they are needed, and go when they are done with."""

    def __init__(self, announced: Announced, bring: Callable[[str], Path], drop: Callable[[str], None]) -> None:
        self._announced = announced
        self._bring, self._drop = bring, drop
        self._name: str | None = None
        self._source: WeightSource | None = None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._announced.shapes()

    def read(self, name: str) -> Stored:
        """Raises what `bring` raises, and Damaged for a file that is not what the index says."""
        file = self._announced.files[name]
        if file != self._name:
            self.close()
            path = self._bring(file)
            self._source, self._name = open_files([path]), file
        assert self._source is not None
        shape = self._source.shapes().get(name)
        if shape is None or shape != self._announced.shapes()[name]:
            raise Damaged(
                tr(
                    "{name} is {shape} in {file} instead of {announced}",
                    name=one_line(name),
                    shape=list(shape) if shape is not None else "missing",
                    file=one_line(file),
                    announced=list(self._announced.shapes()[name]),
                ),
                hint=tr("config.json and the weights belong to different models or revisions"),
                code="weights.names",
            )
        return self._source.read(name)

    def close(self) -> None:
        """Take the open file away; every tensor of it has been written."""
        if self._name is not None:
            self._source = None  # the mapping must be gone before the file is, or its blocks stay taken
            self._drop(self._name)
            self._name = None
