"""A base and an adapter as one checkpoint in the original names, written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import cast

import torch
from torch import nn

from glmchat.checkpoints.adapter_files import TEXT_FILES, brings_text, own_tokenizer
from glmchat.checkpoints.adapter_fit import CHATGLM
from glmchat.checkpoints.adapter_settings import Names
from glmchat.checkpoints.chat_template import FILE, template_of
from glmchat.checkpoints.weight_files import PREFIX_ENCODER
from glmchat.core.errors import Usage
from glmchat.core.files import read_file
from glmchat.core.json_files import read_json
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.adapters.attach import check_against, layers_of, modules_of, outline, tied_ends
from glmchat.engine.adapters.files import Adapter
from glmchat.engine.adapters.lora import read_changes
from glmchat.engine.adapters.low_rank import Change
from glmchat.engine.adapters.words import VOCABULARIES
from glmchat.engine.families import Checkpoint
from glmchat.engine.formats.folder_writer import Layout, SafetensorsWriter, write_companions
from glmchat.engine.formats.weights import WeightSource
from glmchat.engine.loading import match_names, open_weights

SHARD_BYTES = 2 * 2**30
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OnProgress = Callable[[int, int], None]  # tensors done, tensors in all


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of the result: where it comes from and what it is."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    module: str  # the layer it belongs to
    parameter: str  # "weight" or "bias"
    transposed: bool = False
    source: str | None = None  # its name in the base; None: it is the adapter's own


def merge(
    adapter: Adapter,
    base: Path,
    out: Path,
    *,
    quant: int | None = None,
    dtype: str | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Path:
    """Write base and adapter as one model folder at `out` and return it.

    quant: 4 or 8 writes the merged model quantised. dtype: of the result; None keeps each tensor's own, and takes
    float16 for matrices that the base holds packed. Working memory is a few tensors; disk is the merged model, and the
    quantised one beside it while that is made. Raises what attaching raises, Usage if `out` exists, and for prefixes
    on families that have no place for one in their checkpoint.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise Usage(
            tr("dtype is {dtype!r}", dtype=dtype),
            hint=tr("one of {names}", names=", ".join(_DTYPES)),
            code="dtype.unknown",
        )
    if out.exists():
        raise Usage(
            tr("{out} already exists", out=one_line(str(out))), hint=tr("choose another place"), code="merge.exists"
        )
    checkpoint = check_against(adapter, base)
    if adapter.kind != "lora" and adapter.form != "thudm":
        raise Usage(
            tr("virtual tokens cannot be merged into weights"),
            hint=tr("use the adapter as it is, with --adapter"),
            code="merge.prefix",
        )
    growing = out.with_name(out.name + ".merging")  # the quantiser grows NAME.incomplete
    if growing.exists():
        rmtree(growing)
    growing.mkdir(mode=0o700, parents=True)
    try:
        _write(adapter, checkpoint, growing, None if dtype is None else _DTYPES[dtype], on_progress)
        if quant is None:
            growing.replace(out)
        else:
            _quantise(growing, out, quant)
    finally:
        if growing.exists():
            rmtree(growing)
    return out


def _quantise(merged: Path, out: Path, bits: int) -> None:
    from glmchat.checkpoints.recipe import Recipe
    from glmchat.engine.quantize.plan import plan_quantise
    from glmchat.engine.quantize.quantiser import execute

    execute(plan_quantise(merged, out, Recipe(bits)))


