"""What was learned as a few numbers that depend on no kernel: what a LoRA adds to every layer, what a prefix puts in
front of it, what the tensors of a model are.

Logits of two processes differ by what their kernels round, in bfloat16 by as much as a short run moves them. Products
of what was learned with drawn vectors are the same wherever it is read, or it is something else.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import nn

from glmchat.engine.adapters.low_rank import AdaptedLinear

Effects = dict[str, list[float]]

NEAR = 1e-3  # of the largest of a layer; factors are float32, and a scale may be multiplied into either
NEAR_LENGTHS = 2e-2  # with DoRA: the lengths of the rows come of products in the base's type
NEAR_NUMBERS = 1e-9  # the same numbers, summed up in float64
_DRAWN = 4  # vectors on each side
_BLOCK = 4 << 20  # numbers in float64 at a time


def effect(name: str, down: torch.Tensor, up: torch.Tensor) -> list[float]:
    """Of x @ down @ up, down [in, rank], up [rank, out], for vectors that are drawn by the layer's name."""
    before, behind = _vectors(name, len(down), up.shape[1])
    down, up = (each.detach().cpu().double() for each in (down, up))
    found: list[float] = ((before @ down) @ (up @ behind.t())).flatten().tolist()
    return found


def effect_of(name: str, tensor: torch.Tensor) -> list[float]:
    """Of the tensor itself as a matrix [first measure, all others]."""
    matrix = tensor.detach().reshape(len(tensor), -1) if tensor.dim() else tensor.detach().reshape(1, 1)
    before, behind = _vectors(name, *matrix.shape)
    total = torch.zeros(_DRAWN, _DRAWN, dtype=torch.float64)
    step = max(1, _BLOCK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        block = matrix[start : start + step].cpu().double()
        total += before[:, start : start + step] @ (block @ behind.t())
    found: list[float] = total.flatten().tolist()
    return found


def _vectors(name: str, width: int, other: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[_DRAWN, width] and [_DRAWN, other]."""
    noise = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    before = torch.randn(_DRAWN, width, generator=noise, dtype=torch.float64)
    return before, torch.randn(_DRAWN, other, generator=noise, dtype=torch.float64)


def effects_in(model: nn.Module) -> Effects:
    """Of every layer that the engine has put an adapter's product on."""
    layers = ((name, layer.change) for name, layer in model.named_modules() if isinstance(layer, AdaptedLinear))
    return {name: effect(name, change.down, change.up) for name, change in layers}


def effects_of_rows(rows: torch.Tensor) -> Effects:
    """Of a prefix [layers, 2, kv_heads, length, head_dim], keys and values of each layer by themselves; or of virtual
    tokens [length, hidden]."""
    if rows.dim() == 2:
        return {"virtual tokens": effect_of("virtual tokens", rows)}
    names = (f"{what} of layer {number}" for number in range(len(rows)) for what in ("keys", "values"))
    return {name: effect_of(name, part) for name, part in zip(names, rows.flatten(0, 1), strict=True)}


def effects_of_model(model: nn.Module) -> Effects:
    """Of each of its tensors."""
    return {name: effect_of(name, value) for name, value in model.named_parameters()}


def first_other(trained: Mapping[str, list[float]], fresh: Mapping[str, list[float]], near: float = NEAR) -> str | None:
    """The first name whose numbers are other ones, or that only one of them has; None if they are the same.

    near: how far apart they may be, as a part of the largest.
    """
    for name in dict.fromkeys([*trained, *fresh]):
        if name not in trained or name not in fresh:
            return name
        ours, theirs = torch.tensor(trained[name]).double(), torch.tensor(fresh[name]).double()
        if not float((ours - theirs).abs().max()) <= near * float(ours.abs().max()):
            return name
    return None
