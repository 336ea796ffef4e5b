"""Parts that several architectures share."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from glmchat.engine.gpu.prompt import Seen, attend_rows
from glmchat.engine.models.documents import Documents
from glmchat.engine.native.attention import attend_stored, from_int8
from glmchat.engine.quantize.linear import QuantEmbedding


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019): x / rms(x) * weight, the mean taken in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() == self.size and x.dtype == torch.float32 and x.is_cpu and not x.requires_grad:
            # Decoding: fewer operations, a third of the time.
            row = x.view(-1)
            mean = torch.dot(row, row).item() / self.size + self.eps
            scale = mean**-0.5 if mean > 0 else math.inf if mean == 0 else math.nan  # an epsilon may be 0, or below
            return torch.mul(x, self.weight).mul_(scale)
        return computed_again(partial(_normed, eps=self.eps), x, self.weight)


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * scale).to(weight.dtype) * weight  # also of a residual stream wider than activations


def swiglu(both: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020) of [n, 2 * size], the gate first: [n, size]."""
    return computed_again(_gated, both)


def _gated(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def computed_again(function: Callable[..., torch.Tensor], x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """function(x, *others), whose backward pass computes it once more: what comes up in between is not kept for it.

    For what is cheap to compute and wide; the gradients are, bit for bit, those of the function by itself.
    """
    if not x.requires_grad:
        return function(x, *others)
    return cast(torch.Tensor, _Again.apply(function, x, *others))  # type: ignore[no-untyped-call]


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., torch.Tensor], *given: torch.Tensor) -> torch.Tensor:
        ctx.function = function
        ctx.save_for_backward(*given)
        return function(*given)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        given = [tensor.detach().requires_grad_(need) for tensor, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            y = ctx.function(*given)
        found = iter(torch.autograd.grad(y, [tensor for tensor in given if tensor.requires_grad], grad))
        return None, *(next(found) if need else None for need in needed)


class RotaryTable:
    """cos and sin for the two-halves rotary embedding (Su et al. 2021), grown as positions are asked for.

    With sin's first half negated, rotating is `x * cos + roll(x, half) * sin`: three operations whatever the heads.
    """

    def __init__(self, frequencies: torch.Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
        """frequencies [head_dim / 2] in radians per position; scale multiplies cos and sin (attention factor)."""
        self._frequencies = frequencies.float()
        self._dtype = dtype
        self._scale = scale
        self._half = frequencies.shape[0]
        self._length = 0
        self._grow(256)

    def _grow(self, length: int) -> None:
        positions = torch.arange(length, dtype=torch.float32, device=self._frequencies.device)
        angles = torch.outer(positions, self._frequencies)  # [length, head_dim / 2]
        cos, sin = angles.cos() * self._scale, angles.sin() * self._scale
        self._cos = torch.cat((cos, cos), -1).unsqueeze(1).to(self._dtype)  # [length, 1, head_dim]
        self._sin = torch.cat((-sin, sin), -1).unsqueeze(1).to(self._dtype)
        self._length = length

    def at(self, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin [count, 1, head_dim] of the positions from `start`."""
        end = start + count
        if end > self._length:
            self._grow(max(end, 2 * self._length))
        return self._cos[start:end], self._sin[start:end]

    def rotate(self, x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """x [length, heads, head_dim] rotated to its positions; `table` comes from `at`."""
        cos, sin = table
        return torch.addcmul(x * cos, x.roll(self._half, -1), sin)


def rotate_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Interleaved partial rotary: the first dimensions of x [length, heads, head_dim] are pairs of neighbours that are
    rotated, the rest stays. cos and sin [length, 1, pairs] are float32."""
    width = 2 * cos.shape[-1]
    even, odd = x[..., :width].float().view(*x.shape[:-1], -1, 2).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((rotated.to(x.dtype), x[..., width:]), dim=-1)


Mask = torch.Tensor | Seen | Documents | None


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Grouped-query attention of one sequence.

    query [length, heads, head_dim]; keys, values [kv_heads, total, head_dim], or rows as a cache stores them; mask bool
    [length, total], True where it may look, or None: one row looks at everything, several rows that are the whole
    sequence look back causally. On a card `Seen` takes its place, and several rows look back causally whatever stands
    before them. `Documents`: the rows are several sequences.
    Returns [length, heads * head_dim].
    """
    length, heads, head_dim = query.shape
    kv_heads = keys.shape[0]
    if isinstance(mask, Documents):
        return mask.attend(query, keys, values)
    if keys.dtype != query.dtype:
        if length == 1 and (attended := attend_stored(query, keys, values)) is not None:
            return attended
        if keys.dtype == torch.int8:
            keys, values = from_int8(keys), from_int8(values)
        keys, values = keys.to(query.dtype), values.to(query.dtype)
    if length == 1:
        # The heads that share a key head are its rows, so the cache is read once and never expanded.
        grouped = query.view(kv_heads, heads // kv_heads, head_dim)
        if query.dtype == torch.float32:  # without bfloat16 instructions two products beat the fused operator
            weights = torch.baddbmm(query.new_empty(1), grouped, keys.transpose(1, 2), beta=0, alpha=head_dim**-0.5)
            return torch.bmm(torch.softmax(weights, -1), values).view(1, -1)
        # Not `view`: the memory-efficient kernel of older cards gives its result transposed.
        return functional.scaled_dot_product_attention(grouped[None], keys[None], values[None]).reshape(1, -1)
    if not query.is_cpu:
        return attend_rows(query, keys, values, mask if isinstance(mask, Seen) else Seen())
    attended = functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=cast(torch.Tensor | None, mask),
        is_causal=mask is None,
        enable_gqa=heads != kv_heads,
    )
    return attended[0].transpose(0, 1).reshape(length, -1)


def causal_mask(start: int, count: int, device: torch.device) -> torch.Tensor | None:
    """bool [count, start + count] for rows that follow `start` cached ones; None where `attend` needs none."""
    if start == 0 or count == 1 or device.type != "cpu":
        return None
    return torch.ones(count, start + count, dtype=torch.bool, device=device).tril_(start)


def prepare_embedding(embedding: nn.Module, dtype: torch.dtype) -> None:
    """A quantised embedding gives its rows in the activations' dtype."""
    if isinstance(embedding, QuantEmbedding):
        embedding.dtype = dtype


def tied_head(embedding: nn.Module) -> nn.Module:
    """The embedding matrix as the linear layer that a tied head is. An adapter on the embedding does not change it."""
    embedding = cast(nn.Module, getattr(embedding, "base", embedding))
    if isinstance(embedding, QuantEmbedding):
        return embedding.linear
    weight = cast(nn.Embedding, embedding).weight
    with torch.device("meta"):
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight = weight
    return head


def tied_logits(x: torch.Tensor, embedding: nn.Module, head: nn.Module | None = None) -> torch.Tensor:
    """Hidden states [n, hidden] -> float32 logits [n, vocab]; without a head it is the embedding matrix itself."""
    return cast(torch.Tensor, (tied_head(embedding) if head is None else head)(x)).float()