def _write(
    adapter: Adapter, checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None, on_progress: OnProgress
) -> None:
    weights = open_weights(checkpoint)
    model = outline(checkpoint)
    modules = modules_of(model)
    ends = tied_ends(model)
    matched = layers_of(adapter, model, checkpoint, modules) if adapter.kind == "lora" else {}
    tensors = list(_tensors(checkpoint, weights, adapter, matched, dtype))
    embedding = next((t for t in tensors if ends and t.module == ends[0]), None)
    untied = embedding is not None and not matched.keys().isdisjoint(ends)
    if embedding is not None and untied:  # what changes the one may leave the other as it is
        head = replace(embedding, name="lm_head.weight", module="lm_head")
        own, other = (_value(end, adapter, matched, modules, weights) for end in (embedding, head))
        untied = not torch.equal(own, other)
        tensors += [head] * untied
    _refuse_lost(matched, {f"{tensor.module}.{tensor.parameter}" for tensor in tensors})
    tensors += [
        _Tensor(name, shape, torch.float32, "", "", source=None)
        for name, shape in (adapter.tensors.shapes().items() if adapter.kind != "lora" else ())
        if name.startswith(PREFIX_ENCODER)
    ]
    shards = list(_shards(tensors))
    table: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        layout: Layout = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard}
        with SafetensorsWriter(folder / file, layout) as writer:
            for tensor in shard:
                writer.write(tensor.name, _value(tensor, adapter, matched, modules, weights))
                table[tensor.name] = file
                done += 1
                on_progress(done, len(tensors))
    size = sum(path.stat().st_size for path in folder.iterdir())
    index = {"metadata": {"total_size": size}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    write_companions(checkpoint, folder, {})
    if checkpoint.spec.family not in CHATGLM:  # whose code writes the prompts
        _write_text(adapter.path, checkpoint.path, folder)
    words = next((shape[0] for shape in _resized(adapter, matched).values()), None)
    _settle_config(folder / "config.json", adapter, untied=untied, dtype=tensors[0].dtype, words=words)


def _refuse_lost(matched: Mapping[str, Names], parameters: set[str]) -> None:
    """Raise Usage for what the adapter adds and the merged model has no place for: a bias of a layer without one."""
    for place, names in matched.items():
        biased = "lora_B.bias" in names.tensors or "bias" in names.replaced
        if biased and f"{place}.bias" not in parameters:
            raise Usage(
                tr("the adapter adds a bias to {place}, which has none in this model", place=one_line(place, 120)),
                hint=tr("use the adapter as it is, with --adapter"),
                code="merge.bias",
            )


def _tensors(
    checkpoint: Checkpoint,
    weights: WeightSource,
    adapter: Adapter,
    matched: Mapping[str, Names],
    dtype: torch.dtype | None,
) -> Iterator[_Tensor]:
    turned = checkpoint.family.transposed
    upright = getattr(weights, "upright", ())
    shapes = {**checkpoint.spec.shapes(), **_resized(adapter, matched)}
    for parameter, name in match_names(weights, checkpoint).items():
        stored = weights.read(name)
        own = stored.dtype if isinstance(stored, torch.Tensor) and stored.is_floating_point() else torch.float16
        module, _, leaf = parameter.rpartition(".")
        lies = turned is not None and turned(parameter)
        shape = shapes[parameter]
        yield _Tensor(
            name, shape[::-1] if lies else shape, dtype or own, module, leaf, lies and name not in upright, name
        )


def _resized(adapter: Adapter, matched: Mapping[str, Names]) -> dict[str, tuple[int, ...]]:
    """Parameter -> its shape, where the adapter has another number of words."""
    shapes = adapter.tensors.shapes()
    ends = [place for place in matched if place.rpartition(".")[2] in VOCABULARIES]
    named = ((place, matched[place].replaced.get("weight")) for place in ends)
    return {f"{place}.weight": shapes[name] for place, name in named if name is not None}


def _shards(tensors: list[_Tensor]) -> Iterator[list[_Tensor]]:
    shard: list[_Tensor] = []
    size = 0
    for tensor in tensors:
        bytes_out = tensor.dtype.itemsize * torch.Size(tensor.shape).numel()
        if shard and size + bytes_out > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += bytes_out
    yield shard


def _value(
    tensor: _Tensor,
    adapter: Adapter,
    matched: Mapping[str, Names],
    modules: Mapping[str, nn.Module],
    weights: WeightSource,
) -> torch.Tensor:
    if not tensor.module:
        stored = adapter.tensors.read(tensor.name)
        assert isinstance(stored, torch.Tensor)
        return stored.float()
    stored = weights.read(cast(str, tensor.source))
    value = stored if isinstance(stored, torch.Tensor) else stored.dequantise()
    names = matched.get(tensor.module)
    if names is None:
        return value.to(tensor.dtype)
    change = dict(read_changes(adapter, {tensor.module: names}, lambda _: "cpu"))[tensor.module]
    value = value.T if tensor.transposed else value
    changed = _changed(value.float(), tensor.parameter, change)
    return (changed.T if tensor.transposed else changed).to(tensor.dtype)


def _changed(value: torch.Tensor, parameter: str, change: Change) -> torch.Tensor:
    if parameter in change.replaced:
        value = change.replaced[parameter].float()
    if parameter == "weight" and change.rows is not None:
        value = value.index_copy(0, torch.tensor(change.tokens), change.rows)
    if parameter == "bias" and change.b_bias is not None:
        return value + change.b_bias * change.scale
    if parameter != "weight" or change.a is None or change.b is None:
        return value
    product = change.b @ change.a * change.scale
    value = (value.T if change.is_embedding else value) + product  # DoRA measures an embedding's columns
    if change.magnitude is not None:
        value = value * (change.magnitude / value.norm(dim=1))[:, None]
    return value.T if change.is_embedding else value


def _write_text(adapter: Path, base: Path, folder: Path) -> None:
    """Put the adapter's own tokenizer and chat template in the place of the base's; what it lacks stays."""
    if not brings_text(adapter):
        return
    own = template_of(adapter)
    template = template_of(base) if own is None else own
    if own_tokenizer(adapter):
        for name in TEXT_FILES:
            (folder / name).unlink(missing_ok=True)
            if (adapter / name).is_file():
                (folder / name).write_bytes(read_file(adapter / name))
    if template is not None:
        (folder / FILE).write_text(template, encoding="utf-8")


def _settle_config(path: Path, adapter: Adapter, *, untied: bool, dtype: torch.dtype, words: int | None) -> None:
    config = read_json(path)
    config.pop("quantization_config", None)
    if words is not None:
        config["vocab_size"] = words
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    if untied:
        config["tie_word_embeddings"] = False
    if adapter.form == "thudm":
        config["pre_seq_len"] = adapter.length
        config["prefix_projection"] = f"{PREFIX_ENCODER}trans.0.weight" in adapter.tensors.shapes()
    path.write_text(json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8")


def write_prefix(adapter: Adapter, file: Path) -> None:
    """Only the prefix of an older full checkpoint, as a safetensors file: 13 GB of base weights need no second copy."""
    shapes = {name: shape for name, shape in adapter.tensors.shapes().items() if name.startswith(PREFIX_ENCODER)}
    layout: Layout = {name: (torch.float32, shape) for name, shape in shapes.items()}
    with SafetensorsWriter(file, layout) as writer:
        for name in shapes:
            stored = adapter.tensors.read(name)
            assert isinstance(stored, torch.Tensor)
            writer.write(name, stored.float())
