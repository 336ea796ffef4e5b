"""Layers that add an adapter's low-rank product to what the base layer computes (Hu et al. 2021)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from glmchat.engine.quantize.linear import QuantEmbedding, QuantLinear


@dataclass(slots=True)
class Change:
    """What one adapter changes in one layer, read and checked; everything in float32 but replaced weights.

    a [rank, in] and b [out, rank]; b is not scaled yet. For an embedding a is [rank, vocab] and b [width, rank].
    """

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    scale: float = 1.0
    magnitude: torch.Tensor | None = None  # DoRA: the length of each row of the changed matrix, [rows of b]
    b_bias: torch.Tensor | None = None
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)  # parameter -> trained value
    is_embedding: bool = False
    tokens: tuple[int, ...] = ()
    rows: torch.Tensor | None = None  # in the place of those of `tokens`, [tokens, width]

    @property
    def nbytes(self) -> int:
        tensors = (self.a, self.b, self.magnitude, self.b_bias, self.rows, *self.replaced.values())
        return sum(t.nbytes for t in tensors if t is not None)


class LowRank:
    """y * gain + offset + (x @ down) @ up: all active adapters of one layer in two small products.

    down [in, rank], up [rank, out], both in float32 whatever the activations are. gain and offset [out], or None.
    """

    def __init__(
        self,
        down: torch.Tensor,
        up: torch.Tensor,
        gain: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
    ) -> None:
        self.down, self.up, self.gain, self.offset = down, up, gain, offset

    def add(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The base's output y [..., out] for the input x [..., in], changed; y itself may be overwritten."""
        if self.gain is not None:
            y = y * self.gain.to(y.dtype)
        if self.offset is not None:
            y = y + self.offset.to(y.dtype)
        if not self.down.shape[1]:
            return y
        if y.dim() == 2 and y.dtype == x.dtype == self.up.dtype:  # decoding counts operations: two, and no more
            return y.addmm_(torch.mm(x, self.down), self.up)
        return y + (x.to(self.down.dtype) @ self.down @ self.up).to(y.dtype)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.down, self.up, self.gain, self.offset) if t is not None)


class AdaptedLinear(nn.Module):
    """A linear layer, dense or packed, with its active adapters. `base` is the very module that it stands in for."""

    def __init__(self, base: nn.Module, change: LowRank) -> None:
        super().__init__()
        self.base = base
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.change.add(self.base(x), x)


class AdaptedEmbedding(nn.Module):
    """An embedding with its active adapters; a tied head goes on multiplying by `base`, as it does in PEFT."""

    def __init__(
        self,
        base: nn.Module,
        down: torch.Tensor,
        up: torch.Tensor,
        rows: nn.Module | None = None,
        gain: torch.Tensor | None = None,
    ) -> None:
        """down [vocab, rank], up [rank, width] in float32. rows: trained rows in the place of the base's.
        gain [width]: factors of a DoRA."""
        super().__init__()
        self.base = base
        self.rows = rows
        self.down, self.up, self.gain = down, up, gain

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = cast(torch.Tensor, (self.base if self.rows is None else self.rows)(ids))
        if self.gain is not None:
            rows = rows * self.gain.to(rows.dtype)
        if not self.down.shape[1]:
            return rows.to(self.dtype) if self.rows is not None else rows
        return rows + (self.down[ids] @ self.up).to(rows.dtype)

    @property
    def dtype(self) -> torch.dtype:
        weight = getattr(self.base, "weight", None)
        return weight.dtype if isinstance(weight, torch.Tensor) else cast(torch.dtype, self.base.dtype)


def bare(module: nn.Module) -> nn.Module:
    """The base layer behind an adapted one, else the module itself."""
    return module.base if isinstance(module, AdaptedLinear | AdaptedEmbedding) else module


def side_by_side(parts: Sequence[nn.Module]) -> LowRank | None:
    """The changes of layers that read one input, as one change of their outputs side by side.

    None if none of them has one. `up` is then block-diagonal; with ranks of 8 to 64 its zeros cost less than further
    products would.
    """
    changes = [part.change if isinstance(part, AdaptedLinear) else None for part in parts]
    if not any(changes):
        return None
    widths = [_width(bare(part)) for part in parts]
    device = next(change.down.device for change in changes if change)
    down = torch.cat([change.down for change in changes if change], 1)
    up = torch.zeros(down.shape[1], sum(widths), device=device)
    gain = torch.ones(sum(widths), device=device)
    offset = torch.zeros(sum(widths), device=device)
    row = column = 0
    for change, width in zip(changes, widths, strict=True):
        if change is not None:
            rank = change.up.shape[0]
            up[row : row + rank, column : column + width] = change.up
            row += rank
            if change.gain is not None:
                gain[column : column + width] = change.gain
            if change.offset is not None:
                offset[column : column + width] = change.offset
        column += width
    gains = any(change and change.gain is not None for change in changes)
    offsets = any(change and change.offset is not None for change in changes)
    return LowRank(down, up, gain if gains else None, offset if offsets else None)


def _width(module: nn.Module) -> int:
    return int(cast(int, module.out_features))


Weighted = tuple[Change, float]  # what an adapter changes in a layer, and the weight it was activated with
_ROWS = 1024  # of a matrix that is dequantised at a time


def adapted_linear(base: nn.Module, changes: Sequence[Weighted]) -> AdaptedLinear:
    """base with every change: A and B concatenated along the rank, so that ten adapters cost two products."""
    downs, ups = [], []
    gain: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    out, device = cast(int, base.out_features), device_of_layer(base)
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
    return torch.cat([rows.norm(dim=1) for rows in _changed_rows(base, a, b)])


