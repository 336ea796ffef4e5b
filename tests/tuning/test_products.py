"""Gradients through packed matrices are those through the same numbers laid out; so is the loss of the head."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from glmchat.engine.quantize.int4 import quantise_int4
from glmchat.engine.quantize.int8 import quantise_int8
from glmchat.engine.quantize.linear import QuantLinear
from glmchat.tuning import products
from glmchat.tuning.products import Packed, head_loss, times_rows


def packed_layer(bits: int, rows: int, columns: int, bias: bool = False) -> QuantLinear:
    noise = torch.Generator().manual_seed(bits)
    weight = torch.randn(rows, columns, generator=noise)
    if bits == 4:
        four = quantise_int4(weight, 32).stored()
        layer = QuantLinear.from_int4(four.q, four.scale, four.zero)
    else:
        eight = quantise_int8(weight)
        layer = QuantLinear.from_int8(eight.q, eight.scale)
    layer.bias = torch.randn(rows, generator=noise) if bias else None
    layer.multiply_exactly()
    return layer


@pytest.mark.parametrize("block", [1 << 22, 64 * 7])  # the whole matrix at once, and blocks of seven rows
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dequantised_matrix(
    bits: int, block: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "BLOCK_VALUES", block)
    layer = packed_layer(bits, 96, 64, bias=True)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    y = Packed(layer)(x)
    expected = functional.linear(wide, layer.dequantise(), layer.bias)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    torch.autograd.backward((y.float() * direction).sum())
    torch.autograd.backward((expected * direction).sum())
    exact = dtype == torch.float32
    assert x.grad is not None and wide.grad is not None
    scale = float(wide.grad.abs().max())
    torch.testing.assert_close(
        y.float(), expected, rtol=0, atol=(1e-5 if exact else 0.02) * float(expected.abs().max())
    )
    torch.testing.assert_close(x.grad.float(), wide.grad, rtol=0, atol=(1e-5 if exact else 0.02) * scale)


def test_nothing_is_kept_for_the_backward_pass_of_a_packed_layer() -> None:
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(4, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Packed(packed_layer(4, 96, 64))(x)
    assert kept == []


@pytest.mark.parametrize("rows", [3, 1000])  # logits for a few rows at a time, and for all at once
@pytest.mark.parametrize("kind", ["dense", "bias", 4, 8])
def test_the_loss_of_the_head_is_cross_entropy_with_its_gradient(
    kind: str | int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "logit_rows", lambda vocabulary: rows)
    if isinstance(kind, int):
        head: nn.Module = packed_layer(kind, 96, 64)
        matrix, bias = head.dequantise(), None  # type: ignore[operator]
    else:
        head = nn.Linear(64, 96, bias=kind == "bias").requires_grad_(False)
        matrix, bias = head.weight, head.bias
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    other = x.detach().clone().requires_grad_()
    targets = torch.randint(0, 96, (10,), generator=torch.Generator().manual_seed(4))
    loss = head_loss(x, targets, head)
    expected = functional.cross_entropy(functional.linear(other, matrix, bias), targets, reduction="sum")
    torch.autograd.backward(loss * 0.3)
    torch.autograd.backward(expected * 0.3)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_torchs_own_chunked_loss_gives_the_same() -> None:
    head = nn.Linear(64, 96, bias=False).requires_grad_(False)
    x, other = (torch.ones(10, 64).requires_grad_() for _ in range(2))
    targets = torch.arange(10)
    torch.autograd.backward(head_loss(x, targets, head))
    torch.autograd.backward(torch.nn.functional.linear_cross_entropy(other, head.weight, targets, reduction="sum"))
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_a_product_with_a_dense_layer_is_a_product() -> None:
    layer, grad = nn.Linear(6, 4), torch.randn(3, 4)
    torch.testing.assert_close(times_rows(grad, layer), grad @ layer.weight)
