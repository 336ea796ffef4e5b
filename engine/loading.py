"""From a recognised checkpoint to a model with its weights in: every name accounted for, every shape checked.

The network is built on the meta device, so nothing is allocated before names and shapes agree. Tensors stay memory
maps of the file where their dtype is the one asked for; quantised matrices become QuantLinear as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from glmchat.checkpoints.device_plan import ON_CPU, DevicePlan
from glmchat.checkpoints.families import refuse_quantising
from glmchat.checkpoints.quantised import is_read
from glmchat.checkpoints.spec import match_tensors
from glmchat.checkpoints.weight_files import refuse_adapter_folder
from glmchat.core.errors import Damaged, Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.families import Checkpoint
from glmchat.engine.formats.compressed import open_compressed, open_official
from glmchat.engine.formats.foreign import open_foreign
from glmchat.engine.formats.packed_cache import open_cache, weight_files_of
from glmchat.engine.formats.weights import Int4, Int8, Stored, Sweep, WeightSource, Words, open_folder, read_on
from glmchat.engine.gpu.words import Upload
from glmchat.engine.models.base import LanguageModel, PackedPlace
from glmchat.engine.models.prefix import PrefixEncoder
from glmchat.engine.native.cards import device_of, make_current, spread
from glmchat.engine.quantize.linear import QuantEmbedding, QuantLinear
from glmchat.engine.quantize.replace import not_finite, quantise_model

Progress = Callable[[str, float], None]  # (stage, 0..1)


def open_weights(checkpoint: Checkpoint) -> WeightSource:
    """The tensors of a checkpoint under their checkpoint names, whatever they are stored in."""
    if checkpoint.gguf is not None:
        from glmchat.engine.formats.gguf import GGUFWeights

        return GGUFWeights(checkpoint.gguf)
    source = open_folder(checkpoint.path)
    refuse_adapter_folder(checkpoint.path, checkpoint.config, source.shapes())
    by_itself = checkpoint.family.load is not None
    if by_itself and not is_read(checkpoint.config):
        return source  # packed in a way that only transformers reads
    packed = open_foreign(open_compressed(source, checkpoint.config, checkpoint.path), checkpoint.config)
    return packed if by_itself else open_official(packed, checkpoint.config)


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    quant: int | None = None,
    plan: DevicePlan = ON_CPU,
    wide: bool = False,
    on_progress: Progress | None = None,
) -> LanguageModel:
    """The model of `checkpoint`, ready for `forward`.

    dtype: of the activations, and of every weight that is not quantised. quant: None keeps the file's own precision;
    4 or 8 quantises in memory (a file that has these bits already stays as it is). wide: see LanguageModel.
    Raises Damaged with every missing, left-over or misshapen tensor named; Usage for quant on other quantised bits.
    """
    report = on_progress or (lambda stage, done: None)
    family, spec, device = checkpoint.family, checkpoint.spec, plan.devices[0]
    if quant is not None:
        refuse_quantising(checkpoint.config)
    source = open_weights(checkpoint)
    if family.load is not None:
        model, packed = family.load(checkpoint, dtype, source)
        fill(model, source, checkpoint, lambda done: report("weights", done * 0.9), dtype, plan, packed)
    else:
        with torch.device("meta"), _Uninitialised():
            model = family.build(spec)
        # Weights that will be quantised keep the file's own precision until then, and the machine's memory.
        wanted = dtype if quant is None else None
        place = plan if wanted else ON_CPU
        fill(model, source, checkpoint, lambda done: report("weights", done * 0.9), wanted, place)
    model.requires_grad_(False)
    model.eval()
    model.plan, model.wide_residual = plan, wide
    if quant is not None:
        _quantise(model, quant)
    set_dtype(model, dtype, device)
    spread(model, model.spec, plan)
    report("weights", 1.0)
    return model


class _Uninitialised(TorchFunctionMode):
    """Leaves parameters as they are: filling them is work for nothing, and on the meta device it imports a compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def fill(
    model: LanguageModel,
    source: WeightSource,
    checkpoint: Checkpoint,
    report: Callable[[float], None],
    dtype: torch.dtype | None = None,
    plan: DevicePlan = ON_CPU,
    table: Mapping[str, str] | None = None,
) -> None:
    """Put every tensor of `source` in its place in `model`, or raise Damaged and say everything that does not fit.

    table: parameter -> name of those to be put in; None: all of them.

    Tensors are taken in the order of the files and brought to `dtype` and their device one by one, so that the working
    set is the result and one shard. Quantised ones are packed there: every device has a layout of its own.
    """
    table = match_names(source, checkpoint) if table is None else table
    kept = _in_float32(model)
    cache = open_cache(checkpoint) if plan.devices == ON_CPU.devices else None  # it holds the CPU kernel's layout
    uploads = {device: Upload(device) for device in plan.devices if device != "cpu"}
    sweep = Sweep(weight_files_of(checkpoint.path))
    held: dict[str, QuantLinear] = {}  # by their names: a head may be the embedding
    for index, (parameter, name) in enumerate(table.items()):
        device = device_of(parameter, checkpoint.spec, plan)
        make_current(device)
        cached = held.get(name) or (cache.take(parameter) if cache is not None else None)
        if cached is not None:
            bias = table.get(parameter.removesuffix(".weight") + ".bias")
            _swap(model, parameter, cached, None if bias is None else source.read(bias))
            held[name] = cached
            report((index + 1) / len(table))
            continue
        turned = _lies(checkpoint, source, parameter, name)
        stored = read_on(source, name, uploads.get(device), upright=not turned)
        if isinstance(stored, torch.Tensor) and not stored.is_floating_point():
            raise Damaged(
                tr("{name} holds whole numbers and says no scale", name=one_line(name, 120)),
                hint=tr("the folder was packed in a way that config.json does not tell: pull the model again"),
                code="weights.type",
            )
        if turned:
            stored = _transpose(stored)
        if dtype is not None and isinstance(stored, torch.Tensor) and parameter not in kept:
            stored = stored.to(dtype)
        if isinstance(stored, torch.Tensor):
            _assign(model, parameter, stored)
        else:
            bias = table.get(parameter.removesuffix(".weight") + ".bias")
            try:
                linear = _swap(model, parameter, stored, None if bias is None else source.read(bias))
            except ValueError as error:
                raise not_finite(name, error) from None
            if linear is not None:
                held[name] = linear
                if cache is not None:
                    cache.add(parameter, linear)
        sweep.read(stored.nbytes)
        report((index + 1) / len(table))
    if cache is not None:
        cache.save()
    sweep.now()


