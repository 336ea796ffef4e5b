"""GPT-2 (Radford et al. 2019), and with it the Chinese GPT-2 of CPM: learnt positions, LayerNorm before each part.

Checkpoints store the linear layers as [in, out]; here they are plain `Linear` under the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from glmchat.checkpoints.gpt2 import rename, transposed
from glmchat.checkpoints.spec import ModelSpec
from glmchat.core.errors import DoesNotFit
from glmchat.core.language import tr
from glmchat.engine.families import Family
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.models.layers import Mask, attend, causal_mask, prepare_embedding, tied_logits
from glmchat.engine.models.parts import Parts, gpt2_parts
from glmchat.engine.models.prefix import PrefixedModel
from glmchat.engine.prompts.template import gpt2_prompt
from glmchat.engine.tokenizers.gpt2 import load_gpt2_tokenizer


class Attention(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads, self.head_dim = spec.heads, spec.head_dim
        self.c_attn = nn.Linear(spec.hidden_size, 3 * spec.hidden_size)
        self.c_proj = nn.Linear(spec.hidden_size, spec.hidden_size)

    def forward(self, x: torch.Tensor, mask: Mask, cache: KVCache | None, layer: int) -> torch.Tensor:
        """x [length, hidden] -> [length, hidden]"""
        query, key, value = self.c_attn(x).view(len(x), 3, self.heads, self.head_dim).unbind(1)
        key, value = key.transpose(0, 1), value.transpose(0, 1)  # [heads, length, head_dim]
        if cache is not None:
            key, value = cache.append(layer, key, value)
        return cast(torch.Tensor, self.c_proj(attend(query, key, value, mask)))


class MLP(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.c_fc = nn.Linear(spec.hidden_size, spec.ffn_size)
        self.c_proj = nn.Linear(spec.ffn_size, spec.hidden_size)
        self.approximate: str = spec.extra["gelu"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))


class Block(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(spec.hidden_size, eps=spec.extra["epsilon"])
        self.attn = Attention(spec)
        self.ln_2 = nn.LayerNorm(spec.hidden_size, eps=spec.extra["epsilon"])
        self.mlp = MLP(spec)

    def forward(self, x: torch.Tensor, mask: Mask, cache: KVCache | None, layer: int) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache, layer)
        return cast(torch.Tensor, x + self.mlp(self.ln_2(x)))


class Transformer(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.wte = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.wpe = nn.Embedding(spec.context, spec.hidden_size)
        self.h = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.ln_f = nn.LayerNorm(spec.hidden_size, eps=spec.extra["epsilon"])


class GPT2(PrefixedModel):
    """The network; its head is the embedding matrix, unless training gave it one of its own."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.transformer = Transformer(spec)
        self.tied = "transformer.wte" if spec.extra["tied"] else None
        self.lm_head = None if self.tied else nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)

    def prepare(self, dtype: torch.dtype, device: str) -> None:
        prepare_embedding(self.transformer.wte, dtype)

    def parts(self) -> Parts | None:
        return gpt2_parts(self.transformer, self.spec, self.lm_head) if self.spec.extra["gelu"] == "tanh" else None

    def forward(
        self,
        ids: torch.Tensor,
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
        between_layers: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """As in the base. Raises DoesNotFit past the last learnt position."""
        cache = self.with_prefix(cache, len(ids))
        filled = 0 if cache is None else cache.length
        start = 0 if cache is None else cache.position
        if start + len(ids) > self.spec.context:
            raise DoesNotFit(
                tr(
                    "GPT-2 has positions for {context:,} tokens, but {start:,} are needed",
                    context=self.spec.context,
                    start=start + len(ids),
                ),
                hint=tr("shorten the text"),
                code="context.full",
            )
        positions = torch.arange(start, start + len(ids), device=ids.device)
        mask = causal_mask(filled, len(ids), ids.device)
        x = self.transformer.wte(ids) + self.transformer.wpe(positions)
        for layer, block in enumerate(self.transformer.h):
            if between_layers is not None:
                between_layers()
            x = block(x, mask, cache, layer)
        if cache is not None:
            cache.advance(len(ids))
        return tied_logits(self.transformer.ln_f(x[-1:] if last_only else x), self.transformer.wte, self.lm_head)


FAMILY = Family(
    name="gpt2",
    build=GPT2,
    rename=rename,
    load_tokenizer=load_gpt2_tokenizer,
    prompt=gpt2_prompt,
    transposed=transposed,
)
