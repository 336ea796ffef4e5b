"""P-Tuning v2: learnt keys and values that stand in front of the cache of every layer.

They are not rotated, they shift no positions, and every token sees all of them (Liu et al. 2021; THUDM's
modeling_chatglm.py, `get_prompt`). Those that PEFT trains for other families do shift positions.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from glmchat.checkpoints.spec import ModelSpec
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.models.variant import Variant


class PrefixEncoder(nn.Module):
    """The encoder under its checkpoint names: `embedding.weight`, and with a projection `trans.0`, `trans.2`.

    Kept in float32 whatever the model's dtype is, as the original keeps it. `inner` None: no projection, the embedding
    is the prefix itself.
    """

    def __init__(self, length: int, width: int, embedding_width: int, inner: int | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(length, embedding_width, dtype=torch.float32)
        if inner is not None:
            self.trans = nn.Sequential(
                nn.Linear(embedding_width, inner, dtype=torch.float32),
                nn.Tanh(),
                nn.Linear(inner, width, dtype=torch.float32),
            )

    def forward(self) -> torch.Tensor:
        """[length, layers * 2 * kv_heads * head_dim], float32."""
        rows = self.embedding.weight.float()
        if not hasattr(self, "trans"):
            return rows
        return cast(torch.Tensor, self.trans.float()(rows))


def key_values(rows: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
    """[layers, 2, kv_heads, length, head_dim] of what an encoder gives; index 0 are the keys, 1 the values."""
    shaped = rows.view(rows.shape[0], spec.layers, 2, spec.kv_heads, spec.head_dim)
    return shaped.permute(1, 2, 3, 0, 4).contiguous()


def rows_of(keys: torch.Tensor) -> torch.Tensor:
    """`key_values` the other way round: [length, layers * 2 * kv_heads * head_dim]."""
    return keys.permute(3, 0, 1, 2, 4).reshape(keys.shape[3], -1)


class PrefixedModel(LanguageModel):
    """A model whose cache can begin with a prefix.

    `prefix_key_values` [layers, 2, kv_heads, length, head_dim] may be exchanged and removed at any time, with
    `set_prefix`; caches made before keep what they began with. prefix_shifts: whether it takes positions of the text.
    """

    prefix_key_values: torch.Tensor | None = None
    prefix_shifts = False

    def set_prefix(self, key_values: torch.Tensor | None, *, shifts: bool = False) -> None:
        """Begin caches with these rows from now on; None with none."""
        self.prefix_key_values, self.prefix_shifts = key_values, shifts

    def wear(self, variant: Variant) -> None:
        if self.variant is self.plain:
            self.plain.prefix, self.plain.shifts = self.prefix_key_values, self.prefix_shifts
        super().wear(variant)
        begins = self.plain if variant.prefix is None else variant
        self.set_prefix(begins.prefix, shifts=begins.shifts)

    def encode_prefix(self) -> None:
        """Compute the checkpoint's own prefix once, if it has one (pre_seq_len in config.json)."""
        encoder = self.own_prefix_encoder()
        if encoder is not None and encoder.embedding.weight.device.type != "meta":
            with torch.no_grad():
                self.prefix_key_values = key_values(encoder(), self.spec)

    def make_encoder(self, length: int, *, projected: bool) -> PrefixEncoder:
        """One that can be learned for this model, drawn as torch draws: here of the sizes that PEFT gives it."""
        width, inner = self.spec.prefix_width, self.spec.kv_heads * self.spec.head_dim
        return PrefixEncoder(length, width, inner if projected else width, inner if projected else None)

    def own_prefix_encoder(self) -> PrefixEncoder | None:
        return next((m for m in self.modules() if isinstance(m, PrefixEncoder)), None)

    def with_prefix(self, cache: KVCache | None, length: int) -> KVCache | None:
        """The cache of a forward pass; one that was asked for without gets a cache too if a prefix stands in front."""
        if cache is None and (self.prefix_key_values is not None or self.own_prefix_encoder() is not None):
            return self.new_cache(length)
        return cache

    def new_cache(self, capacity: int, dtype: torch.dtype | None = None) -> KVCache:
        """As in the base; `capacity` counts tokens, the room for the prefix comes on top."""
        if self.prefix_key_values is None:
            self.encode_prefix()
        prefix = self.prefix_key_values
        if prefix is None:
            return super().new_cache(capacity, dtype)
        length = prefix.shape[3]
        cache = super().new_cache(capacity + length, dtype)
        for layer in range(self.spec.layers):
            cache.put(layer, 0, prefix[layer, 0], prefix[layer, 1])
        cache.prefix = cache.length = length
        cache.shift = length if self.prefix_shifts else 0
        return cache
