"""A LoRA's tensors matched to the model's layers, checked by name and shape, then read as factors.

A and B are [rank, in] and [out, rank] under the names that PEFT gives them, or that raw files and older versions do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import nn

from glmchat.checkpoints.adapter_settings import (
    TOKENS,
    LoraSettings,
    Names,
    changed_shape,
    incomplete_adapter,
    other_vocabulary,
    split_name,
)
from glmchat.core.errors import Damaged, Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.adapters.files import Adapter
from glmchat.engine.adapters.low_rank import Change
from glmchat.engine.adapters.words import VOCABULARIES, check_tokens, measures, rows_brought, share_rows
from glmchat.engine.formats.gguf import halves_apart
from glmchat.engine.quantize.linear import QuantEmbedding, QuantLinear

_PREFIXES = ("", "model.", "transformer.", "inner.", "inner.model.", "inner.transformer.")
_HEADS = ("lm_head", "output_layer")


Modules = Mapping[str, nn.Module]


def match(
    adapter: Adapter,
    modules: Modules,
    transposed: Callable[[str], bool] | None = None,
    ends: tuple[str, ...] = (),
    resizable: bool = False,
    heads: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Names]:
    """Layer of the model -> the adapter's tensors for it, every shape checked. Nothing of the weights is read.

    modules: every module of the bare model by name. transposed: of a parameter, whether checkpoints store it [in, out].
    ends: embedding and head, where they are one. resizable: an adapter may bring another number of words. heads: of the
    layers that are rotated, by the last part of their name.
    Raises Damaged or Usage that names what does not fit.
    """
    shapes = adapter.tensors.shapes()
    settings = adapter.lora
    layers: dict[str, Names] = {}
    strangers: list[str] = []
    for name in shapes:
        module, kind = split_name(name)
        place = _place(module, modules)
        if place is None or kind is None:
            strangers.append(name)
            continue
        if kind != "original":
            layers.setdefault(place, Names()).add(kind, name)
    refuse_strangers(strangers, len(shapes))
    share_rows(layers, ends)
    words = rows_brought(layers, modules, shapes, ends) if resizable else None
    for place, names in layers.items():
        names.transposed = transposed is not None and transposed(f"{place}.weight")
        if getattr(adapter.tensors, "paired", False):
            names.paired = heads.get(place.rpartition(".")[2], 0)
        _check_shapes(place, names, modules[place], shapes, settings, words)
    _check_complete(layers, modules, settings)
    if settings.ties_ends:
        _check_ends(layers, ends)
    return layers


def refuse_strangers(strangers: Sequence[str], total: int) -> None:
    """Raise Usage for tensors that belong to no layer; total: of all in the adapter."""
    if strangers:
        raise Usage(
            tr(
                "{n} of the adapter's {total} tensors belong to no layer of this model: {names}",
                n=len(strangers),
                total=total,
                names=one_line(", ".join(strangers[:4]), 300),
            ),
            hint=tr("the adapter was trained on a model of another family, or one with more layers"),
            code="adapter.names",
        )


def _place(name: str, modules: Modules) -> str | None:
    return next((prefix + name for prefix in _PREFIXES if prefix + name in modules), None)


def _check_shapes(
    place: str,
    names: Names,
    module: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    settings: LoraSettings,
    words: int | None,
) -> None:
    out, width = measures(module)
    if words is not None and place.rpartition(".")[2] in VOCABULARIES:
        out = words
    if names.is_embedding:
        out, width = width, out  # the change of an embedding is stored the other way round
    for a_kind, b_kind in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        if a_kind not in names.tensors:
            continue
        a, b = shapes[names.tensors[a_kind]], shapes[names.tensors[b_kind]]
        if not out or names.is_embedding is not isinstance(module, nn.Embedding | QuantEmbedding):
            raise Usage(
                tr("{place} is not a layer that a LoRA can change", place=one_line(place, 120)),
                hint=tr("the adapter was trained on a model of another family"),
                code="adapter.names",
            )
        if (changed := changed_shape(place, a, b, settings)) != (out, width):
            if place.rpartition(".")[2] in VOCABULARIES and (rows := _rows_only(changed, (out, width), names)):
                raise _other_vocabulary(place, *rows)
            raise Usage(
                tr(
                    "the adapter changes {place} of {found}, but in this model it is [{out}, {width}]",
                    place=one_line(place, 120),
                    found=list(changed),
                    out=out,
                    width=width,
                ),
                hint=tr("it was trained on a model of hidden size {a}", a=a[1]),
                code="adapter.shape",
            )
    if TOKENS in names.tensors:
        check_tokens(
            place, shapes[names.tensors[TOKENS]], settings, (width, out) if names.is_embedding else (out, width)
        )
    for kind, length in (("lora_magnitude_vector", out), ("lora_B.bias", out)):  # an embedding's out is its width
        if kind in names.tensors and _count(shapes[names.tensors[kind]]) != length:
            raise _misshapen(place, kind, shapes[names.tensors[kind]], (length,))
    for parameter, name in names.replaced.items():
        expected = _parameter_shape(module, parameter)
        if words is not None and expected is not None and place.rpartition(".")[2] in VOCABULARIES:
            expected = (words, *expected[1:])
        if parameter == "weight" and names.transposed and expected is not None:
            expected = expected[::-1]
        if expected is None and parameter == "bias" and shapes[name] == (out,):
            continue
        if expected != shapes[name]:
            if place.rpartition(".")[2] in VOCABULARIES and expected and shapes[name][1:] == expected[1:]:
                raise _other_vocabulary(place, shapes[name][0], expected[0])
            raise _misshapen(place, parameter, shapes[name], expected or ())


def _rows_only(theirs: tuple[int, int], here: tuple[int, int], names: Names) -> tuple[int, int] | None:
    """Words of the adapter and of the model, where nothing else of an embedding or a head differs."""
    rows, width = (1, 0) if names.is_embedding else (0, 1)
    return (theirs[rows], here[rows]) if theirs[width] == here[width] else None


def _other_vocabulary(place: str, theirs: int, ours: int) -> Usage:
    reason, hint = other_vocabulary(theirs, ours)
    return Usage(f"{one_line(place, 120)}: {reason}", hint=hint, code="adapter.vocabulary")


def _check_ends(layers: Mapping[str, Names], ends: tuple[str, ...]) -> None:
    """Raise Damaged where embedding and head were trained as one and the file holds a change of one of them only.

    PEFT trains them as one where the embedding is called embed_tokens, and nowhere else whatever it was asked.
    """
    changed = [place for place in ends if place in layers and any("embed_tokens" in end for end in ends)]
    if len(changed) == 1:
        raise incomplete_adapter(
            tr(
                "adapter_config.json sets ensure_weight_tying, but the adapter contains a change of {end} alone",
                end=one_line(changed[0], 120),
            ),
            tr("load it with PEFT and save it again, so that it contains embedding and head"),
        )


def _check_complete(layers: Mapping[str, Names], modules: Modules, settings: LoraSettings) -> None:
    """Every layer that the configuration targets must have its tensors: a cut file would half change the model."""
    if settings.targets is None and not settings.all_linear:
        return
    targets = [name for name, module in modules.items() if _is_target(name, module, settings)]
    missing = [name for name in targets if name not in layers or not layers[name].tensors]
    if missing:
        raise incomplete_adapter(
            tr(
                "the adapter contains nothing for {n} of the {total} layers that it targets: {names}",
                n=len(missing),
                total=len(targets),
                names=one_line(", ".join(missing[:3]), 200),
            ),
            tr("the file is incomplete, or was trained on a model with fewer layers"),
        )


def _is_target(name: str, module: nn.Module, settings: LoraSettings) -> bool:
    out, _ = measures(module)
    name = name.removeprefix("inner.")
    if not out or settings.leaves_out(name):
        return False
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    if settings.layers is not None and (not numbers or numbers[0] not in settings.layers):
        return False
    if settings.all_linear:
        return isinstance(module, nn.Linear | QuantLinear) and name.rpartition(".")[2] not in _HEADS
    return any(name == t or name.endswith("." + t) for t in settings.targets or ())


def _parameter_shape(module: nn.Module, parameter: str) -> tuple[int, ...] | None:
    if parameter == "weight" and measures(module) != (0, 0):
        return measures(module)
    value = getattr(module, parameter, None)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _count(shape: tuple[int, ...]) -> int:
    return max(shape, default=0) if sum(length > 1 for length in shape) <= 1 else -1


def _misshapen(place: str, kind: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> Usage:
    return Usage(
        tr(
            "{kind} of {place} is {shape} in the adapter, but {wanted} in this model",
            kind=kind,
            place=one_line(place, 120),
            shape=list(shape),
            wanted=list(expected),
        ),
        hint=tr("the adapter was trained on another model, or on another vocabulary"),
        code="adapter.shape",
    )


def read_changes(
    adapter: Adapter, matched: Mapping[str, Names], device_of: Callable[[str], str]
) -> Iterator[tuple[str, Change]]:
    """The numbers, each on the device of the layer that it changes. Raises Damaged for one that is not finite."""
    for place, names in matched.items():
        device = device_of(place)
        change = Change(is_embedding=names.is_embedding)
        a_kind, b_kind = ("lora_embedding_A", "lora_embedding_B") if names.is_embedding else ("lora_A", "lora_B")
        if a_kind in names.tensors:
            a = read_number(adapter, names.tensors[a_kind], device, torch.float32)
            b = read_number(adapter, names.tensors[b_kind], device, torch.float32)
            b = b[halves_apart(len(b), names.paired)] if names.paired else b
            settings = adapter.lora
            groups = sum(settings.enable) if settings.enable else 1
            change.scale = settings.scale_of(place, a.shape[0] // groups)
            change.a, change.b = a, _spread(b, settings.enable) if settings.enable else b
        if "lora_magnitude_vector" in names.tensors:
            magnitude = names.tensors["lora_magnitude_vector"]
            change.magnitude = read_number(adapter, magnitude, device, torch.float32).flatten()
        if "lora_B.bias" in names.tensors:
            change.b_bias = read_number(adapter, names.tensors["lora_B.bias"], device, torch.float32)
        if TOKENS in names.tensors:
            change.tokens = adapter.lora.tokens_of(place)
            change.rows = read_number(adapter, names.tensors[TOKENS], device, torch.float32)
        for parameter, name in names.replaced.items():
            value = read_number(adapter, name, device, None)
            turned = parameter == "weight" and names.transposed
            change.replaced[parameter] = value.t().contiguous() if turned else value
        yield place, change


def _spread(b: torch.Tensor, enable: tuple[bool, ...]) -> torch.Tensor:
    """MergedLinear's grouped B [blocks * enabled, rank(, 1)] as a plain [out, enabled * rank].

    Its blocks are consecutive rows of the fused projection as the checkpoint stores it. In ChatGLM-6B these are not the
    queries or the values, since heads are interleaved there; the training computed with rows, so rows it is.
    """
    groups = sum(enable)
    rank = b.shape[1]
    block = b.shape[0] // groups
    out = torch.zeros(block * len(enable), rank * groups, dtype=b.dtype, device=b.device)
    parts = b.reshape(groups, block, rank)
    for number, place in enumerate(index for index, on in enumerate(enable) if on):
        out[place * block : (place + 1) * block, number * rank : (number + 1) * rank] = parts[number]
    return out


def read_number(adapter: Adapter, name: str, device: str | torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    """One tensor in memory of its own; dtype None: as stored. Raises Damaged for what is no number, or not finite."""
    stored = adapter.tensors.read(name)
    tensor = stored if isinstance(stored, torch.Tensor) else stored.dequantise()
    if not tensor.is_floating_point():
        raise Damaged(
            tr("{name} does not contain the numbers of an adapter", name=one_line(name, 120)),
            hint=tr("fetch it again"),
            code="adapter.dtype",
        )
    tensor = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True).contiguous()
    require_finite(name, tensor)
    return tensor


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Raise Damaged for NaN or infinity."""
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise Damaged(
            tr("{name} contains numbers that are not finite (NaN or infinity)", name=one_line(name, 120)),
            hint=tr("the training diverged: use an earlier checkpoint"),
            code="adapter.not_finite",
        )
