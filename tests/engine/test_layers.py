"""What a layer computes again for its backward pass gives the gradients of the plain function, and keeps less."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from glmchat.engine.models.layers import RMSNorm, swiglu

DTYPES = [torch.float32, torch.bfloat16]


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(st.integers(1, 6), st.integers(1, 9), st.sampled_from(DTYPES))
def test_the_gated_product_is_that_of_torch_with_its_gradients(rows: int, size: int, dtype: torch.dtype) -> None:
    both = drawn(rows, 2 * size, dtype=dtype).requires_grad_()
    other = both.detach().clone().requires_grad_()
    along = drawn(rows, size, dtype=dtype, seed=1)
    y = swiglu(both)
    expected = functional.silu(other[:, :size]) * other[:, size:]
    torch.autograd.backward(y, along)
    torch.autograd.backward(expected, along)
    assert both.grad is not None and other.grad is not None
    assert torch.equal(y, expected) and torch.equal(both.grad, other.grad)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_that_of_torch_with_its_gradients(dtype: torch.dtype, learns: bool) -> None:
    norm, theirs = RMSNorm(32, 1e-5), nn.RMSNorm(32, 1e-5)
    weight = drawn(32, dtype=torch.float32, seed=2).to(dtype)
    for each in (norm, theirs):
        each.weight = nn.Parameter(weight.clone() if each is norm else weight.float(), requires_grad=learns)
    x = drawn(5, 32, dtype=dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    along = drawn(5, 32, dtype=dtype, seed=3)
    torch.autograd.backward(norm(x), along)
    torch.autograd.backward(theirs(wide), along.float())
    near = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(norm(x).float(), theirs(wide), rtol=near, atol=near)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.float(), wide.grad, rtol=near, atol=near)
    if learns:
        assert norm.weight.grad is not None
        torch.testing.assert_close(norm.weight.grad.float(), theirs.weight.grad, rtol=near, atol=near)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_what_goes_in_is_kept_for_the_backward_pass(dtype: torch.dtype) -> None:
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    both, norm = drawn(7, 64, dtype=dtype).requires_grad_(), RMSNorm(64, 1e-5).to(dtype).requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = swiglu(both), norm(both)
    assert sum(kept.values()) == both.nbytes + norm.weight.nbytes
    assert all(each.requires_grad for each in found)
