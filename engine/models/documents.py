"""Several documents in one pass, one behind the other and without padding: each looks at itself alone, and at what
stands before all of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch.nn import functional


class Documents:
    """Takes the place of a mask (`layers.attend`) where there is no cache; gradients flow through it.

    lengths: of the documents. visible: how many tokens at the beginning of each are seen by all of it; 0 or 1: it is
    read forwards. front: positions of a prefix, which all of every document sees; a layer's keys and values of it are
    given by `behind`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        visible: Sequence[int] = (),
        device: torch.device | str = "cpu",
        front: int = 0,
    ) -> None:
        self.lengths = tuple(lengths)
        self.masks: list[torch.Tensor | None] = [None] * len(self.lengths)
        self.prefix: tuple[torch.Tensor, torch.Tensor] | None = None
        for number, length in enumerate(self.lengths):
            seen = visible[number] if visible else 0
            if seen > 1 or front:
                mask = torch.ones(length, front + length, dtype=torch.bool, device=device).tril_(front)
                mask[:, : front + seen] = True
                self.masks[number] = mask

    def behind(self, keys: torch.Tensor, values: torch.Tensor) -> Documents:
        """These documents behind one layer's prefix: keys, values [kv_heads, front, head_dim]."""
        found = copy.copy(self)
        found.prefix = (keys, values)
        return found

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """query [length, heads, head_dim]; keys, values [kv_heads, length, head_dim] -> [length, heads * head_dim]."""
        parts, start = [], 0
        shared = query.shape[1] != keys.shape[0]
        for number, length in enumerate(self.lengths):
            mask = self._mask(number, query.dtype)
            key, value = keys.narrow(1, start, length), values.narrow(1, start, length)
            if self.prefix is not None:
                key, value = (
                    torch.cat((front.to(own.dtype), own), 1)
                    for front, own in zip(self.prefix, (key, value), strict=True)
                )
            attended = functional.scaled_dot_product_attention(
                query.narrow(0, start, length).transpose(0, 1)[None],
                key[None],
                value[None],
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=shared,
            )
            parts.append(attended[0].transpose(0, 1).reshape(length, -1))
            start += length
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _mask(self, number: int, dtype: torch.dtype) -> torch.Tensor | None:
        """As it is added to the products: made once, so that all layers keep the same one for the backward pass."""
        mask = self.masks[number]
        if mask is not None and mask.dtype == torch.bool:
            mask = self.masks[number] = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
                ~mask, float("-inf")
            )
        return mask
