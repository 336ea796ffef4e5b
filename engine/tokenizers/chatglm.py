"""The vocabulary of ChatGLM-6B, in both generations of `ice_text.model`.

March 2023 (2,699,926 bytes): 130,000 pieces; the control tokens, blanks and bytes are appended here, and every id
stands 20,000 higher, behind the image tokens. From April 2023 (2,706,249 bytes): 130,344 pieces, all built in.
Which one a file is, is counted in the file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2

from glmchat.checkpoints.spec import ModelSpec
from glmchat.checkpoints.vocabularies import published_vocabulary, read_vocabulary, require_kind
from glmchat.engine.tokenizers.base import PieceText, encodable, open_pieces

EARLY_PIECES, SLIM_PIECES = 130_000, 130_344
IMAGE_TOKENS = 20_000
LONGEST_BLANK = 80
CONTROL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")

UNK, PAD, NEWLINE = 0, 3, 4  # piece numbers; the rest is counted from the end of the ordinary pieces
MASK, GMASK, SMASK, SOP, EOP = (EARLY_PIECES + n for n in (0, 1, 2, 4, 5))
TAB = EARLY_PIECES + len(CONTROL)
END = 2  # </s>


class ChatGLMTokenizer:
    """Text to ids and back. `early`: the generation with image tokens, whose ids stand 20,000 higher."""

    def __init__(self, path: Path) -> None:
        data = read_vocabulary(path)
        self.early = require_kind(path, data, "first", "slim").name == "first"
        self.offset = IMAGE_TOKENS if self.early else 0
        self._pieces = open_pieces(path, _complete(data) if self.early else data)
        self.vocab_size = SLIM_PIECES + self.offset
        blanks = {TAB - 1 + k: " " * k for k in range(2, LONGEST_BLANK + 1)}
        shown = {UNK: " \u2047 ", PAD: "", NEWLINE: "\n", TAB: "\t", **blanks}
        self._text = PieceText(self._pieces, shown, strip_all=True)
        # What the original turns into ids when it stands in a text, and the two masks that infilling needs.
        names = {"<sop>": SOP, "[MASK]": MASK, "<unk>": UNK, "<pad>": PAD, "[gMASK]": GMASK, "[sMASK]": SMASK}
        names["</s>" if self.early else "<eop>"] = END if self.early else EOP
        self._special = {name: token + self.offset for name, token in names.items()}
        self.controls = {**self._special, "<eop>": EOP + self.offset, "</s>": END + self.offset}
        self._split = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")

    @property
    def mask_id(self) -> int:
        return MASK + self.offset

    @property
    def gmask_id(self) -> int:
        return GMASK + self.offset

    @property
    def sop_id(self) -> int:
        return SOP + self.offset

    @property
    def eop_id(self) -> int:
        return EOP + self.offset

    @property
    def end_id(self) -> int:
        return END + self.offset

    def encode(self, text: str) -> list[int]:
        text = encodable(text).replace("\n", "<n>").replace("\t", "<|tab|>")
        text = re.sub(" {2,}", _blanks, text)
        return [token + self.offset for token in self._pieces.encode(text)]

    def encode_special(self, text: str) -> list[int]:
        """As the original's wrapper: known names become ids, blanks beside them go, each part is encoded by itself."""
        ids: list[int] = []
        parts = self._split.split(text)
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(self._special[part])
                continue
            if index > 0:
                part = part.lstrip()
            if index < len(parts) - 1:
                part = part.rstrip()
            if part:
                ids += self.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._text.join([i - self.offset for i in ids if i >= self.offset and i != PAD + self.offset])

    def token_bytes(self, token: int) -> bytes | None:
        """None: a leading space depends on what stands before it."""
        return None

    def piece_bytes(self, token: int) -> bytes:
        return self._text.piece_bytes(token - self.offset) if token >= self.offset else b""


def _blanks(run: re.Match[str]) -> str:
    full, rest = divmod(len(run[0]), LONGEST_BLANK)
    tail = f"<|blank_{rest}|>" if rest > 1 else " " * rest
    return f"<|blank_{LONGEST_BLANK}|>" * full + tail


def _complete(data: bytes) -> bytes:
    """The early vocabulary with what its code appended: control tokens, blanks, and a piece for every byte."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(data)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    blanks = ["<|tab|>", *(f"<|blank_{k}|>" for k in range(2, LONGEST_BLANK + 1))]
    for names, kind in (
        (CONTROL, kinds.CONTROL),
        (blanks, kinds.USER_DEFINED),
        ([f"<0x{value:02X}>" for value in range(256)], kinds.BYTE),
    ):
        for name in names:
            model.pieces.add(piece=name, score=0.0, type=kind)
    model.trainer_spec.byte_fallback = True
    complete: bytes = model.SerializeToString()
    return complete


def load_chatglm_tokenizer(folder: Path, spec: ModelSpec) -> ChatGLMTokenizer:
    """The vocabulary of the folder's generation. Raises Damaged if it is missing or of another one."""
    kind = "first" if spec.extra["image_tokens"] else "slim"
    return ChatGLMTokenizer(published_vocabulary(folder, kind, spec.vocab_size))
