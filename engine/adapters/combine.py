"""One layer with all its active adapters: their low-rank products side by side, their trained parameters blended."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from glmchat.engine.adapters.lora import Change
from glmchat.engine.adapters.low_rank import AdaptedEmbedding, AdaptedLinear, LowRank
from glmchat.engine.quantize.linear import QuantEmbedding, QuantLinear

Weighted = tuple[Change, float]  # what an adapter changes in a layer, and the weight it was activated with
_ROWS = 1024  # of a matrix that is dequantised at a time


def adapted_linear(base: nn.Module, changes: Sequence[Weighted]) -> AdaptedLinear:
    """base with every change: A and B concatenated along the rank, so that ten adapters cost two products."""
    downs, ups = [], []
    gain: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    out, device = cast(int, base.out_features), _device(base)
    bias = cast("torch.Tensor | None", base.bias)
    for change, weight in changes:
        if change.a is not None and change.b is not None:
            up = change.b * (change.scale * weight)
            if change.magnitude is not None:
                ratio = change.magnitude / row_lengths(base, change.a, up)
                up = up * ratio[:, None]
                gain = (torch.ones(out, device=device) if gain is None else gain) + (ratio - 1)
            downs.append(change.a.t())
            ups.append(up.t())
        shift = None
        if change.b_bias is not None:
            shift = change.b_bias * (change.scale * weight)
        if "bias" in change.replaced:
            trained = change.replaced["bias"].float()
            own = 0 if bias is None else bias.float()
            shift = (0 if shift is None else shift) + (trained - own) * weight
        if shift is not None:
            offset = (torch.zeros(out, device=device) if offset is None else offset) + shift
    if gain is not None and bias is not None:  # DoRA scales the product and leaves the bias
        offset = (torch.zeros(out, device=device) if offset is None else offset) + bias.float() * (1 - gain)
    width = cast(int, base.in_features)
    down = torch.cat(downs, 1) if downs else torch.zeros(width, 0, device=device)
    up_all = torch.cat(ups, 0) if ups else torch.zeros(0, out, device=device)
    return AdaptedLinear(base, LowRank(down.contiguous(), up_all.contiguous(), gain, offset))


def row_lengths(base: nn.Module, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Lengths of the rows of W + B A, [out], for DoRA (Liu et al. 2024); W is dequantised a few rows at a time."""
    found = []
    for start in range(0, b.shape[0], _ROWS):
        part = b[start : start + _ROWS]
        if isinstance(base, QuantLinear):
            rows = base.rows(torch.arange(start, start + len(part), device=b.device))
        else:
            rows = cast(torch.Tensor, base.weight)[start : start + len(part)].float()
        found.append((rows + part @ a).norm(dim=1))
    return torch.cat(found)


def adapted_embedding(base: nn.Embedding | QuantEmbedding, changes: Sequence[Weighted]) -> AdaptedEmbedding:
    """base with every change of its rows."""
    low = [(c.a, c.b, c.scale * w) for c, w in changes if c.a is not None and c.b is not None]
    trained = [(c, w) for c, w in changes if "weight" in c.replaced]
    device = _device(base)
    down = torch.cat([a.t() for a, _, _ in low], 1) if low else torch.zeros(base.num_embeddings, 0, device=device)
    up = torch.cat([b.t() * s for _, b, s in low]) if low else torch.zeros(0, base.embedding_dim, device=device)
    rows = replaced(base, trained) if trained else None
    return AdaptedEmbedding(base, down.contiguous(), up.contiguous(), rows)


def replaced(base: nn.Module, changes: Sequence[Weighted]) -> nn.Module:
    """A module like `base` with trained parameters: base + sum of weight * (trained - base), per parameter.

    One change of weight 1 is taken as it was saved. Packed matrices become dense ones here, and only here.
    """
    dtype = _dtype(base)
    names = dict.fromkeys(name for change, _ in changes for name in change.replaced)
    values = {name: _blend(_own(base, name), [(c.replaced[name], w) for c, w in changes if name in c.replaced], dtype)
              for name in names}  # fmt: skip
    if isinstance(base, nn.Linear | QuantLinear):
        return _linear(base, values, dtype)
    if isinstance(base, nn.Embedding | QuantEmbedding):
        with torch.device("meta"):
            made = nn.Embedding(base.num_embeddings, base.embedding_dim)
        made.weight = nn.Parameter(values["weight"], requires_grad=False)
        return made
    clone = copy.copy(base)
    clone._parameters = {**base._parameters, **{k: nn.Parameter(v, requires_grad=False) for k, v in values.items()}}
    return clone


def _linear(base: nn.Linear | QuantLinear, values: dict[str, torch.Tensor], dtype: torch.dtype) -> nn.Linear:
    bias = values.get("bias", base.bias)
    with torch.device("meta"):
        made = nn.Linear(base.in_features, base.out_features, bias=bias is not None)
    made.weight = nn.Parameter(values["weight"], requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return made


def _blend(own: torch.Tensor | None, trained: Sequence[tuple[torch.Tensor, float]], dtype: torch.dtype) -> torch.Tensor:
    if len(trained) == 1 and trained[0][1] == 1:
        return trained[0][0].to(dtype)
    start = torch.zeros_like(trained[0][0], dtype=torch.float32) if own is None else own.float()
    total = start.clone()
    for value, weight in trained:
        total += (value.float() - start) * weight
    return total.to(dtype)


def _own(base: nn.Module, name: str) -> torch.Tensor | None:
    if name == "weight" and isinstance(base, QuantLinear):
        return base.dequantise()
    if name == "weight" and isinstance(base, QuantEmbedding):
        return base.linear.dequantise()
    return cast("torch.Tensor | None", getattr(base, name))


def _dtype(base: nn.Module) -> torch.dtype:
    """Of the activations that this module works on."""
    if isinstance(base, QuantEmbedding):
        return base.dtype
    weight = getattr(base, "weight", None)
    return weight.dtype if isinstance(weight, torch.Tensor) else torch.float32


def _device(base: nn.Module) -> torch.device:
    tensor = next((t for t in (*base.parameters(), *base.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device