def _in_float32(model: nn.Module) -> set[str]:
    """Parameters that keep float32 whatever the model's dtype: a P-Tuning encoder runs in it, as in the original."""
    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(module, PrefixEncoder)
        for parameter, _ in module.named_parameters()
    }


def match_names(source: WeightSource, checkpoint: Checkpoint) -> dict[str, str]:
    """Parameter -> checkpoint name, for all of them. Raises Damaged that names each tensor that is in the way."""
    return match_tensors(
        source.shapes(),
        checkpoint.spec,
        checkpoint.family.name,
        checkpoint.family.rename,
        lambda parameter, name: _lies(checkpoint, source, parameter, name),
    )


def _lies(checkpoint: Checkpoint, source: WeightSource, parameter: str, name: str) -> bool:
    """True if the file holds this matrix as [in, out]."""
    transposed = checkpoint.family.transposed
    return transposed is not None and transposed(parameter) and name not in getattr(source, "upright", ())


def _transpose(stored: Stored | Words) -> torch.Tensor:
    dense = stored if isinstance(stored, torch.Tensor) else stored.dequantise()  # groups lie along the other axis
    return dense.t() if dense.is_cpu else dense.t().contiguous()  # a card's step reads rows


def _assign(model: LanguageModel, parameter: str, tensor: torch.Tensor) -> None:
    owner_name, _, leaf = parameter.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(owner, PackedPlace):
        model.swap(owner_name, owner.dense(tensor))
    elif isinstance(owner, nn.Linear | nn.Embedding) or leaf in owner._parameters:
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
    # else: the bias of a layer that was swapped, which took it along


