"""What happens while a prompt is read: a stop is heard, progress told; on a card nobody builds a mask, and the host
stays near the card."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.backends import cuda
from torch.nn import functional

AHEAD = 2  # layers that the host may be ahead: the card is never idle, and a stop waits for no more than these
_POLL = 0.0002  # seconds


@dataclass(frozen=True, slots=True)
class Seen:
    """What the rows of a prompt see: the first `rows` of them `columns` columns of the cache, each other row itself and
    everything before it; the last row is the cache's last column."""

    rows: int = 0
    columns: int = 0


def attend_rows(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: Seen) -> torch.Tensor:
    """Attention of several rows, as `layers.attend`: query [length, heads, head_dim], keys and values of the cache
    [kv_heads, total, head_dim] -> [length, heads * head_dim].

    Key heads are the batch and the query heads of each its heads, so no key is copied for its query heads. Two calls
    where some rows see forwards: of these without a mask, of the others causally from the last column back.
    """
    length, heads, head_dim = query.shape
    kv_heads, total, _ = keys.shape
    group = heads // kv_heads
    grouped = query.view(length, kv_heads, group, head_dim).permute(1, 2, 0, 3)  # [kv_heads, group, length, head_dim]
    shared = (kv_heads, group, total, head_dim)
    keys, values = keys[:, None].expand(shared), values[:, None].expand(shared)
    parts = []
    if seen.rows:
        columns = seen.columns
        parts.append(
            functional.scaled_dot_product_attention(
                grouped[:, :, : seen.rows], keys[:, :, :columns], values[:, :, :columns]
            )
        )
    if rest := length - seen.rows:
        parts.append(_look_back(grouped[:, :, length - rest :], keys, values))
    attended = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    return attended.permute(2, 0, 1, 3).reshape(length, -1)


def _look_back(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """query [batch, heads, rows, head_dim], the last row of which is the last of keys and values [batch, heads, total,
    head_dim]: each looks at itself and what stands before it.

    What `torch.nn.attention.bias.causal_lower_right` does, whose import brings a compiler along.
    """
    rows, total = query.shape[2], keys.shape[2]
    if rows == total:
        return functional.scaled_dot_product_attention(query, keys, values, is_causal=True)
    if query.device.type == "cuda":
        params = cuda.SDPAParams(query, keys, values, None, 0.0, False, False)
        if query.shape[3] % 8 == 0 and cuda.can_use_flash_attention(params):
            return by_flash(query, keys, values)
        if cuda.can_use_efficient_attention(params):
            return by_blocks(query, keys, values)
    mask = torch.ones(rows, total, dtype=torch.bool, device=query.device).tril_(total - rows)
    return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask)


def by_flash(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Flash attention, whose causal mask ends in the last column."""
    made: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, keys, values, is_causal=True)[0]
    return made


FROM_THE_END = 2  # CustomMaskType::CausalFromBottomRight


def by_blocks(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The memory-efficient kernel of older cards and of float32, with the same mask."""
    swapped = (part.transpose(1, 2) for part in (query, keys, values))
    nothing = (None,) * 5  # bias, and the lengths of sequences of different ones
    made: torch.Tensor = torch.ops.aten._efficient_attention_forward(*swapped, *nothing, 0.0, FROM_THE_END)[0]
    return made.transpose(1, 2)


class Pace:
    """Marks in a card's queue of work, one between two layers, and waiting for them."""

    def __init__(self, make_event: Callable[[], Any]) -> None:
        """make_event: of a mark with `record` and `query`, such as torch.cuda.Event."""
        self._make_event = make_event
        self._open: deque[Any] = deque()

    def behind(self, stopped: Callable[[], bool] | None, ahead: int = AHEAD) -> int:
        """Sets a mark and waits until at most `ahead` marks are not reached; returns how many. `stopped` ends it."""
        mark = self._make_event()
        mark.record()
        self._open.append(mark)
        while True:
            while self._open and self._open[0].query():
                self._open.popleft()
            if len(self._open) <= ahead or (stopped is not None and stopped()):
                return len(self._open)
            time.sleep(_POLL)


OnPrefill = Callable[[int, int], None]  # (positions done, positions in all)


class Stopped(Exception):
    """Raised between layers when the answer is no longer wanted."""


def watch_layers(
    cancelled: Callable[[], bool] | None,
    on_prefill: OnPrefill | None,
    start: int,
    end: int,
    total: int,
    layers: int,
    pace: Pace | None,
) -> Callable[[], None] | None:
    """What happens between the layers of one prefill step: wait for the card, hear a stop, tell how far it is."""
    if cancelled is None and on_prefill is None and pace is None:
        return None
    passed = 0

    def between_layers() -> None:
        nonlocal passed
        done = min(passed, layers) - (0 if pace is None else pace.behind(cancelled))  # negative: of the step before
        if cancelled is not None and cancelled():
            raise Stopped
        there = start + (end - start) * done // (layers + 1)
        if on_prefill is not None and done and there > 0:
            on_prefill(there, total)
        passed += 1

    return between_layers
