"""GLM-4 as transformers writes it: a Llama with interleaved partial rotary positions and fused gate and up.

GLM-4-0414 and GLM-Z1 (`glm4`) also normalise what attention and the feed-forward part add (Ding et al. 2021, "sandwich"
norms). Parameter names are the checkpoint's.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from glmchat.checkpoints.llama import rename
from glmchat.checkpoints.spec import ModelSpec
from glmchat.engine.families import Family
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.models.base import Block
from glmchat.engine.models.layers import (
    Mask,
    RMSNorm,
    RotaryTable,
    prepare_embedding,
    rotate_interleaved,
    swiglu,
)
from glmchat.engine.models.llama import Attention, Llama
from glmchat.engine.models.parts import glm_layer
from glmchat.engine.models.rope import rotary_frequencies
from glmchat.engine.prompts.template import template_prompt
from glmchat.engine.tokenizers.loading import load_plain_tokenizer


class InterleavedTable(RotaryTable):
    """cos and sin of the pairs that are rotated; two neighbours are a pair, the rest of a head stays."""

    def _grow(self, length: int) -> None:
        positions = torch.arange(length, dtype=torch.float32, device=self._frequencies.device)
        angles = torch.outer(positions, self._frequencies)[:, None]  # [length, 1, rotated / 2]
        self._cos, self._sin, self._length = angles.cos(), angles.sin(), length

    def rotate(self, x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return rotate_interleaved(x, *table)


class FeedForward(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(spec.hidden_size, 2 * spec.ffn_size, bias=False)
        self.down_proj = nn.Linear(spec.ffn_size, spec.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.down_proj(swiglu(self.gate_up_proj(x))))


class Layer(Block):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        hidden, eps = spec.hidden_size, spec.extra["eps"]
        self.input_layernorm = RMSNorm(hidden, eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.mlp = FeedForward(spec)
        self.post_self_attn_layernorm = RMSNorm(hidden, eps) if spec.extra["sandwich"] else None
        self.post_mlp_layernorm = RMSNorm(hidden, eps) if spec.extra["sandwich"] else None

    def forward(
        self,
        x: torch.Tensor,
        layer: int,
        cache: KVCache | None,
        rotary: RotaryTable,
        table: tuple[torch.Tensor, torch.Tensor],
        mask: Mask,
    ) -> torch.Tensor:
        """x [n, hidden] -> [n, hidden]"""
        added = self.self_attn(self.input_layernorm(x), layer, cache, rotary, table, mask)
        x = x + (added if self.post_self_attn_layernorm is None else self.post_self_attn_layernorm(added))
        added = self.mlp(self.post_attention_layernorm(x))
        return cast(torch.Tensor, x + (added if self.post_mlp_layernorm is None else self.post_mlp_layernorm(added)))


class Glm(Llama):
    layer = Layer
    layer_parts = staticmethod(glm_layer)
    pairs = "interleaved"

    def prepare(self, dtype: torch.dtype, device: str) -> None:
        self._frequencies, self._scale = rotary_frequencies(self.spec.extra["rotated"], self.spec.extra["theta"]), 1.0
        self.rotary = InterleavedTable(self._frequencies.to(device), dtype)
        prepare_embedding(self.model.embed_tokens, dtype)


FAMILY = Family(
    name="glm",
    build=Glm,
    rename=rename,
    load_tokenizer=load_plain_tokenizer,
    prompt=template_prompt,
)
