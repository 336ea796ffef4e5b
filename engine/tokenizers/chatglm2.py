"""The vocabulary of ChatGLM2-6B and ChatGLM3-6B: one `tokenizer.model` of 64,789 pieces, and ids appended in code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from glmchat.checkpoints.spec import ModelSpec
from glmchat.checkpoints.vocabularies import check_rows, published_vocabulary, read_vocabulary, require_kind
from glmchat.engine.tokenizers.base import Tokenizer
from glmchat.engine.tokenizers.glm4 import GLM4Tokenizer
from glmchat.engine.tokenizers.pieces import PieceText, encodable, open_pieces

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


def load_chatglm2_tokenizer(folder: Path, spec: ModelSpec) -> Tokenizer:
    """Of ChatGLM2, ChatGLM3 or GLM-4. Raises Damaged for a vocabulary that is missing or of another generation."""
    path = published_vocabulary(folder, "glm4" if spec.family == "glm4" else "chatglm2", spec.vocab_size)
    if spec.family == "glm4":
        return GLM4Tokenizer(path)
    tokenizer = ChatGLM2Tokenizer(path, roles=spec.family == "chatglm3")
    check_rows(path, tokenizer.vocab_size, spec.vocab_size)
    return tokenizer
