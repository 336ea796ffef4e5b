"""Rows of words that an adapter brings: some, trained in the place of the model's, or all of them, of another number of
words than the model has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from glmchat.checkpoints.adapter_settings import TOKENS, LoraSettings, Names
from glmchat.core.errors import Damaged
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.adapters.low_rank import Weighted, device_of_layer, dtype_of, own_factor, rows_of
from glmchat.engine.quantize.linear import QuantEmbedding, QuantLinear

VOCABULARIES = ("lm_head", "output_layer", "embed_tokens", "wte", "word_embeddings", "embed_in", "embed_out")


def measures(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, (rows, width) of an embedding, (0, 0) of anything else."""
    if isinstance(module, nn.Linear | QuantLinear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Embedding | QuantEmbedding):
        return module.num_embeddings, module.embedding_dim
    return 0, 0


def share_rows(layers: dict[str, Names], ends: tuple[str, ...]) -> None:
    """Where embedding and head are one, so are their trained rows, which PEFT then saves once."""
    if not ends or ends[0] not in layers:
        return
    names = layers[ends[0]]
    if TOKENS in names.tensors:
        for head in ends[1:]:
            layers.setdefault(head, Names()).tensors.setdefault(TOKENS, names.tensors[TOKENS])


def rows_brought(
    layers: dict[str, Names],
    modules: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, ...]],
    ends: tuple[str, ...],
) -> int | None:
    """How many words the adapter brings rows for, if it brings all of them; None if the model's own number stays.

    A LoRA of a tied embedding saves the resized matrix once, and the head is that matrix, too.
    """
    places = [name for name in modules if name.rpartition(".")[2] in VOCABULARIES and measures(modules[name])[0]]
    base = "" if not ends or ends[0] not in layers else layers[ends[0]].replaced.get("weight", "")
    here = {place: layers[place].replaced["weight"] for place in places if place in layers and layers[place].replaced}
    if ".base_layer." in base:
        here = {**dict.fromkeys(ends[1:], base), **here}
    heights = {shapes[name][0] for name in here.values()}
    if len(here) < len(places) or len(heights) != 1 or heights == {measures(modules[places[0]])[0]}:
        return None
    for place, name in here.items():
        layers.setdefault(place, Names()).replaced.setdefault("weight", name)
    return heights.pop()


def check_tokens(place: str, shape: tuple[int, ...], settings: LoraSettings, measure: tuple[int, int]) -> None:
    """Raise Damaged unless there is one row of the layer's width for each id, and each id is one of the layer's."""
    tokens, (rows, width) = settings.tokens_of(place), measure
    if shape != (len(tokens), width) or any(token >= rows for token in tokens):
        raise Damaged(
            tr(
                "trainable_token_indices names {n} tokens up to {highest}, but the adapter has {shape} for {place} "
                "of {rows} rows",
                n=len(tokens),
                highest=max(tokens, default=0),
                shape=list(shape),
                place=one_line(place, 120),
                rows=rows,
            ),
            hint=tr("the configuration and the weights come from two different training runs, or from another model"),
            code="adapter.tokens",
        )


class TrainedRows(nn.Module):
    """An embedding, or a head, some of whose rows were trained (PEFT's trainable tokens). rows [tokens, width]"""

    def __init__(self, base: nn.Module, changes: Sequence[Weighted]) -> None:
        super().__init__()
        self.base = base
        device = device_of_layer(base)
        tokens = sorted({token for change, _ in changes for token in change.tokens})
        self.tokens = torch.tensor(tokens, device=device)
        own = rows_of(base, self.tokens).float()
        self.rows = own.clone()
        for change, weight in changes:
            at = torch.searchsorted(self.tokens, torch.tensor(change.tokens, device=device))
            self.rows[at] += (cast(torch.Tensor, change.rows) - own[at]) * weight

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.base)

    @property
    def weight(self) -> torch.Tensor:
        """The whole matrix, for whoever measures its rows."""
        count = measures(self.base)[0]
        whole = rows_of(self.base, torch.arange(count, device=self.tokens.device)).float()
        return whole.index_copy(0, self.tokens, self.rows)


class TrainedWords(TrainedRows):
    """The rows of an embedding. A factor of the base's own (Gemma's) holds for them, too."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = cast(torch.Tensor, self.base(ids))
        at = torch.searchsorted(self.tokens, ids).clamp(max=len(self.tokens) - 1)
        trained = (self.rows * own_factor(self.base)).to(rows.dtype)[at]
        return torch.where((self.tokens[at] == ids)[..., None], trained, rows)


class TrainedHead(TrainedRows):
    """The rows of a head."""

    bias = None

    def __init__(self, base: nn.Module, changes: Sequence[Weighted]) -> None:
        super().__init__(base, changes)
        self.out_features, self.in_features = measures(base)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = cast(torch.Tensor, self.base(x))
        trained = functional.linear(x, self.rows.to(x.dtype)).to(logits.dtype)
        return logits.index_copy(-1, self.tokens, trained)


def with_trained_rows(base: nn.Module, changes: Sequence[Weighted]) -> nn.Module:
    """base, or what computes with the trained rows in the place of its own."""
    trained = [(change, weight) for change, weight in changes if change.rows is not None]
    if not trained:
        return base
    return (TrainedHead if hasattr(base, "in_features") else TrainedWords)(base, trained)
