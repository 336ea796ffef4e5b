"""A model with new numbers as a folder in the base's own names and layout, which everybody opens who opened the base.

What reading renames and turns (`engine/loading.py`) is undone tensor by tensor, so that a folder of any size is written
with one tensor more in memory than the model has.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from glmchat.core.errors import Failed
from glmchat.core.files import read_file
from glmchat.core.json_files import read_json
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.families import Checkpoint
from glmchat.engine.formats.folder_writer import Layout, SafetensorsWriter, write_companions
from glmchat.engine.formats.weights import WeightSource
from glmchat.engine.loading import load_model, match_names, open_weights
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.models.transformers_model import Fallback

_SHARD_BYTES = 2 * 2**30


def stored_type(checkpoint: Checkpoint) -> torch.dtype:
    """Of the base's weights as they lie in its files, and of the result's."""
    source = open_weights(checkpoint)
    read = (source.read(name) for name in source.shapes())
    return next((t.dtype for t in read if isinstance(t, torch.Tensor) and t.is_floating_point()), torch.float32)


def write_model(checkpoint: Checkpoint, model: LanguageModel, folder: Path) -> None:
    """Weights, configuration, tokenizer and template into a folder that is there; each tensor in the type that the
    base's file has it in. Raises Failed for a number that the type cannot hold."""
    if isinstance(model, Fallback):
        _write_by_transformers(checkpoint, model, folder)
        return
    source = open_weights(checkpoint)
    places = _places(checkpoint, source)
    shards = list(_shards(source, places))
    table: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        layout: Layout = {name: (_read(source, name).dtype, tuple(_read(source, name).shape)) for name in names}
        with SafetensorsWriter(folder / file, layout) as writer:
            for name in names:
                writer.write(name, _value(model, source, name, places.get(name)))
                table[name] = file
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(p.stat().st_size for p in folder.iterdir())}, "weight_map": table}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    write_companions(checkpoint, folder, {})
    _without_packing(folder / "config.json")


def _places(checkpoint: Checkpoint, source: WeightSource) -> dict[str, tuple[str, bool]]:
    """Stored name -> (parameter, whether the file has it as [in, out]). A tied head that is stored is the embedding."""
    table = match_names(source, checkpoint)
    turned, upright = checkpoint.family.transposed, getattr(source, "upright", ())
    places = {
        name: (parameter, turned is not None and turned(parameter) and name not in upright)
        for parameter, name in table.items()
    }
    ignored, ends = checkpoint.spec.extra.get("ignored", ()), checkpoint.spec.ends()
    for name in source.shapes():
        if name not in places and checkpoint.family.rename(name) in ignored:
            places[name] = (ends[0], False)
    return places


def _shards(source: WeightSource, places: Mapping[str, tuple[str, bool]]) -> Iterator[list[str]]:
    """The names in the order of the base's files. Masks and the like, which are no numbers that learn, are computed by
    every reader; other buffers stay as they were."""
    shard: list[str] = []
    size = 0
    for name in source.shapes():
        stored = _read(source, name)
        if name not in places and not stored.is_floating_point():
            continue
        if shard and size + stored.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += stored.nbytes
    yield shard


def _read(source: WeightSource, name: str) -> torch.Tensor:
    """As it lies in the file: a base that is packed was refused."""
    return cast(torch.Tensor, source.read(name))


def _value(model: LanguageModel, source: WeightSource, name: str, place: tuple[str, bool] | None) -> torch.Tensor:
    stored = _read(source, name)
    if place is None:
        return stored
    parameter, turned = place
    value = model.get_parameter(parameter).detach()
    value = (value.t() if turned else value).to("cpu", stored.dtype).contiguous()
    return _finite(name, value)


def _finite(name: str, value: torch.Tensor) -> torch.Tensor:
    if not bool(value.isfinite().all()):
        raise Failed(
            tr(
                "{name} holds a number that {dtype} cannot hold",
                name=one_line(name, 120),
                dtype=str(value.dtype).removeprefix("torch."),
            ),
            hint=tr("take an earlier checkpoint, and a lower learning rate"),
            code="tune.not_finite",
        )
    return value


def _write_by_transformers(checkpoint: Checkpoint, model: Fallback, folder: Path) -> None:
    """Its own names in memory are not always those of its files, and it knows both."""
    inner: Any = model.inner
    dtype = stored_type(checkpoint)
    state = {name: _finite(name, value.detach().to("cpu", dtype)) for name, value in inner.state_dict().items()}
    write_companions(checkpoint, folder, {})
    config = read_file(folder / "config.json")
    inner.save_pretrained(folder, state_dict=state)
    (folder / "config.json").write_bytes(config)
    _without_packing(folder / "config.json")


def _without_packing(path: Path) -> None:
    config = read_json(path)
    config.pop("quantization_config", None)
    path.write_text(json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8")


@torch.no_grad()
def moved(checkpoint: Checkpoint, model: LanguageModel, learning: Mapping[str, torch.Tensor]) -> float:
    """The length of what was added to the tensors that learn: sqrt of the sum of |W - W of the base|^2.

    learning: by their names in `model`. The base is mapped from its files, not copied.
    """
    base = load_model(checkpoint, dtype=stored_type(checkpoint))
    total = 0.0
    for name, value in learning.items():
        before = base.get_parameter(name).detach().to(value.device)
        total += float((value.detach().float() - before.float()).double().square().sum())
    return math.sqrt(total)
