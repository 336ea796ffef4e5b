"""The vocabularies of ChatGLM2-6B, ChatGLM3-6B and GLM-4.

ChatGLM2 and ChatGLM3: one `tokenizer.model` of 64,789 pieces, and ids appended in code. GLM-4: a tiktoken file (base64
token and rank on each line) and the special ids behind it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from pathlib import Path

import tiktoken

from glmchat.checkpoints.spec import ModelSpec
from glmchat.checkpoints.vocabularies import (
    check_rows,
    damaged_vocabulary,
    published_vocabulary,
    read_vocabulary,
    require_kind,
)
from glmchat.core.errors import Damaged
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.tokenizers.base import PieceText, Tokenizer, encodable, open_pieces

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

    controls = IDS

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

    def token_bytes(self, token: int) -> bytes:
        return self._bytes.get(token, b"")

    piece_bytes = token_bytes


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


PIECES = 64_789
EOS = 2
MASK, GMASK, SMASK, SOP, EOP = range(PIECES, PIECES + 5)
ROLES = {"system": 64794, "user": 64795, "assistant": 64796, "observation": 64797}
NEWLINE = 13
_CONTROL = {"[MASK]": MASK, "[gMASK]": GMASK, "[sMASK]": SMASK, "sop": SOP, "eop": EOP}


class ChatGLM2Tokenizer:
    """Text to ids and back. `roles`: ChatGLM3, which also has four role tokens, and shows control tokens by name."""

    def __init__(self, path: Path, *, roles: bool) -> None:
        data = read_vocabulary(path)
        require_kind(path, data, "chatglm2")
        self._pieces = open_pieces(path, data)
        self.roles = roles
        names = {f"<|{role}|>": token for role, token in ROLES.items()} if roles else {}
        self.vocab_size = PIECES + len(_CONTROL) + len(names)
        shown = dict.fromkeys((0, 1, EOS, *_CONTROL.values()), "")
        if roles:
            shown |= {token: name for name, token in (_CONTROL | names).items()}
        self._text = PieceText(self._pieces, shown, strip_all=False)
        # In a text only names in brackets are taken for control tokens: "sop" is also half of a word.
        self._special = {f"<{n}>" if n.isalpha() else n: token for n, token in _CONTROL.items()} | names
        self.controls = {**self._special, "<s>": 1, "</s>": EOS}
        self._split = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")

    def encode(self, text: str) -> list[int]:
        return list(self._pieces.encode(encodable(text)))

    def encode_special(self, text: str) -> list[int]:
        """Control tokens by name; the text behind each is encoded by itself."""
        ids: list[int] = []
        for index, part in enumerate(self._split.split(text)):
            if index % 2:
                ids.append(self._special[part])
            elif part:
                ids += self.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._text.join(ids)

    def token_bytes(self, token: int) -> bytes | None:
        """None: a leading space depends on what stands before it."""
        return None

    def piece_bytes(self, token: int) -> bytes:
        return self._text.piece_bytes(token) if token < PIECES else b""


def load_chatglm2_tokenizer(folder: Path, spec: ModelSpec) -> Tokenizer:
    """Of ChatGLM2, ChatGLM3 or GLM-4. Raises Damaged for a vocabulary that is missing or of another generation."""
    path = published_vocabulary(folder, "glm4" if spec.family == "glm4" else "chatglm2", spec.vocab_size)
    if spec.family == "glm4":
        return GLM4Tokenizer(path)
    tokenizer = ChatGLM2Tokenizer(path, roles=spec.family == "chatglm3")
    check_rows(path, tokenizer.vocab_size, spec.vocab_size)
    return tokenizer
