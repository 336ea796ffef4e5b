"""The vocabulary of the Chinese GPT-2 of CPM: words cut by jieba, then `chinese_vocab.model` (SentencePiece).

Blanks and newlines are written as U+2582 and U+2583 before the text reaches SentencePiece, and the words are joined by
blanks that carry no meaning, so decoding drops every blank and turns the two signs back (Zhang et al. 2020, CPM).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from glmchat.checkpoints.spec import ModelSpec
from glmchat.checkpoints.vocabularies import (
    WORDS_WITHOUT_ROWS,
    check_rows,
    read_vocabulary,
    require_kind,
    vocabulary_file,
)
from glmchat.engine.tokenizers.base import SPACE, Tokenizer, encodable, open_pieces
from glmchat.engine.tokenizers.hf import load_byte_pairs, load_tokenizer_json

PIECES = 30_000
UNK, NEWLINE, SEP, EOD = 0, 3, 4, 7
_HIDDEN = frozenset(range(8)) - {NEWLINE}  # <unk> <s> </s> <sep> <pad> <mask> <eod>
_SIGNS = str.maketrans(" \n", "\u2582\u2583")
_NAMES = {"<unk>": UNK, "<sep>": SEP, "<eod>": EOD}
# Ids of pieces at which a completion that has reached its length may end.
_SENTENCE_ENDS = (".", "\u3002", "!", "\uff01", "?", "\uff1f", ",", "\uff0c")


@cache
def _cutter() -> Any:
    """jieba's own dictionary, read from its package. Its cache in the shared temporary folder is never used:
    anybody could have put a file there, and it is unmarshalled."""
    import logging

    import jieba

    logging.getLogger("jieba").setLevel(logging.WARNING)
    cutter = jieba.Tokenizer()
    cutter.FREQ, cutter.total = cutter.gen_pfdict(cutter.get_dict_file())
    cutter.initialized = True
    return cutter


class CPMTokenizer:
    """Text to ids and back; every id stands for characters of its own."""

    controls = _NAMES

    def __init__(self, path: Path) -> None:
        data = read_vocabulary(path)
        require_kind(path, data, "cpm")
        self._pieces = open_pieces(path, data)
        self.vocab_size = PIECES

    @property
    def sentence_ends(self) -> tuple[int, ...]:
        """Ids of the marks that close a sentence or a clause, and of the newline."""
        ids = (self._pieces.piece_to_id(before + mark) for mark in _SENTENCE_ENDS for before in ("", SPACE))
        return (NEWLINE, *sorted({token for token in ids if token != UNK}))

    def encode(self, text: str) -> list[int]:
        words = (word.translate(_SIGNS) for word in _cutter().cut(encodable(text), cut_all=False))
        ids: list[int] = []
        for piece in self._pieces.encode(_plain(" ".join(words)), out_type=str):
            ids += [self._pieces.piece_to_id(part) for part in self._split_number(piece)]
        return ids

    def _split_number(self, piece: str) -> list[str]:
        """ "1,000," ends in a comma that belongs to the sentence: it becomes a piece of its own."""
        if not (len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit()):
            return [piece]
        parts: list[str] = self._pieces.encode(piece[:-1].replace(SPACE, ""), out_type=str)
        if piece[0] != SPACE and parts[0][0] == SPACE:
            parts = parts[1:] if len(parts[0]) == 1 else [parts[0][1:], *parts[1:]]
        return [*parts, ","]

    def encode_special(self, text: str) -> list[int]:
        """`title<sep>text`: the names of control tokens are recognised, each part is encoded by itself."""
        ids: list[int] = []
        rest = text
        while rest:
            name = min((n for n in _NAMES if n in rest), key=rest.index, default=None)
            part, mark, rest = rest.partition(name) if name else (rest, "", "")
            ids += self.encode(part) if part else []
            ids += [_NAMES[mark]] if mark else []
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.token_bytes(token) for token in ids).decode()

    def token_bytes(self, token: int) -> bytes:
        if token in _HIDDEN or not 0 <= token < PIECES:
            return b""
        piece = self._pieces.id_to_piece(token)
        return piece.replace(SPACE, "").replace(" ", "").replace("\u2582", " ").replace("\u2583", "\n").encode()

    piece_bytes = token_bytes


def _plain(text: str) -> str:
    """Blanks folded, accents taken off, typewriter quotes made straight: what the vocabulary was made from."""
    text = " ".join(text.split()).replace("``", '"').replace("''", '"')
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


_CPM_FILES = ("chinese_vocab.model", "spiece.model")


def load_gpt2_tokenizer(folder: Path, spec: ModelSpec) -> Tokenizer:
    """Raises Damaged if there is no vocabulary, it is damaged, or has ids that the network has no rows for."""
    tokenizer: Tokenizer
    path = next((folder / name for name in _CPM_FILES if (folder / name).is_file()), None)
    if path is not None:
        tokenizer = CPMTokenizer(path)
    elif (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        tokenizer = load_tokenizer_json(folder)
    elif (folder / "merges.txt").is_file():
        path = vocabulary_file(folder, "vocab.json", "GPT-2")
        tokenizer = load_byte_pairs(folder, "GPT2Tokenizer")
    else:
        path = vocabulary_file(folder, "chinese_vocab.model", "CPM's GPT-2")
        tokenizer = CPMTokenizer(path)
    spare = 0 if isinstance(tokenizer, CPMTokenizer) else WORDS_WITHOUT_ROWS
    check_rows(path, tokenizer.vocab_size, spec.vocab_size, spare)
    return tokenizer
