"""What a LoRA adds to every layer, as a few numbers that depend on no kernel and no type of the base.

Logits of two processes differ by what their kernels round, in bfloat16 by as much as a short run moves them. The
factors do not: each layer's product with drawn vectors is the same wherever it is read, or the adapter is another one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import nn

from glmchat.engine.adapters.low_rank import AdaptedLinear

_DRAWN = 4  # vectors on each side
_NEAR = 1e-3  # of the largest of a layer; factors are float32, and a scale may be multiplied into either
_NEAR_LENGTHS = 2e-2  # with DoRA: the lengths of the rows come of products in the base's type


def effect(name: str, down: torch.Tensor, up: torch.Tensor) -> list[float]:
    """Of x @ down @ up, down [in, rank], up [rank, out], for vectors that are drawn by the layer's name."""
    noise = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    before, behind = (
        torch.randn(_DRAWN, width, generator=noise, dtype=torch.float64) for width in (len(down), up.shape[1])
    )
    down, up = (each.detach().cpu().double() for each in (down, up))
    found: list[float] = ((before @ down) @ (up @ behind.t())).flatten().tolist()
    return found


def effects_in(model: nn.Module) -> dict[str, list[float]]:
    """Of every layer that the engine has put an adapter's product on."""
    layers = ((name, layer.change) for name, layer in model.named_modules() if isinstance(layer, AdaptedLinear))
    return {name: effect(name, change.down, change.up) for name, change in layers}


def first_other(
    trained: Mapping[str, list[float]], fresh: Mapping[str, list[float]], *, with_lengths: bool = False
) -> str | None:
    """The first layer whose product is another one, or that only one of them has; None if they are the same."""
    for name in dict.fromkeys([*trained, *fresh]):
        if name not in trained or name not in fresh:
            return name
        ours, theirs = torch.tensor(trained[name]), torch.tensor(fresh[name])
        near = (_NEAR_LENGTHS if with_lengths else _NEAR) * float(ours.abs().max())
        if not float((ours - theirs).abs().max()) <= near:
            return name
    return None
