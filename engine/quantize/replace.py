"""One walk over a loaded model that puts packed layers in the place of dense ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from glmchat.core.errors import Damaged, Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.models.prefix import PrefixEncoder
from glmchat.engine.quantize.int4 import GROUP_SIZES, Codes4, group_size, quantise_int4
from glmchat.engine.quantize.int8 import quantise_int8
from glmchat.engine.quantize.linear import QuantEmbedding, QuantLinear


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is quantised.

    bits: of the layers' matrices. group: inputs that share a scale at 4 bits; None takes the largest of 128, 64 and 32
    that divides a matrix's inputs. ends: bits of the embedding and the head; 0 leaves them as they are, None takes 8
    unless other programs could then not read the folder (`settled`). portable: zero points are whole numbers wherever
    that costs little, as other programs know no others; None decides by the family.
    """

    bits: int
    group: int | None = None
    ends: int | None = None
    symmetric: bool = False
    fast: bool = False
    portable: bool | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise Usage(f"{self.bits} bits", hint=tr("4 and 8 are the widths there are"), code="quant.bits")
        if self.ends not in (None, 0, 4, 8):
            raise Usage(
                tr("{ends} bits for embedding and head", ends=self.ends),
                hint=tr("4, 8, or 0 to leave them"),
                code="quant.bits",
            )
        if self.group is not None and self.group not in GROUP_SIZES:
            raise Usage(
                tr("a group size of {group}", group=self.group),
                hint=tr("128, 64 and 32 are the sizes that every kernel takes, or auto"),
                code="quant.group",
            )

    def settled(self, family: str) -> Recipe:
        """With everything decided. transformers and vLLM read Llamas; the ChatGLM families only glmchat reads.

        transformers decodes a folder with one width for all its matrices, so a four-bit Llama keeps embedding and head
        in 16 bits.
        """
        shared = family == "llama"
        ends = (0 if self.bits == 4 and shared else 8) if self.ends is None else self.ends
        return replace(self, ends=ends, portable=shared if self.portable is None else self.portable)

    def four_bits(self, weight: torch.Tensor, group: int) -> Codes4:
        return quantise_int4(
            weight, group, fast=self.fast, symmetric=self.symmetric, portable=self.portable is not False
        )

    def choose(self, name: str, inputs: int, is_end: bool) -> tuple[int, int]:
        """(bits, group) of one matrix; bits 0 leaves it, group 0 means one scale for each row.

        Raises Usage, with the sizes that divide, if an explicit group size does not.
        """
        bits = (8 if self.ends is None else self.ends) if is_end else self.bits
        if bits != 4:
            return bits, 0
        if self.group is None:
            found = group_size(inputs)
            return (4, found) if found else (8, 0)  # no group fits: eight bits lose less than padding would cost
        if inputs % self.group:
            fitting = ", ".join(str(size) for size in GROUP_SIZES if inputs % size == 0) or "none; use auto"
            raise Usage(
                tr(
                    "a group size of {group} does not divide the {inputs} inputs of {name}",
                    group=self.group,
                    inputs=inputs,
                    name=one_line(name),
                ),
                hint=tr("sizes that do: {fitting}", fitting=fitting),
                code="quant.group",
            )
        return 4, self.group


def quantise_model(
    model: LanguageModel,
    bits: int,
    *,
    group_size: int | str = "auto",
    ends: int = 8,
    fast: bool = False,
    on_progress: Callable[[float], None] | None = None,
) -> None:
    """Replace every linear layer and the word embedding by packed ones, in place and one at a time.

    Peak memory is the model plus one matrix. Adapters must not be attached. Raises Usage if `group_size` does not fit,
    Damaged with its name for a matrix that holds NaN or infinity.
    """
    size = None if group_size == "auto" else int(group_size)
    recipe = Recipe(bits, size, ends, fast=fast).settled(model.spec.family)
    places = list(quantisable(model))
    for name, inputs, is_end in places:
        recipe.choose(name, inputs, is_end)  # refused before anything is changed
    for index, (name, inputs, is_end) in enumerate(places):
        packed = _packed(model.get_submodule(name), name, *recipe.choose(name, inputs, is_end), recipe)
        if packed is not None:
            model.swap(name, packed)
        if on_progress is not None:
            on_progress((index + 1) / len(places))


def quantisable(model: LanguageModel) -> list[tuple[str, int, bool]]:
    """(dotted name, inputs, is embedding or head) of each dense matrix that may be packed.

    Position tables and P-Tuning encoders stay dense: they are small and used in full precision.
    """
    places = []
    skipped: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, PrefixEncoder):
            skipped.update(module.modules())
    for name, module in model.named_modules():
        if module in skipped:
            continue
        words = model.spec.vocab_size
        if isinstance(module, nn.Linear):
            places.append((name, module.in_features, module.out_features == words))
        elif isinstance(module, nn.Embedding) and module.num_embeddings == words:
            places.append((name, module.embedding_dim, True))
    return places


def _packed(module: nn.Module, name: str, bits: int, group: int, recipe: Recipe) -> nn.Module | None:
    if bits == 0:
        return None
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    try:
        if bits == 4:
            four = recipe.four_bits(weight, group).stored()
            linear = QuantLinear.from_int4(four.q, four.scale, four.zero)
        else:
            eight = quantise_int8(weight, fast=recipe.fast)
            linear = QuantLinear.from_int8(eight.q, eight.scale)
    except ValueError as error:
        raise not_finite(f"{name}.weight", error) from None
    if isinstance(module, nn.Embedding):
        return QuantEmbedding(linear, weight.dtype)
    linear.bias = module.bias  # type: ignore[assignment]
    return linear


def not_finite(name: str, error: ValueError) -> Damaged:
    """The error for a matrix that cannot be quantised."""
    return Damaged(
        f"{one_line(name)}: {error}",
        hint=tr("the file is damaged: `glmchat verify`, or pull the model again"),
        code="weights.not_finite",
    )
