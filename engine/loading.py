"""From a recognised checkpoint to a model with its weights in: every name accounted for, every shape checked.

The network is built on the meta device, so nothing is allocated before names and shapes agree. Tensors stay memory
maps of the file where their dtype is the one asked for; quantised matrices become QuantLinear as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from glmchat.core.errors import Damaged, Usage
from glmchat.core.text import one_line
from glmchat.engine.families import Checkpoint
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.shards import open_folder
from glmchat.engine.weights import Int4, Int8, Stored, WeightSource

Progress = Callable[[str, float], None]  # (stage, 0..1)


def open_weights(checkpoint: Checkpoint) -> WeightSource:
    """The tensors of a checkpoint under their checkpoint names, whatever they are stored in."""
    if checkpoint.gguf is not None:
        from glmchat.engine.gguf_weights import GGUFWeights

        return GGUFWeights(checkpoint.gguf)
    return open_folder(checkpoint.path, checkpoint.config)


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    quant: int | None = None,
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> LanguageModel:
    """The model of `checkpoint`, ready for `forward`.

    dtype: of the activations, and of every weight that is not quantised. quant: None keeps the file's own precision;
    4 or 8 quantises in memory (a file that has these bits already stays as it is).
    Raises Damaged with every missing, left-over or misshapen tensor named; Usage for quant on other quantised bits.
    """
    report = on_progress or (lambda stage, done: None)
    family, spec = checkpoint.family, checkpoint.spec
    if family.load is not None:
        model = family.load(checkpoint, dtype)
    else:
        with torch.device("meta"):
            model = family.build(spec)
        fill(model, open_weights(checkpoint), checkpoint, lambda done: report("weights", done * 0.9))
    model.requires_grad_(False)
    model.eval()
    if quant is not None:
        _quantise(model, quant)
    _cast(model, dtype, device)
    model.prepare(dtype, device)
    report("weights", 1.0)
    return model


def fill(model: LanguageModel, source: WeightSource, checkpoint: Checkpoint, report: Callable[[float], None]) -> None:
    """Put every tensor of `source` in its place in `model`, or raise Damaged and say everything that does not fit."""
    table = match_names(model, source, checkpoint)
    for index, (parameter, name) in enumerate(table.items()):
        stored = source.read(name)
        if checkpoint.family.transposed is not None and checkpoint.family.transposed(parameter):
            stored = _transpose(stored)
        _assign(model, parameter, stored)
        report((index + 1) / len(table))


def match_names(model: nn.Module, source: WeightSource, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter -> checkpoint name, for all of them. Raises Damaged that names each tensor that is in the way."""
    family = checkpoint.family
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    table: dict[str, str] = {}
    left_over: list[str] = []
    misshapen: list[str] = []
    for name, shape in source.shapes().items():
        parameter = family.rename(name)
        if parameter is None:
            continue
        expected = wanted.get(parameter)
        if expected is None:
            left_over.append(name)
            continue
        if family.transposed is not None and family.transposed(parameter):
            shape = shape[::-1]
        if shape != expected:
            misshapen.append(f"{name} is {list(shape)} instead of {list(expected)}")
        table[parameter] = name
    missing = [name for name in wanted if name not in table]
    if missing or left_over or misshapen:
        parts = [
            f"{len(names)} {what}: {', '.join(names)}"
            for what, names in (
                ("tensors are missing", missing),
                ("tensors belong to no part of it", left_over),
                ("tensors have another shape", misshapen),
            )
            if names
        ]
        raise Damaged(
            f"the weights do not fit a {family.name} model of these measures: " + one_line("; ".join(parts), 100_000),
            hint="config.json and the weights are of different models or revisions: verify or pull the model again",
            code="weights.names",
        )
    return table


def _transpose(stored: Stored) -> Stored:
    if isinstance(stored, torch.Tensor):
        return stored.t()
    return stored.dequantise().t()  # groups lie along the other axis, so these bits cannot be kept


def _assign(model: nn.Module, parameter: str, stored: Stored) -> None:
    owner_name, _, leaf = parameter.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(stored, torch.Tensor):
        setattr(owner, leaf, nn.Parameter(stored, requires_grad=False))
        return
    from glmchat.engine.quantize.linear import QuantEmbedding, QuantLinear

    if isinstance(stored, Int4):
        linear = QuantLinear.from_int4(stored.q, stored.scale, stored.zero)
    else:
        linear = QuantLinear.from_int8(stored.q, stored.scale)
    replacement: nn.Module
    if isinstance(owner, nn.Embedding):
        replacement = QuantEmbedding(linear)
    elif isinstance(owner, nn.Linear):
        linear.bias = owner.bias  # filled, or about to be: the table holds it under the same name
        replacement = linear
    else:
        setattr(owner, leaf, nn.Parameter(stored.dequantise(), requires_grad=False))
        return
    holder_name, _, place = owner_name.rpartition(".")
    setattr(model.get_submodule(holder_name), place, replacement)


def stored_bits(model: nn.Module) -> int | None:
    """4 or 8 if the file's own matrices are quantised (the width that most of them have), else None."""
    from glmchat.engine.quantize.linear import QuantLinear

    sizes: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, QuantLinear):
            sizes[module.bits] = sizes.get(module.bits, 0) + module.in_features * module.out_features
    return max(sizes, key=lambda bits: sizes[bits]) if sizes else None


def _quantise(model: LanguageModel, bits: int) -> None:
    from glmchat.engine.quantize.replace import quantise_model

    if bits not in (4, 8):
        raise Usage(f"quant is {bits}", hint="4 and 8 are the widths there are", code="quant.bits")
    have = stored_bits(model)
    if have is None:
        quantise_model(model, bits)
    elif have != bits:
        raise Usage(
            f"this model is quantised to {have} bits already and cannot be brought to {bits}",
            hint="leave --quant away, or quantise from the original weights",
            code="quant.already",
        )


def _cast(model: nn.Module, dtype: torch.dtype, device: str) -> None:
    """Every floating-point parameter in `dtype`; one that has it already stays the file's memory map."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.dtype.is_floating_point:
                continue
            if parameter.dtype != dtype or str(parameter.device) != device:
                module._parameters[name] = nn.Parameter(parameter.data.to(device, dtype), requires_grad=False)
    if device != "cpu":
        model.to(device)
