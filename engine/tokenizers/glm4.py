"""The vocabulary of GLM-4: a tiktoken file (base64 token and rank on each line) and the special ids behind it."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from pathlib import Path

import tiktoken

from glmchat.checkpoints.vocabularies import damaged_vocabulary, read_vocabulary, require_kind
from glmchat.core.errors import Damaged
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.tokenizers.pieces import encodable

RANKS = 151_329
SPECIAL = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>",
    "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip
IDS = {name: RANKS + number for number, name in enumerate(SPECIAL)}
# Words with a mark before them, digits by three, signs with the line ends behind them, blanks.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


class GLM4Tokenizer:
    """Text to ids and back; every id stands for bytes of its own."""

    def __init__(self, path: Path) -> None:
        ranks = _ranks(path)
        self._encoding = tiktoken.Encoding(
            "glm4", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={}, explicit_n_vocab=RANKS
        )
        self.vocab_size = RANKS + len(SPECIAL)
        self._bytes = {rank: token for token, rank in ranks.items()}
        self._split = re.compile("(" + "|".join(map(re.escape, SPECIAL)) + ")")

    def encode(self, text: str) -> list[int]:
        return self._encoding.encode_ordinary(encodable(text))

    def encode_special(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(self._split.split(text)):
            if index % 2:
                ids.append(IDS[part])
            elif part:
                ids += self.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes.get(i, b"") for i in ids).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes | None:
        return self._bytes.get(token, b"")


def _ranks(path: Path) -> dict[bytes, int]:
    data = read_vocabulary(path)
    require_kind(path, data, "glm4")
    ranks: dict[bytes, int] = {}
    try:
        for line in data.splitlines():
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (ValueError, binascii.Error):
        raise _damaged(path, data) from None
    if set(ranks.values()) != set(range(RANKS)):
        raise _damaged(path, data)
    return ranks


def _damaged(path: Path, data: bytes) -> Damaged:
    return damaged_vocabulary(
        tr("{name} ({data:,} bytes) is not a tiktoken vocabulary", name=one_line(path.name), data=len(data)),
        tr("fetch tokenizer.model again from THUDM/glm-4-9b-chat"),
    )
