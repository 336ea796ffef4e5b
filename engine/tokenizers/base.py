"""What the engine asks of a vocabulary, and what the SentencePiece ones share.

Text is put together here and not by SentencePiece, because control tokens, newlines and blanks must be told apart by
id: a model that writes the four characters `<n>` has not written a newline until the whole is there.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from glmchat.checkpoints.vocabularies import damaged_vocabulary
from glmchat.core.language import tr
from glmchat.core.text import one_line


class Tokenizer(Protocol):
    """Text to ids and back. `encode` takes every character as ordinary text: control tokens come from formats."""

    vocab_size: int
    controls: dict[str, int]  # what control tokens are called, for people to see

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

    def piece_bytes(self, token: int) -> bytes:
        """The bytes one id stands for in the middle of a text; none for a control token."""
        ...


SPACE = "\u2581"  # how a piece writes a space


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """Every byte that belongs to no character is one U+FFFD, as SentencePiece counts them."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("glmchat.each_byte", _each_byte)


def open_pieces(path: Path, data: bytes) -> sentencepiece.SentencePieceProcessor:
    """The vocabulary in `data`. Raises Damaged if it is none."""
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=data)
    except (RuntimeError, ValueError, TypeError):
        raise damaged_vocabulary(
            tr("{name} ({data:,} bytes) is not a SentencePiece vocabulary", name=one_line(path.name), data=len(data)),
            tr("the download was interrupted, or this is a different file: pull it again"),
        ) from None


def encodable(text: str) -> str:
    """Lone surrogates, which no UTF-8 has, as U+FFFD."""
    return text.encode("utf-8", "replace").decode() if re.search("[\ud800-\udfff]", text) else text


class PieceText:
    """Ids to text for one vocabulary.

    shown: ids whose text is not their piece ("" for control tokens, "\\n" for `<n>`).
    strip_all: the vocabulary folds blanks, so every space before the first visible character goes, not only one.
    """

    def __init__(
        self, pieces: sentencepiece.SentencePieceProcessor, shown: Mapping[int, str], *, strip_all: bool
    ) -> None:
        self._pieces = pieces
        self._shown = shown
        self._strip_all = strip_all
        self._size = pieces.get_piece_size()
        self._cache: dict[int, str | int] = {}  # piece text, or the value of a byte

    def _read(self, token: int) -> str | int:
        """The text of one piece with its spaces, or a byte's value."""
        piece = self._cache.get(token)
        if piece is None:
            if token in self._shown:
                piece = self._shown[token]
            elif not 0 <= token < self._size or self._pieces.is_control(token):
                piece = ""
            elif self._pieces.is_byte(token):
                piece = int(self._pieces.id_to_piece(token)[3:5], 16)
            else:
                piece = self._pieces.id_to_piece(token).replace(SPACE, " ")
            self._cache[token] = piece
        return piece

    def piece_bytes(self, token: int) -> bytes:
        piece = self._read(token)
        return bytes([piece]) if isinstance(piece, int) else piece.encode()

    def join(self, ids: Sequence[int]) -> str:
        """Text of `ids`; the space that the encoder put in front is taken off again."""
        parts: list[str] = []
        run = bytearray()  # bytes of characters that have no piece of their own
        at_start, stripped = True, False
        for token in ids:
            piece = self._read(token)
            if isinstance(piece, int):
                run.append(piece)
                at_start = False
                continue
            if run:
                parts.append(run.decode("utf-8", "glmchat.each_byte"))
                run.clear()
            if at_start and piece.startswith(" ") and token not in self._shown and not stripped:
                piece = piece[1:]
                stripped = not self._strip_all
            at_start = at_start and not piece and not stripped
            parts.append(piece)
        if run:
            parts.append(run.decode("utf-8", "glmchat.each_byte"))
        return "".join(parts)