def column_lengths(base: nn.Module, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Lengths of the columns of W + B A, [width]: DoRA takes an embedding's vectors the other way round."""
    return torch.stack([rows.square().sum(0) for rows in _changed_rows(base, a, b)]).sum(0).sqrt()


def own_factor(embedding: nn.Module) -> float:
    own = getattr(embedding, "embed_scale", 1.0)
    return float(own) if isinstance(own, int | float) or torch.is_tensor(own) else 1.0


def rows_of(base: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    packed = base.linear if isinstance(base, QuantEmbedding) else base
    return packed.rows(tokens) if isinstance(packed, QuantLinear) else cast(torch.Tensor, packed.weight)[tokens]


def _changed_rows(base: nn.Module, a: torch.Tensor, b: torch.Tensor) -> Iterator[torch.Tensor]:
    """W + B A, a few rows at a time. a [rank, in], b [out, rank]"""
    packed = base.linear if isinstance(base, QuantEmbedding) else base
    for start in range(0, b.shape[0], _ROWS):
        part = b[start : start + _ROWS]
        if isinstance(packed, QuantLinear):
            rows = packed.rows(torch.arange(start, start + len(part), device=b.device))
        else:
            rows = cast(torch.Tensor, base.weight)[start : start + len(part)].float()
        yield rows + part @ a


def adapted_embedding(base: nn.Embedding | QuantEmbedding, changes: Sequence[Weighted]) -> AdaptedEmbedding:
    """base with every change of its rows. A factor of the base's own (Gemma's) holds for what is added too."""
    trained = [(c, w) for c, w in changes if "weight" in c.replaced]
    rows = replaced(base, trained, dtype_of(base)) if trained else None
    factor = own_factor(base)
    device = device_of_layer(base)
    downs, ups = [], []
    gain: torch.Tensor | None = None
    for change, weight in changes:
        if change.a is None or change.b is None:
            continue
        up = change.b.t() * (change.scale * weight)  # [rank, width]
        if change.magnitude is not None:
            start = rows if rows is not None and "weight" in change.replaced else base
            ratio = change.magnitude / column_lengths(start, up, change.a.t())
            up = up * ratio
            gain = (torch.ones_like(ratio) if gain is None else gain) + (ratio - 1)
        downs.append(change.a.t())
        ups.append(up * factor)
    down = torch.cat(downs, 1) if downs else torch.zeros(base.num_embeddings, 0, device=device)
    up_all = torch.cat(ups) if ups else torch.zeros(0, base.embedding_dim, device=device)
    return AdaptedEmbedding(base, down.contiguous(), up_all.contiguous(), rows, gain)


def replaced(base: nn.Module, changes: Sequence[Weighted], dtype: torch.dtype) -> nn.Module:
    """A module like `base` with trained parameters: base + sum of weight * (trained - base), per parameter.

    One change of weight 1 is taken as it was saved. Packed matrices become dense ones here, and only here: in `dtype`,
    that of the model's activations, which they do not say themselves.
    """
    if not isinstance(base, QuantLinear):
        dtype = dtype_of(base)
    names = dict.fromkeys(name for change, _ in changes for name in change.replaced)
    values = {name: _blend(_own(base, name), [(c.replaced[name], w) for c, w in changes if name in c.replaced], dtype)
              for name in names}  # fmt: skip
    if type(base) in (nn.Linear, QuantLinear):
        return _linear(cast("nn.Linear | QuantLinear", base), values, dtype)
    if type(base) in (nn.Embedding, QuantEmbedding):
        embedding = cast("nn.Embedding | QuantEmbedding", base)
        with torch.device("meta"):
            made = nn.Embedding(len(values["weight"]), embedding.embedding_dim)
        made.weight = nn.Parameter(values["weight"], requires_grad=False)
        return made
    # A subclass computes in a way of its own (Gemma's embedding has a factor): its copy does too.
    clone = copy.copy(base)
    if isinstance(clone, nn.Embedding):
        clone.num_embeddings = len(values["weight"])
    clone._parameters = {**base._parameters, **{k: nn.Parameter(v, requires_grad=False) for k, v in values.items()}}
    return clone


def _linear(base: nn.Linear | QuantLinear, values: dict[str, torch.Tensor], dtype: torch.dtype) -> nn.Linear:
    bias = values.get("bias", base.bias)
    with torch.device("meta"):  # of the trained matrix's measures: it may have other words
        made = nn.Linear(base.in_features, len(values["weight"]), bias=bias is not None)
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


def dtype_of(base: nn.Module) -> torch.dtype:
    """Of the activations that this module works on."""
    if isinstance(base, QuantEmbedding):
        return base.dtype
    weight = getattr(base, "weight", None)
    return weight.dtype if isinstance(weight, torch.Tensor) else torch.float32


def device_of_layer(base: nn.Module) -> torch.device:
    tensor = next((t for t in (*base.parameters(), *base.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device


Projection = Callable[[torch.Tensor], torch.Tensor]


def fused(parts: Sequence[nn.Module]) -> Projection:
    """x [n, in] -> the outputs of all `parts` side by side [n, sum of out]: query, key and value; gate and up.

    Packed layers of one kind become one product over one block of memory, of which they keep views; anything else is
    computed part by part. What adapters add to some of the parts is added to the whole.
    """
    bases = [bare(part) for part in parts]
    project = _fused_bases(bases)
    change = side_by_side(parts)
    if change is None:
        return project

    def changed(x: torch.Tensor) -> torch.Tensor:
        return change.add(project(x), x)

    return changed


def _fused_bases(parts: Sequence[nn.Module]) -> Projection:
    linears = [part for part in parts if type(part) is QuantLinear]
    whole = QuantLinear.fused(linears) if len(linears) == len(parts) else None
    if whole is not None:
        return whole.forward

    def project(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in parts], -1)

    return project
