"""Products with frozen matrices that gradients pass through, and the loss of the head.

A packed matrix stays packed: forward is the kernel that the engine multiplies with, backward multiplies by blocks of
its rows, dequantised one after the other into one buffer. Nothing is kept between the two but what torch keeps anyway.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from glmchat.engine.quantize.kernels import BLOCK_VALUES
from glmchat.engine.quantize.linear import QuantLinear

_CHUNK_BYTES = 128 * 2**20  # of float32 logits at a time


class Packed(nn.Module):
    """A QuantLinear that gradients pass through; it has no gradient of its own."""

    def __init__(self, base: QuantLinear) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (x.requires_grad and torch.is_grad_enabled()):
            return cast(torch.Tensor, self.base(x))
        return cast(torch.Tensor, _Product.apply(x, self.base))  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantLinear) -> torch.Tensor:
        ctx.layer = layer
        return cast(torch.Tensor, layer(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        flat = times_rows(grad.reshape(-1, grad.shape[-1]), ctx.layer)
        return flat.view(*grad.shape[:-1], -1), None


def times_rows(grad: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """grad [n, out] times the matrix [out, in] of a frozen layer: [n, in] in grad's dtype."""
    if not isinstance(layer, QuantLinear):
        return grad @ cast(torch.Tensor, layer.weight).to(grad.dtype)
    step = max(1, BLOCK_VALUES // layer.in_features)
    if step >= layer.out_features:
        return grad @ layer.dequantise(grad.dtype)
    total = torch.zeros(len(grad), layer.in_features, dtype=torch.float32, device=grad.device)
    buffer = grad.new_empty(step, layer.in_features)
    for start in range(0, layer.out_features, step):
        ids = torch.arange(start, min(start + step, layer.out_features), device=grad.device)
        block = buffer[: len(ids)]
        block.copy_(layer.rows(ids))
        part = grad[:, start : start + len(ids)]
        if grad.dtype == torch.float32:
            total.addmm_(part, block)
        else:
            total += part @ block
    return total.to(grad.dtype)


class _HeadLoss(torch.autograd.Function):
    """Cross entropies [m] of rows x [m, hidden] under a frozen head; logits exist for a few rows at a time."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, targets: torch.Tensor, head: nn.Module, hits: torch.Tensor | None
    ) -> torch.Tensor:
        grads = torch.empty_like(x) if x.requires_grad else None
        losses = x.new_empty(len(x), dtype=torch.float32)
        for start, logits, words in _chunks(x.detach(), targets, head):
            _count(hits, logits, words)
            lengths = logits.logsumexp(1, keepdim=True)
            losses[start : start + len(words)] = (lengths - logits.gather(1, words)).squeeze(1)
            if grads is not None:
                share = logits.sub_(lengths).exp_()
                share.scatter_add_(1, words, torch.full_like(lengths, -1.0))
                grads[start : start + len(share)] = times_rows(share.to(x.dtype), head)
        ctx.save_for_backward(grads)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grads,) = ctx.saved_tensors
        return grads * grad.to(grads.dtype)[:, None], None, None, None


class _LearningHeadLoss(torch.autograd.Function):
    """The sum of them, for a head [vocab, hidden] that learns: its gradient is computed in the same pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        dtype: torch.dtype,
        hits: torch.Tensor | None,
    ) -> torch.Tensor:
        own, rows = weight.to(dtype), x.to(dtype)
        with torch.device("meta"):
            head = nn.Linear(own.shape[1], own.shape[0], bias=False)
        head.weight = nn.Parameter(own, requires_grad=False)
        grads, for_head = torch.empty_like(x), torch.zeros_like(weight)
        total = x.new_zeros((), dtype=torch.float64)
        for start, logits, words in _chunks(rows, targets, head):
            _count(hits, logits, words)
            lengths = logits.logsumexp(1, keepdim=True)
            total += (lengths - logits.gather(1, words)).sum(dtype=torch.float64)
            share = logits.sub_(lengths).exp_()
            share.scatter_add_(1, words, torch.full_like(lengths, -1.0))
            share = share.to(dtype)
            grads[start : start + len(share)] = share @ own
            for_head += share.t() @ rows[start : start + len(share)]
        ctx.grads = grads, for_head
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        rows, head = ctx.grads
        return rows.mul_(grad), head.mul_(grad), None, None, None


def logit_rows(vocabulary: int) -> int:
    """For how many rows logits exist at a time."""
    return max(16, _CHUNK_BYTES // (4 * vocabulary))


def _chunks(x: torch.Tensor, targets: torch.Tensor, head: nn.Module) -> Any:
    """(first row, float32 logits [k, vocab], targets [k, 1]) for a few rows after the other."""
    step = logit_rows(cast(int, head.out_features))
    for start in range(0, len(x), step):
        logits = head(x[start : start + step]).float()
        yield start, logits, targets[start : start + step, None]


def _count(hits: torch.Tensor | None, logits: torch.Tensor, words: torch.Tensor) -> None:
    """Add to `hits` how many of the words [k, 1] have the highest of their logits [k, vocab]."""
    if hits is not None:
        hits += (logits.argmax(1, keepdim=True) == words).sum().to(hits.device)


def head_loss(
    x: torch.Tensor, targets: torch.Tensor, head: nn.Module, hits: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum of the cross entropies of targets [m] under the head's logits of x [m, hidden], in float32; 0 for no rows.

    hits: a number that those of the targets are added to which have the highest logit.
    """
    if type(head) is nn.Linear and head.bias is None and head.weight.requires_grad and torch.is_grad_enabled():
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
        with torch.autocast(kind, enabled=False):
            return cast(torch.Tensor, _LearningHeadLoss.apply(x, head.weight, targets, dtype, hits))
    return head_losses(x, targets, head, hits).double().sum().float()


def head_losses(
    x: torch.Tensor, targets: torch.Tensor, head: nn.Module, hits: torch.Tensor | None = None
) -> torch.Tensor:
    """Each of them: [m], float32."""
    if not len(x):
        return x.sum(1).float()
    learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in head.parameters())
    if learns:  # a LoRA on the head, by autograd
        return losses_of_logits(head(x), targets, hits)
    frozen = head.base if isinstance(head, Packed) else head
    return cast(torch.Tensor, _HeadLoss.apply(x, targets, frozen, hits))  # type: ignore[no-untyped-call]


def losses_of_logits(logits: torch.Tensor, targets: torch.Tensor, hits: torch.Tensor | None = None) -> torch.Tensor:
    _count(hits, logits.detach(), targets[:, None])
    return functional.cross_entropy(logits.float(), targets, reduction="none")
