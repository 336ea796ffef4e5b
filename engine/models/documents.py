"""Several documents in one pass, one behind the other and without padding: each looks at itself alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional


class Documents:
    """Takes the place of a mask (`layers.attend`) where there is no cache; gradients flow through it.

    lengths: of the documents. visible: how many tokens at the beginning of each are seen by all of it; 0 or 1: it is
    read forwards.
    """

    def __init__(self, lengths: Sequence[int], visible: Sequence[int] = (), device: torch.device | str = "cpu") -> None:
        self.lengths = tuple(lengths)
        self.masks: list[torch.Tensor | None] = [None] * len(self.lengths)
        for number, seen in enumerate(visible):
            if seen > 1:
                length = self.lengths[number]
                mask = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
                mask[:, :seen] = True
                self.masks[number] = mask

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """query [length, heads, head_dim]; keys, values [kv_heads, length, head_dim] -> [length, heads * head_dim]."""
        parts, start = [], 0
        shared = query.shape[1] != keys.shape[0]
        for length, mask in zip(self.lengths, self.masks, strict=True):
            attended = functional.scaled_dot_product_attention(
                query.narrow(0, start, length).transpose(0, 1)[None],
                keys.narrow(1, start, length)[None],
                values.narrow(1, start, length)[None],
                attn_mask=mask,
                is_causal=mask is None,
                enable_gqa=shared,
            )
            parts.append(attended[0].transpose(0, 1).reshape(length, -1))
            start += length
        return torch.cat(parts) if len(parts) > 1 else parts[0]
