"""One walk over a loaded model that puts packed layers in the place of dense ones."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from typing import cast

import torch
from torch import nn

from glmchat.checkpoints.recipe import Recipe
from glmchat.core.errors import Damaged, Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.models.prefix import PrefixEncoder
from glmchat.engine.quantize.int4 import Codes4, quantise_int4, searches
from glmchat.engine.quantize.int8 import quantise_int8
from glmchat.engine.quantize.linear import QuantEmbedding, QuantLinear


def four_bits(recipe: Recipe, weight: torch.Tensor, group: int) -> Codes4:
    """The codes of one matrix [out, in] by the recipe."""
    return quantise_int4(
        weight, group, fast=recipe.fast, symmetric=recipe.symmetric, portable=recipe.portable is not False
    )


def quantise_model(
    model: LanguageModel,
    bits: int,
    *,
    group_size: int | str = "auto",
    ends: int = 8,
    fast: bool = False,
    device_of: Callable[[str], str] = lambda name: "cpu",
    on_progress: Callable[[float], None] | None = None,
) -> None:
    """Replace every linear layer and the word embedding by packed ones, in place and one at a time.

    Peak memory is the model plus one matrix. device_of: where a layer will run. Adapters must not be attached.
    Raises Usage if `group_size` does not fit, Damaged with its name for a matrix that holds NaN or infinity.
    """
    size = None if group_size == "auto" else int(group_size)
    places = list(quantisable(model))
    inner = [inputs for _, inputs, is_end in places if not is_end]
    recipe = Recipe(bits, size, ends, fast=fast).settled(model.spec.family, inner)
    refuse_mostly_dense(model, [name for name, _, _ in places])
    for name, inputs, is_end in places:
        recipe.choose(name, inputs, is_end)  # refused before anything is changed
    for index, (name, inputs, is_end) in enumerate(places):
        packed = _packed(model.get_submodule(name), name, *recipe.choose(name, inputs, is_end), recipe, device_of(name))
        if packed is not None:
            model.swap(name, packed)
        if on_progress is not None:
            on_progress((index + 1) / len(places))


_AS_PLAIN = ("FalconLinear",)  # classes of transformers that compute what nn.Linear does, in two operations


def lies_across(module: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D: an nn.Linear whose matrix is [in, out]."""
    return type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nx", None), int)


def quantisable(model: LanguageModel) -> list[tuple[str, int, bool]]:
    """(dotted name, inputs, is embedding or head) of each dense matrix that may be packed.

    Position tables and P-Tuning encoders stay dense: they are small and used in full precision. So do subclasses that
    compute in a way of their own (Gemma's embedding has a factor, a router reads its weight), and a head that shares
    its matrix with such an embedding.
    """
    places = []
    own = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and type(m) is not nn.Embedding}
    skipped: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, PrefixEncoder):
            skipped.update(module.modules())
    for name, module in model.named_modules():
        if module in skipped:
            continue
        words = model.spec.vocab_size
        plain = type(module) is nn.Linear or (isinstance(module, nn.Linear) and type(module).__name__ in _AS_PLAIN)
        if plain and id(module.weight) not in own and not _is_read(model, name):
            places.append((name, module.in_features, module.out_features == words))
        elif lies_across(module) and not _is_read(model, name):
            places.append((name, len(cast(torch.Tensor, module.weight)), False))
        elif type(module) is nn.Embedding and module.num_embeddings == words:
            places.append((name, module.embedding_dim, True))
    return places


def _is_read(model: LanguageModel, name: str) -> bool:
    """Whether the module around a layer reads the layer's weight itself, as state-space layers do."""
    holder, _, leaf = name.rpartition(".")
    if getattr(model.get_submodule(holder), "slow_but_exact", None) is False:
        return False  # BLOOM reads it in that mode alone
    return f"self.{leaf}.weight" in _source(type(model.get_submodule(holder)))  # type: ignore[arg-type]


@cache
def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def refuse_mostly_dense(model: LanguageModel, places: Sequence[str]) -> None:
    """Raise Usage where most weights of the layers are no plain matrices (experts in one block, state-space layers):
    the model would not become smaller, and some of it reads the weights of its layers itself."""
    layers = [model.get_submodule(name) for name in places]
    packed = sum(cast(torch.Tensor, m.weight).numel() for m in layers if not isinstance(m, nn.Embedding))
    ends = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    ends |= {id(m.weight) for m in layers if isinstance(m, nn.Linear) and m.out_features == model.spec.vocab_size}
    rest = sum(p.numel() for p in model.parameters() if p.dim() > 1 and id(p) not in ends)
    packed -= sum(m.weight.numel() for m in layers if isinstance(m, nn.Linear) and id(m.weight) in ends)
    if packed < 0.5 * rest:
        raise Usage(
            tr(
                "{share} % of the weights of this {family} model are no plain matrices and cannot be quantised",
                share=round(100 - 100 * packed / max(rest, 1)),
                family=one_line(model.spec.family, 40),
            ),
            hint=tr("run it without --quant"),
            code="quant.family",
        )


def _packed(module: nn.Module, name: str, bits: int, group: int, recipe: Recipe, device: str) -> nn.Module | None:
    if bits == 0:
        return None
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    weight = weight.t() if lies_across(module) else weight

    def bring(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device)

    if searches(device):
        weight = bring(weight)
    try:
        if bits == 4:
            four = four_bits(recipe, weight, group).stored().on(bring)
            linear = QuantLinear.from_int4(four.q, four.scale, four.zero)
        else:
            eight = quantise_int8(weight, fast=recipe.fast)
            linear = QuantLinear.from_int8(bring(eight.q), bring(eight.scale))
    except ValueError as error:
        raise not_finite(f"{name}.weight", error) from None
    if isinstance(module, nn.Embedding):
        return QuantEmbedding(linear, weight.dtype)
    bias = cast("torch.Tensor | None", module.bias)
    linear.bias = None if bias is None else bring(bias)
    return linear


def not_finite(name: str, error: ValueError) -> Damaged:
    """The error for a matrix that cannot be quantised."""
    return Damaged(
        f"{one_line(name)}: {error}",
        hint=tr("the file is damaged: run `glmchat verify`, or pull the model again"),
        code="weights.not_finite",
    )
