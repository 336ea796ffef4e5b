"""The key/value cache: allocated once, filled from the front, cut back by moving one number."""

from __future__ import annotations

from typing import Any

import torch

from glmchat.engine.native.attention import SCALE, to_int8
from glmchat.engine.native.pages import empty

FIRST = 2048  # positions that a cache on a card begins with


class KVCache:
    """Keys and values of every layer for one sequence; devices: of each layer, or one for all, the CPU if none.

    On the CPU all of `limit` is reserved at once: the system gives pages only when they are written. On a card a long
    context costs what is used of it because the cache grows there, in steps that double.

    keys[l], values[l]: [kv_heads, capacity, head_dim]; the first `length` positions are filled. An attached P-Tuning
    prefix takes the first `prefix` positions; they are part of `length`, and no token ids stand for them. Of the
    rotary or learnt positions it takes `shift`: none in P-Tuning v2, all of its length where PEFT trained it.
    Of a cache in torch.int8 each of these rows has its own scale: head_dim whole numbers and four bytes (`to_int8`).
    floor: the shortest that it was since somebody set it: what stands before has not changed. shared: positions that
    stand as in `book`, whose pages other caches may hold too (native/pages.py).
    """

    floor = shared = 0
    book: Any = None

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        limit: int,
        dtype: torch.dtype,
        *devices: str,
    ) -> None:
        places = devices if len(devices) == layers else (devices or ("cpu",))[:1] * layers
        capacity = limit if torch.device(places[0]).type == "cpu" else min(FIRST, limit)
        shape = (kv_heads, capacity, head_dim + (SCALE if dtype == torch.int8 else 0))
        self.keys = [empty(shape, dtype, device) for device in places]
        self.values = [empty(shape, dtype, device) for device in places]
        self.capacity = capacity
        self.limit = limit
        self.length = 0
        self.prefix = 0
        self.shift = 0
        self.addresses: Any = None  # of keys and values, as the compiled step wants them (models/step.py)
        self.layout: Any = None  # what a prefix-LM family must remember of its prompt between steps

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write key and value [kv_heads, new, head_dim] behind what is there; return views of all of it as it is
        stored, which `layers.attend` reads.

        `length` moves only when the whole forward pass is through (`advance`), so a stop between layers leaves the
        cache as it was.
        """
        start, count = self.length, key.shape[1]
        self.reserve(start + count)
        self.put(layer, start, key, value)
        keys = self.keys[layer].narrow(1, 0, start + count)  # narrow takes a third of the time of an index
        values = self.values[layer].narrow(1, 0, start + count)
        return keys, values

    def put(self, layer: int, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store key and value [kv_heads, n, head_dim] at the positions from `start`."""
        if self.keys[layer].dtype == torch.int8:
            key, value = to_int8(key), to_int8(value)
        self.keys[layer].narrow(1, start, key.shape[1]).copy_(key)
        self.values[layer].narrow(1, start, value.shape[1]).copy_(value)

    def reserve(self, length: int) -> None:
        """Have room for `length` positions, as far as the limit goes; what is filled is copied.

        Raises torch's error if the card has no memory for it; layers that have grown already then stay so.
        """
        if length <= self.capacity or self.capacity == self.limit:
            return
        capacity = self.capacity
        while capacity < length:
            capacity *= 2
        capacity = min(capacity, self.limit)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                if old.shape[1] < capacity:
                    tensors[layer] = old.new_empty(old.shape[0], capacity, old.shape[2])
                    tensors[layer].narrow(1, 0, self.length).copy_(old.narrow(1, 0, self.length))
        self.capacity = capacity

    @property
    def position(self) -> int:
        """The position of the next token as the network counts it."""
        return self.length - self.prefix + self.shift

    def advance(self, count: int) -> None:
        self.length += count

    def truncate(self, length: int) -> None:
        """Forget everything behind `length` (never into the prefix)."""
        self.length = max(self.prefix, min(self.length, length))
        self.floor = min(self.floor, self.length)
        self.shared = min(self.shared, self.length)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.keys, *self.values))
