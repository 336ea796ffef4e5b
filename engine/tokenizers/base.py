"""What the engine asks of a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Text to ids and back. `encode` takes every character as ordinary text: control tokens come from formats."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no special tokens are added and none are recognised."""
        ...

    def encode_special(self, text: str) -> list[int]:
        """Ids of trusted template or completion text, in which control tokens such as [MASK] are recognised."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; control tokens vanish; bytes that are no UTF-8 become U+FFFD."""
        ...

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes one id stands for, or None where text cannot be put together from single ids."""
        ...
