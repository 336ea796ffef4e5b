"""The Llama family: RMSNorm, grouped-query attention, rotary positions, SwiGLU (Touvron et al. 2023).

Llama 1 to 3, Mistral without a sliding window, SmolLM2, Qwen2 (biases on query, key and value) and Qwen3 (norms on
query and key heads) differ only in what their configurations say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import nn

from glmchat.checkpoints.llama import rename
from glmchat.checkpoints.spec import ModelSpec
from glmchat.engine.adapters.low_rank import fused
from glmchat.engine.families import Family
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.models.base import Block
from glmchat.engine.models.layers import (
    Mask,
    RMSNorm,
    RotaryTable,
    attend,
    causal_mask,
    prepare_embedding,
    swiglu,
    tied_head,
    tied_logits,
)
from glmchat.engine.models.parts import Parts, llama_layer
from glmchat.engine.models.prefix import PrefixedModel
from glmchat.engine.models.rope import scaled_frequencies
from glmchat.engine.prompts.template import template_prompt
from glmchat.engine.tokenizers.loading import load_plain_tokenizer


class Attention(Block):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        extra = spec.extra
        queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, queries, bias=extra["qkv_bias"])
        self.k_proj = nn.Linear(spec.hidden_size, keys, bias=extra["qkv_bias"])
        self.v_proj = nn.Linear(spec.hidden_size, keys, bias=extra["qkv_bias"])
        self.o_proj = nn.Linear(queries, spec.hidden_size, bias=extra["output_bias"])
        self.q_norm = RMSNorm(spec.head_dim, extra["eps"]) if extra["head_norms"] else None
        self.k_norm = RMSNorm(spec.head_dim, extra["eps"]) if extra["head_norms"] else None
        self.heads, self.kv_heads, self.head_dim = spec.heads, spec.kv_heads, spec.head_dim

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
        if self.derived is None:
            self.derived = (fused((self.q_proj, self.k_proj, self.v_proj)), self.o_proj, self.q_norm, self.k_norm)
        qkv, o_proj, q_norm, k_norm = self.derived
        heads = self.heads
        projected = qkv(x).view(x.shape[0], -1, self.head_dim)  # [n, heads + 2 * kv_heads, head_dim]
        query_key, value = projected.split_with_sizes((heads + self.kv_heads, self.kv_heads), 1)
        if q_norm is not None:
            query_key = torch.cat((q_norm(query_key[:, :heads]), k_norm(query_key[:, heads:])), 1)
        query, key = rotary.rotate(query_key, table).split_with_sizes((heads, self.kv_heads), 1)
        key, value = key.transpose(0, 1), value.transpose(0, 1)  # [kv_heads, n, head_dim]
        if cache is not None:
            key, value = cache.append(layer, key, value)
        return cast(torch.Tensor, o_proj(attend(query, key, value, mask)))


class FeedForward(Block):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        bias = spec.extra["ffn_bias"]
        self.gate_proj = nn.Linear(spec.hidden_size, spec.ffn_size, bias=bias)
        self.up_proj = nn.Linear(spec.hidden_size, spec.ffn_size, bias=bias)
        self.down_proj = nn.Linear(spec.ffn_size, spec.hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.derived is None:
            self.derived = (fused((self.gate_proj, self.up_proj)), self.down_proj)
        gate_up, down = self.derived
        return cast(torch.Tensor, down(swiglu(gate_up(x))))


class Layer(Block):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.extra["eps"])
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.extra["eps"])
        self.mlp = FeedForward(spec)

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
        if self.derived is None:
            parts = (self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp)
            self.derived = tuple(part.forward for part in parts)  # a module's call costs more than some operations
        norm, attention, second_norm, feed_forward = self.derived
        x = x + attention(norm(x), layer, cache, rotary, table, mask)
        added = feed_forward(second_norm(x))
        return x + added if x.requires_grad else x.add_(added)


class Trunk(nn.Module):
    """What checkpoints call `model`: embedding, layers, last norm."""

    def __init__(self, spec: ModelSpec, layer: Callable[[ModelSpec], nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(layer(spec) for _ in range(spec.layers))
        self.norm = RMSNorm(spec.hidden_size, spec.extra["eps"])
        if spec.extra.get("rope_freqs"):  # GGUF writes Llama 3's frequency scaling as a tensor of divisors
            self.rope_freqs = nn.Parameter(torch.empty(spec.head_dim // 2))


class Llama(PrefixedModel):
    layer: Callable[[ModelSpec], nn.Module] = Layer
    layer_parts = staticmethod(llama_layer)
    pairs: Literal["halves", "interleaved"] = "halves"  # of a head, that are rotated together

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.model = Trunk(spec, self.layer)
        self.tied = "model.embed_tokens" if spec.extra["tied"] else None
        self.lm_head = None if self.tied else nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    def prepare(self, dtype: torch.dtype, device: str) -> None:
        frequencies, self._scale = scaled_frequencies(self.spec)
        if self.spec.extra["rope_freqs"]:
            frequencies = frequencies / self.model.rope_freqs.float().cpu()
        self.rotary = RotaryTable(frequencies.to(device), dtype, self._scale)
        prepare_embedding(self.model.embed_tokens, dtype)
        self._frequencies = frequencies.cpu()

    def parts(self) -> Parts | None:
        if self._scale != 1:
            return None  # the step rotates without YaRN's factor
        head = self.lm_head if self.lm_head is not None else tied_head(self.model.embed_tokens)
        model, layers = self.model, [self.layer_parts(layer) for layer in self.model.layers]
        eps = self.spec.extra["eps"]
        return Parts(model.embed_tokens, layers, model.norm, head, self._frequencies, eps, rotary=self.pairs)

    def forward(
        self,
        ids: torch.Tensor,
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
        between_layers: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        cache = self.with_prefix(cache, ids.shape[0])
        start, count = cache.length if cache is not None else 0, ids.shape[0]
        table = self.rotary.at(0 if cache is None else cache.position, count)
        mask = causal_mask(start, count, ids.device)
        x = self.model.embed_tokens(ids)  # [n, hidden]
        x = x.float() if self.wide_residual else x
        for index, layer in enumerate(self.model.layers):
            if between_layers is not None:
                between_layers()
            x = layer(x, index, cache, self.rotary, table, mask)
        if cache is not None:
            cache.advance(count)
        return self.head(self.model.norm(x[-1:] if last_only else x))

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states [n, hidden] -> float32 logits [n, vocab]; a tied head multiplies by the embedding itself."""
        return tied_logits(x, self.model.embed_tokens, self.lm_head)


FAMILY = Family(
    name="llama",
    build=Llama,
    rename=rename,
    load_tokenizer=load_plain_tokenizer,
    prompt=template_prompt,
)