def _swap(
    model: LanguageModel, parameter: str, stored: Int4 | Int8 | Words | QuantLinear, bias: Stored | None
) -> QuantLinear | None:
    """Put a layer with packed weights, and its bias, in the place of the one that `parameter` belongs to.

    Returns the layer; None for a parameter of something else, which then gets the weights dequantised.
    """
    owner_name, _, leaf = parameter.rpartition(".")
    owner = model.get_submodule(owner_name)
    dense = bias if isinstance(bias, torch.Tensor) or bias is None else bias.dequantise()
    if isinstance(owner, PackedPlace) and owner.bias is not None:
        dense = owner.bias
    if not isinstance(owner, nn.Linear | nn.Embedding | PackedPlace):
        setattr(owner, leaf, nn.Parameter(stored.dequantise(), requires_grad=False))
        return None
    if isinstance(stored, QuantLinear):
        linear = stored
    elif isinstance(stored, Words):
        linear = QuantLinear.from_words(stored)
    elif isinstance(stored, Int4):
        linear = QuantLinear.from_int4(stored.q, stored.scale, stored.zero)
    else:
        linear = QuantLinear.from_int8(stored.q, stored.scale)
    linear.bias = None if dense is None else dense.to(next(iter(linear.packed.values())).device)
    is_embedding = owner.is_embedding if isinstance(owner, PackedPlace) else isinstance(owner, nn.Embedding)
    replacement: nn.Module = QuantEmbedding(linear) if is_embedding else linear
    model.swap(owner_name, replacement)
    return linear


def stored_bits(model: nn.Module) -> int | None:
    """4 or 8 if the file's own matrices are quantised (the width that most of them have), else None."""
    sizes: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, QuantLinear):
            sizes[module.bits] = sizes.get(module.bits, 0) + module.in_features * module.out_features
    return max(sizes, key=lambda bits: sizes[bits]) if sizes else None


def _quantise(model: LanguageModel, bits: int) -> None:

    if bits not in (4, 8):
        raise Usage(tr("quant is {bits}", bits=bits), hint=tr("the supported widths are 4 and 8"), code="quant.bits")
    have = stored_bits(model)
    if have is None:
        quantise_model(model, bits, device_of=lambda name: device_of(f"{name}.weight", model.spec, model.plan))
    elif have != bits:
        raise Usage(
            tr("this model already has {have} bits and cannot be converted to {bits}", have=have, bits=bits),
            hint=tr("leave out --quant, or quantise the original weights"),
            code="quant.already",
        )


def set_dtype(model: LanguageModel, dtype: torch.dtype, device: str) -> None:
    """Give every weight that is not quantised this type, and the model what it computes from it."""
    _cast(model, dtype)
    model.prepare(dtype, device)
    model.dtype = dtype
    model.changed()


def _cast(model: LanguageModel, dtype: torch.dtype) -> None:
    """Every floating-point parameter in `dtype` on its device; one that is so already stays the file's memory map."""
    kept = _in_float32(model)
    cast: dict[int, nn.Parameter] = {}  # a matrix that is head and embedding stays one
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            device = device_of(f"{path}.{name}", model.spec, model.plan)
            fixed = not parameter.dtype.is_floating_point or f"{path}.{name}" in kept
            if id(parameter) not in cast:
                data = parameter.data.to(device, parameter.dtype if fixed else dtype)
                same = data is parameter.data
                cast[id(parameter)] = parameter if same else nn.Parameter(data, requires_grad=False)
            module._parameters[name] = cast[id(parameter)]
    if len(model.plan.devices) == 1 and model.plan.devices != ON_CPU.devices:
        model.to(model.plan.devices[0])  # buffers too
