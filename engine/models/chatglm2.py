"""ChatGLM2-6B, ChatGLM3-6B and GLM-4: causal, a few key heads shared by many query heads, rotary on half of each head.

The three share one architecture and one table of names; they differ in vocabulary, depth and rotary base. Parameter
names are the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from glmchat.checkpoints.chatglm2 import rename
from glmchat.checkpoints.spec import ModelSpec
from glmchat.engine.families import Family
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.models.layers import (
    Mask,
    RMSNorm,
    attend,
    causal_mask,
    prepare_embedding,
    rotate_interleaved,
    swiglu,
)
from glmchat.engine.models.parts import Parts, chatglm2_layer
from glmchat.engine.models.prefix import PrefixedModel, PrefixEncoder
from glmchat.engine.prompts.chatglm import chatglm2_prompt
from glmchat.engine.tokenizers.chatglm2 import load_chatglm2_tokenizer


def rotary_frequencies(spec: ModelSpec, device: torch.device) -> torch.Tensor:
    """Radians per position [head_dim / 4].

    For a longer context ChatGLM2-6B-32k interpolates positions linearly (Chen et al. 2023); ChatGLM3-6B-32k and GLM-4
    enlarge the base.
    """
    width, ratio = spec.head_dim // 2, spec.extra["rope_ratio"]
    base, step = (10000.0, ratio) if spec.family == "chatglm2" else (10000.0 * ratio, 1.0)
    frequencies: torch.Tensor = 1.0 / base ** (torch.arange(0, width, 2, device=device).float() / width)
    return frequencies / step


def rotation(start: int, count: int, spec: ModelSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, 1, head_dim / 4] of positions start … start + count - 1, computed in float32."""
    frequencies = rotary_frequencies(spec, device)
    angles = torch.arange(start, start + count, device=device).float()[:, None] * frequencies
    return angles.cos()[:, None], angles.sin()[:, None]


class SelfAttention(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim
        fused = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        bias = spec.extra["linear_bias"]
        self.query_key_value = nn.Linear(spec.hidden_size, fused, bias=bias or spec.extra["qkv_bias"])
        self.dense = nn.Linear(spec.heads * spec.head_dim, spec.hidden_size, bias=bias)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: Mask,
        cache: KVCache | None,
        layer: int,
    ) -> torch.Tensor:
        """x [length, hidden]. The projection is all queries, then the keys, then the values of the groups."""
        fused = self.query_key_value(x).view(len(x), -1, self.head_dim)
        rotated = rotate_interleaved(fused[:, : self.heads + self.groups], *rotary)
        query, key = rotated[:, : self.heads], rotated[:, self.heads :].transpose(0, 1)
        value = fused[:, self.heads + self.groups :].transpose(0, 1)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        return cast(torch.Tensor, self.dense(attend(query, key, value, mask)))


class MLP(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        bias = spec.extra["linear_bias"]
        self.dense_h_to_4h = nn.Linear(spec.hidden_size, 2 * spec.ffn_size, bias=bias)
        self.dense_4h_to_h = nn.Linear(spec.ffn_size, spec.hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.dense_4h_to_h(swiglu(self.dense_h_to_4h(x))))


class Layer(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.extra["epsilon"])
        self.self_attention = SelfAttention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.extra["epsilon"])
        self.mlp = MLP(spec)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: Mask,
        cache: KVCache | None,
        layer: int,
    ) -> torch.Tensor:
        x = x + self.self_attention(self.input_layernorm(x), rotary, mask, cache, layer)
        return cast(torch.Tensor, x + self.mlp(self.post_attention_layernorm(x)))


class Embedding(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(spec.vocab_size, spec.hidden_size)


class Encoder(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.final_layernorm = RMSNorm(spec.hidden_size, spec.extra["epsilon"])


class Transformer(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embedding = Embedding(spec)
        self.encoder = Encoder(spec)
        self.output_layer = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        if length := spec.extra["prefix_length"]:
            self.prefix_encoder = _encoder(spec, length, spec.extra["prefix_projection"])


def _encoder(spec: ModelSpec, length: int, projected: bool) -> PrefixEncoder:
    return PrefixEncoder(length, spec.prefix_width, spec.prefix_width, spec.hidden_size if projected else None)


class ChatGLM2(PrefixedModel):
    """The network of ChatGLM2-6B, ChatGLM3-6B and GLM-4."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.transformer = Transformer(spec)

    def prepare(self, dtype: torch.dtype, device: str) -> None:
        prepare_embedding(self.transformer.embedding.word_embeddings, dtype)
        self.encode_prefix()

    def make_encoder(self, length: int, *, projected: bool) -> PrefixEncoder:
        return _encoder(self.spec, length, projected)

    def position(self, cache: KVCache) -> int:
        return cache.length - cache.prefix  # the prefix shifts no positions

    def parts(self) -> Parts:
        network = self.transformer
        return Parts(
            network.embedding.word_embeddings,
            [chatglm2_layer(layer) for layer in network.encoder.layers],
            network.encoder.final_layernorm,
            network.output_layer,
            rotary_frequencies(self.spec, torch.device("cpu")),
            self.spec.extra["epsilon"],
            rotary="interleaved",
        )

    def forward(
        self,
        ids: torch.Tensor,
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
        between_layers: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        cache = self.with_prefix(cache, len(ids))
        start = 0 if cache is None else self.position(cache)
        rotary = rotation(start, len(ids), self.spec, ids.device)
        mask = causal_mask(0 if cache is None else cache.length, len(ids), ids.device)  # a prefix is seen by all
        x = self.transformer.embedding.word_embeddings(ids)
        x = x.float() if self.wide_residual else x
        for layer, block in enumerate(self.transformer.encoder.layers):
            if between_layers is not None:
                between_layers()
            x = block(x, rotary, mask, cache, layer)
        if cache is not None:
            cache.advance(len(ids))
        x = self.transformer.encoder.final_layernorm(x[-1:] if last_only else x)
        return cast(torch.Tensor, self.transformer.output_layer(x).float())


FAMILY = Family(
    name="chatglm2",
    build=ChatGLM2,
    rename=rename,
    load_tokenizer=load_chatglm2_tokenizer,
    prompt=chatglm2_prompt,
)
