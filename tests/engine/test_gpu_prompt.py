"""Prompts on a card: who sees whom without a mask, and a host that is never far ahead.

Covers engine/gpu/prompt.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from glmchat.engine.gpu.prompt import (
    AHEAD,
    FROM_THE_END,
    Pace,
    Seen,
    Stopped,
    attend_rows,
    by_blocks,
    by_flash,
    watch_layers,
)
from glmchat.engine.models.chatglm import Layout


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize(("before", "count", "whole"), [(0, 7, 0), (5, 7, 0), (9, 1, 0), (0, 7, 4), (3, 7, 7)])
def test_rows_see_what_the_mask_would_let_them_see(
    heads: int, kv_heads: int, before: int, count: int, whole: int
) -> None:
    noise = torch.Generator().manual_seed(heads + before)
    query = torch.randn(count, heads, 16, generator=noise)
    keys, values = (torch.randn(kv_heads, before + count, 16, generator=noise) for _ in range(2))
    mask = torch.ones(count, before + count, dtype=torch.bool).tril(before)
    mask[:whole, : before + whole] = True
    each_keys, each_values = (part.repeat_interleave(heads // kv_heads, 0).double() for part in (keys, values))
    right = functional.scaled_dot_product_attention(
        query.transpose(0, 1).double(), each_keys, each_values, attn_mask=mask
    )
    mine = attend_rows(query, keys, values, Seen(whole, before + whole))
    assert torch.allclose(mine.double(), right.transpose(0, 1).reshape(count, -1), atol=1e-6)


@pytest.mark.parametrize("kernel", [by_flash, by_blocks])
def test_the_cards_own_kernels_take_heads_that_share_their_keys(kernel: Any) -> None:
    """No card is asked: operators without numbers check what they are given, and say what comes back."""
    query = torch.empty(2, 3, 5, 64, device="meta", dtype=torch.float16)
    shared = torch.empty(2, 1, 12, 64, device="meta", dtype=torch.float16).expand(2, 3, 12, 64)
    made = kernel(query, shared, shared)
    assert made.shape == query.shape
    assert made.dtype == query.dtype


def test_the_numbers_that_torch_gives_its_masks_are_those_that_are_passed() -> None:
    from torch.nn.attention.bias import CausalVariant

    assert int(CausalVariant.LOWER_RIGHT) == FROM_THE_END


@pytest.mark.parametrize("visible", [5, 8])
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize(("start", "count"), [(0, 9), (9, 4), (6, 5)])
def test_chatglms_two_kinds_of_rows_are_its_mask(start: int, count: int, prefix: int, visible: int) -> None:
    layout = Layout(context=5, mask_position=4, is_gmask=True, visible=visible, frozen=True)
    mask = layout.mask(start, count, prefix, torch.device("cpu"))
    seen = layout.mask(start, count, prefix, torch.device("meta"))
    assert isinstance(mask, torch.Tensor)
    assert isinstance(seen, Seen)
    mine = torch.ones(count, prefix + start + count, dtype=torch.bool).tril(prefix + start)
    mine[: seen.rows] = torch.arange(prefix + start + count) < seen.columns
    assert torch.equal(mine, mask)


class Mark:
    """Of a card that reaches one more of its marks each time that somebody looks."""

    set = reached = 0

    def record(self) -> None:
        Mark.set += 1
        self.number = Mark.set

    def query(self) -> bool:
        Mark.reached += self.number > Mark.reached
        return self.number <= Mark.reached


class Stuck(Mark):
    def query(self) -> bool:
        return False


def test_the_host_is_never_more_than_two_layers_ahead_and_its_progress_is_the_cards() -> None:
    Mark.set = Mark.reached = 0
    told: list[int] = []
    pace = Pace(Mark)
    between = watch_layers(None, lambda done, total: told.append(done), 0, 300, 300, 29, pace)
    assert between is not None
    for layer in range(29):
        between()
        assert Mark.set - Mark.reached <= AHEAD
        assert not told or told[-1] <= 10 * Mark.reached, layer
    assert told == sorted(told)
    assert pace.behind(None, 0) == 0
    assert Mark.reached == Mark.set


def test_a_stop_is_heard_though_the_card_is_busy() -> None:
    between = watch_layers(lambda: Stuck.set > 4, None, 0, 300, 300, 29, Pace(Stuck))
    assert between is not None
    with pytest.raises(Stopped):
        for _ in range(29):
            between()
