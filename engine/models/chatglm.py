"""ChatGLM-6B: 2D rotary positions, a prompt read in both directions, an answer read forwards.

The prompt (everything before `<sop>`) sees itself whole; from `<sop>` on each token sees what stands before it. Two
positions turn the two halves of every head: the place in the prompt, frozen at the mask token for the whole answer, and
the place in the answer, zero for the whole prompt (Du et al. 2022, GLM). Parameter names are the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from glmchat.checkpoints.chatglm import rename
from glmchat.checkpoints.spec import ModelSpec
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.engine.families import Family
from glmchat.engine.gpu.prompt import Seen
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.models.layers import Mask, attend, prepare_embedding, tied_logits
from glmchat.engine.models.parts import Parts, chatglm_parts
from glmchat.engine.models.prefix import PrefixedModel, PrefixEncoder
from glmchat.engine.prompts.chatglm import chatglm_prompt
from glmchat.engine.tokenizers.chatglm import load_chatglm_tokenizer

# The residual is scaled by sqrt(2 * 28) whatever the depth: the released code never tells its blocks how many they are.
ALPHA = 56.0**0.5


@dataclass(frozen=True, slots=True)
class Layout:
    """What the positions and the mask of an answer depend on, read from the prompt's ids."""

    context: int  # index of the first <sop>; everything before it is the prompt
    mask_position: int  # index of the first [gMASK] or [MASK]
    is_gmask: bool
    visible: int  # columns before this index are seen by every token
    frozen: bool  # whether the first position stops at the mask token (False: first generation with [gMASK])

    def positions(
        self, start: int, count: int, two_rows: bool = True, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """[2, count] (or [1, count] without the second row) for the tokens from index `start` on."""
        index = torch.arange(start, start + count, device=device)
        behind = index >= self.context
        frozen = self.frozen or start > 0  # decode steps of the first generation freeze it too
        if not two_rows:
            return (index if self.is_gmask else index.where(~behind, self.mask_position))[None]
        first = index.where(~behind, self.mask_position) if frozen else index
        return torch.stack((first, (index - self.context + 1).clamp(min=0)))

    def mask(self, start: int, count: int, prefix: int, device: torch.device) -> Mask:
        """[count, prefix + start + count], True where the row's token may look; on a card the two kinds of rows."""
        if count == 1:
            return None
        if device.type != "cpu":
            return Seen(min(max(self.visible - start, 0), count), prefix + self.visible)
        row = torch.arange(start, start + count)[:, None]
        column = torch.arange(start + count)[None]
        return F.pad((column <= row) | (column < self.visible), (prefix, 0), value=True)


def read_layout(ids: torch.Tensor, spec: ModelSpec, *, generating: bool = False) -> Layout:
    """The layout of a fresh prompt. Raises Usage when it lacks `<sop>` or both mask tokens.

    `generating`: the first generation's `generate` lets every token see all of the prompt but its last one; its bare
    forward, and every later revision, only what stands before `<sop>` (THUDM's modeling_chatglm.py, `get_masks`).
    """
    tokens = ids.tolist()
    old, gmask, mask = spec.extra["first_generation"], spec.extra["gmask_id"], spec.extra["mask_id"]
    if spec.bos_id not in tokens or (gmask not in tokens and mask not in tokens):
        raise Usage(
            tr(
                "a ChatGLM-6B prompt needs [gMASK] ({gmask}) or [MASK] ({mask}), and <sop> ({bos_id})",
                gmask=gmask,
                mask=mask,
                bos_id=spec.bos_id,
            ),
            hint=tr("render(messages) and completion mode add them; raw ids must contain them"),
            code="prompt.mask",
        )
    context = tokens.index(spec.bos_id)
    is_gmask = mask not in tokens if old else gmask in tokens
    visible = len(tokens) - 1 if old and is_gmask and generating else context
    return Layout(
        context,
        tokens.index(gmask if is_gmask else mask),
        is_gmask,
        max(visible, context),
        frozen=not (old and is_gmask),
    )


def rotation(positions: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [length, rows, width / 2] for positions [rows, length].

    The frequencies are rounded to float16 and used in float32: that is what the released checkpoints were run with, and
    at position 300 it already moves cos by 0.04.
    """
    angles = positions.T[..., None].float() * frequencies(width, positions.device)
    return angles.cos(), angles.sin()


@cache
def frequencies(width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Radians per position of each of the width / 2 pairs, rounded to float16."""
    return (1.0 / 10000 ** (torch.arange(0, width, 2).float() / width)).half().float().to(device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [length, heads, 2, head_dim] (queries and keys): each of the `rows` parts of a head by its own position."""
    rows = cos.shape[1]
    parts = x.float().view(*x.shape[:-1], rows, -1)  # [length, heads, 2, rows, width]
    low, high = parts.chunk(2, dim=-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.dense = nn.Linear(hidden, hidden)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: Mask,
        cache: KVCache | None,
        layer: int,
    ) -> torch.Tensor:
        """x [length, hidden]; mask as `attend` takes it."""
        fused = self.query_key_value(x).view(len(x), self.heads, 3, self.head_dim)  # each head: q, k, v
        rotated = rotate(fused[:, :, :2], *rotary)  # [length, heads, 2, head_dim]
        query, key = rotated[:, :, 0], rotated[:, :, 1].transpose(0, 1)
        value = fused[:, :, 2].transpose(0, 1)  # [heads, length, head_dim]
        if cache is not None:
            key, value = cache.append(layer, key, value)
        return cast(torch.Tensor, self.dense(attend(query, key, value, mask)))


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(hidden, inner)
        self.dense_4h_to_h = nn.Linear(inner, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        epsilon = spec.extra["epsilon"]
        self.input_layernorm = nn.LayerNorm(spec.hidden_size, eps=epsilon)
        self.attention = Attention(spec.hidden_size, spec.heads, spec.head_dim)
        self.post_attention_layernorm = nn.LayerNorm(spec.hidden_size, eps=epsilon)
        self.mlp = MLP(spec.hidden_size, spec.ffn_size)

    def forward(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        mask: Mask,
        cache: KVCache | None,
        layer: int,
    ) -> torch.Tensor:
        # The residual carries the normalised input, not x itself.
        a = self.input_layernorm(x)
        m = self.post_attention_layernorm(a * ALPHA + self.attention(a, rotary, mask, cache, layer))
        return cast(torch.Tensor, m * ALPHA + self.mlp(m))


class Transformer(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.final_layernorm = nn.LayerNorm(spec.hidden_size, eps=spec.extra["epsilon"])
        if length := spec.extra["prefix_length"]:
            self.prefix_encoder = _encoder(spec, length, spec.extra["prefix_projection"])


def _encoder(spec: ModelSpec, length: int, projected: bool) -> PrefixEncoder:
    width, hidden = spec.prefix_width, spec.hidden_size
    return PrefixEncoder(length, width, hidden if projected else width, hidden if projected else None)


class ChatGLM(PrefixedModel):
    """The network. The head is the embedding matrix: the loader of the original ties them, whatever the file holds."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.transformer = Transformer(spec)

    def prepare(self, dtype: torch.dtype, device: str) -> None:
        prepare_embedding(self.transformer.word_embeddings, dtype)
        self.encode_prefix()

    def make_encoder(self, length: int, *, projected: bool) -> PrefixEncoder:
        return _encoder(self.spec, length, projected)

    def open_for_measuring(self, cache: KVCache) -> None:
        """An answer can only follow a prompt: [gMASK] and <sop>, with keys of zero."""
        cache.layout = Layout(context=1, mask_position=0, is_gmask=True, visible=1, frozen=True)
        cache.advance(2)

    def positions(self, cache: KVCache) -> tuple[int, int]:
        row = cache.layout.positions(cache.length - cache.prefix, 1, self.spec.extra["two_positions"])
        return int(row[0, 0]), int(row[-1, 0])

    def parts(self) -> Parts:
        width = self.spec.head_dim // (2 if self.spec.extra["two_positions"] else 1)
        return chatglm_parts(self.transformer, self.spec, frequencies(width), ALPHA)

    def forward(
        self,
        ids: torch.Tensor,
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
        between_layers: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """As in the base. A fresh cache takes the whole prompt, `<sop>` included, in one call."""
        generating = cache is not None
        cache = self.with_prefix(cache, len(ids))
        start = 0 if cache is None else cache.length - cache.prefix
        layout: Layout
        if start == 0:
            layout = read_layout(ids, self.spec, generating=generating)
            if cache is not None:
                cache.layout = layout
        else:
            assert cache is not None
            layout = cache.layout
            if start < layout.context:
                raise ValueError("a bidirectional prompt cannot be continued from its middle: start a fresh prefill")
        device = ids.device
        two_rows = self.spec.extra["two_positions"]
        positions = layout.positions(start, len(ids), two_rows, device)
        rotary = rotation(positions, self.spec.head_dim // len(positions))
        mask = layout.mask(start, len(ids), 0 if cache is None else cache.prefix, device)
        x = self.transformer.word_embeddings(ids)
        for layer, block in enumerate(self.transformer.layers):
            if between_layers is not None:
                between_layers()
            x = block(x, rotary, mask, cache, layer)
        if cache is not None:
            cache.advance(len(ids))
        x = self.transformer.final_layernorm(x[-1:] if last_only else x)
        return tied_logits(x, self.transformer.word_embeddings)


FAMILY = Family(
    name="chatglm",
    build=ChatGLM,
    rename=rename,
    load_tokenizer=load_chatglm_tokenizer,
    prompt=chatglm_prompt,
)
