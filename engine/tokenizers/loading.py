"""The tokenizer of a Llama-like checkpoint, in whichever of the usual forms it is there.

SentencePiece vocabularies of the Llama kind are read here: a tokenizer.model file, or the pieces in GGUF metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from glmchat.checkpoints.gguf_file import open_gguf
from glmchat.checkpoints.spec import ModelSpec
from glmchat.checkpoints.tokenizer_files import PAIR, check_gguf_tokenizer, no_tokenizer
from glmchat.checkpoints.vocabularies import WORDS_WITHOUT_ROWS, damaged_vocabulary
from glmchat.checkpoints.weight_files import refuse_pointer
from glmchat.core.errors import Damaged
from glmchat.core.files import read_file
from glmchat.core.json_files import read_json, small_json
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.tokenizers.base import SPACE, Tokenizer
from glmchat.engine.tokenizers.words import LIKE_CONTROL, Word, WordFinder, always, blank_before_words, words_of_folder


def load_plain_tokenizer(path: Path, spec: ModelSpec | None) -> Tokenizer:
    """From GGUF metadata, tokenizer.json, tokenizer.model, or vocab.json and merges.txt.

    Raises Damaged if there is none or it does not fit.
    """
    tokenizer = _from_gguf(path) if path.is_file() else _from_folder(path)
    if spec is not None and tokenizer.vocab_size > spec.vocab_size + WORDS_WITHOUT_ROWS:
        raise Damaged(
            tr(
                "the vocabulary has {vocab_size} tokens, but the model has {vocab_size2}",
                vocab_size=tokenizer.vocab_size,
                vocab_size2=spec.vocab_size,
            ),
            hint=tr("the tokenizer and the weights belong to different models or revisions: pull the model again"),
            code="tokenizer.size",
        )
    return tokenizer


def _from_gguf(path: Path) -> Tokenizer:
    file = open_gguf(path)
    check_gguf_tokenizer(file)
    if file.metadata["tokenizer.ggml.model"] == "gpt2":
        from glmchat.engine.tokenizers.hf import bpe_from_gguf

        return bpe_from_gguf(file.metadata)
    return spm_from_gguf(file.metadata)


def _from_folder(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        from glmchat.engine.tokenizers.hf import load_tokenizer_json

        return load_tokenizer_json(folder)
    if (folder / "tokenizer.model").is_file():
        return load_tokenizer_model(folder)
    if all((folder / name).is_file() for name in PAIR):
        from glmchat.engine.tokenizers.hf import load_byte_pairs

        return load_byte_pairs(folder)
    raise no_tokenizer(folder)


def tokenizer_of_files(folder: Path) -> Tokenizer:
    """Raises Damaged if the files are damaged, or none of them is a vocabulary that is known."""
    if (folder / "ice_text.model").is_file():
        from glmchat.engine.tokenizers.chatglm import ChatGLMTokenizer

        return ChatGLMTokenizer(folder / "ice_text.model")
    for name in ("chinese_vocab.model", "spiece.model"):
        if (folder / name).is_file():
            from glmchat.engine.tokenizers.gpt2 import CPMTokenizer

            return CPMTokenizer(folder / name)
    settings = folder / "tokenizer_config.json"
    kind = read_json(settings).get("tokenizer_class") if settings.is_file() else None
    if (folder / "tokenizer.model").is_file() and kind == "ChatGLM4Tokenizer":
        from glmchat.engine.tokenizers.chatglm2 import GLM4Tokenizer

        return GLM4Tokenizer(folder / "tokenizer.model")
    if (folder / "tokenizer.model").is_file() and kind == "ChatGLMTokenizer":
        from glmchat.engine.tokenizers.chatglm2 import ChatGLM2Tokenizer

        # Only ChatGLM3's file brings a chat template; its vocabulary is that of ChatGLM2 and the role tokens.
        return ChatGLM2Tokenizer(folder / "tokenizer.model", roles="chat_template" in read_json(settings))
    return load_plain_tokenizer(folder, None)


class SentencePieceTokenizer:
    """A sentencepiece processor that puts no blank before a text, and the words beside its pieces.

    Control pieces are never found in plain text; byte pieces are put together.
    """

    def __init__(
        self, processor: Any, words: Sequence[Word], begin: Sequence[int], prefix: str, *, one_blank: bool
    ) -> None:
        """words: added ones and control pieces. begin: the ids that begin a raw completion.

        prefix: where a blank stands before a word that follows none: "first" in a text, "always" behind a control
        token too, or "never". one_blank: a text that begins with a blank has it already (transformers; not llama.cpp).
        """
        self._processor = processor
        self._begin, self._prefix, self._one_blank = list(begin), prefix, one_blank
        self._control, self._added = (
            WordFinder(word for word in words if word.is_control == control) for control in (True, False)
        )
        self.specials = {text: word.id for text, word in self._control.by_text.items()}
        self.controls = self.specials
        self.spoken = frozenset(word.id for word in words if word.is_spoken)
        self._pieces = processor.get_piece_size()
        self.vocab_size: int = max([self._pieces, *(word.id + 1 for word in words)])
        hidden = frozenset(word.id for word in words if not word.is_shown)
        self._bytes = {
            i: bytes([int(processor.id_to_piece(i)[3:5], 16)]) for i in range(self._pieces) if processor.is_byte(i)
        }
        self._bytes |= {word.id: b"" if word.id in hidden else word.text.encode() for word in words}

    def encode(self, text: str) -> list[int]:
        return self._words(text, first=True)

    def encode_special(self, text: str) -> list[int]:
        return self.encode_rendered(text, always)

    def encode_rendered(self, text: str, trusted: Callable[[int, int, int], bool]) -> list[int]:
        """As `encode_special`; a control token that is not trusted is text."""
        ids: list[int] = []
        for number, part in enumerate(self._control.cut(text, trusted)[0]):
            ids += [part] if isinstance(part, int) else self._words(part, first=number == 0)
        return ids

    def _words(self, text: str, *, first: bool) -> list[int]:
        """Plain text, in which added words that are no control tokens are found."""
        ids: list[int] = []
        for number, part in enumerate(self._added.cut(text, always)[0]):
            ids += [part] if isinstance(part, int) else self._encode(part, first=first and number == 0)
        return ids

    def _encode(self, text: str, *, first: bool) -> list[int]:
        blank = self._prefix == "always" or (first and self._prefix == "first")
        if blank and not (self._one_blank and text.startswith((" ", SPACE))):
            text = f" {text}"
        ids: list[int] = self._processor.encode(text, out_type=int)
        return ids

    def encode_completion(self, text: str) -> list[int]:
        """Raw text behind the ids that begin a text, where there are some: as in transformers, once more where
        the text brings them itself."""
        return [*self._begin, *self.encode_special(text)]

    def decode(self, ids: Sequence[int]) -> str:
        raw = b"".join(self._raw(token) for token in ids)
        text = raw.decode("utf-8", "replace")
        return text[1:] if self._prefix != "never" and text.startswith(" ") else text

    def _raw(self, token: int) -> bytes:
        data = self._bytes.get(token)
        if data is None:
            piece = self._processor.id_to_piece(token) if 0 <= token < self._pieces else ""
            data = self._bytes[token] = piece.replace(SPACE, " ").encode("utf-8")
        return data

    def token_bytes(self, token: int) -> bytes | None:
        # Where the first blank of a text is dropped, it cannot be put together token by token.
        return None if self._prefix != "never" else self._raw(token)

    def piece_bytes(self, token: int) -> bytes:
        return self._raw(token)


_CONTROL, _UNKNOWN, _USER_DEFINED = 3, 2, 4  # SentencePiece's types of pieces, and GGML's


def load_tokenizer_model(folder: Path) -> SentencePieceTokenizer:
    """The tokenizer.model of a folder, with the words that were added beside it.

    Raises Damaged if it is a pointer or cannot be read.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto

    path, settings = folder / "tokenizer.model", small_json(folder / "tokenizer_config.json")
    refuse_pointer(path)
    model = proto.ModelProto()
    try:
        model.ParseFromString(read_file(path))
    except Exception as error:  # noqa: BLE001 - protobuf's own DecodeError, which is not worth an import
        raise _unreadable(one_line(str(path)), error) from None
    prefix = blank_before_words(settings, usual=model.normalizer_spec.add_dummy_prefix)
    begins = settings.get("add_bos_token", True) is not False
    return _tokenizer(model, one_line(str(path)), words_of_folder(folder), begins, prefix, one_blank=True)


def _tokenizer(
    model: Any, where: str, added: Sequence[Word], begins: bool, prefix: str, *, one_blank: bool
) -> SentencePieceTokenizer:
    """added: words with ids; where one is the id of a piece, what it says of the piece holds."""
    # As transformers reads them: the text as it is, no blanks folded, no characters exchanged.
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.precompiled_charsmap = b""
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    words = {word.id: word for word in added}
    for number, piece in enumerate(model.pieces):
        if piece.type in (_CONTROL, _UNKNOWN):
            words.setdefault(number, Word(piece.piece, number))
        elif piece.type == _USER_DEFINED and (SPACE not in piece.piece or LIKE_CONTROL.fullmatch(piece.piece)):
            words.setdefault(number, Word(piece.piece, number, special=False))
        if number in words and piece.type == _USER_DEFINED:
            piece.type = _CONTROL  # else it would be found where a person typed it, and with a blank before it
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    except (RuntimeError, OSError, ValueError) as error:
        raise _unreadable(where, error) from None
    bos = processor.bos_id()
    return SentencePieceTokenizer(
        processor, list(words.values()), [bos] if begins and bos >= 0 else [], prefix, one_blank=one_blank
    )


def _unreadable(where: str, error: Exception) -> Damaged:
    return damaged_vocabulary(
        tr("the vocabulary {where} cannot be read: {error}", where=where, error=one_line(str(error), 120)),
        tr("pull the model again, or verify it"),
    )


def spm_from_gguf(metadata: Mapping[str, Any]) -> SentencePieceTokenizer:
    """The tokenizer of a file whose `tokenizer.ggml.model` is "llama": its pieces as a sentencepiece model."""
    from sentencepiece import sentencepiece_model_pb2 as proto

    tokens, scores = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.scores")
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or scores is None or types is None or not len(tokens) == len(scores) == len(types):
        raise damaged_vocabulary(
            tr("the vocabulary in this GGUF file is broken: pieces, scores and types do not match"),
            tr("pull the model again"),
        )
    model = proto.ModelProto()
    for text, score, kind in zip(tokens, scores, types, strict=True):
        model.pieces.add(piece=text, score=score, type=kind if kind in (1, 2, 3, 4, 5, 6) else 1)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = 6 in types
    for field, key in (("unk_id", "unknown"), ("bos_id", "bos"), ("eos_id", "eos"), ("pad_id", "padding")):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        setattr(model.trainer_spec, field, value if isinstance(value, int) and value < len(tokens) else -1)
    for field, key in (
        ("unk_piece", "unk_id"),
        ("bos_piece", "bos_id"),
        ("eos_piece", "eos_id"),
        ("pad_piece", "pad_id"),
    ):
        index = getattr(model.trainer_spec, key)
        if index >= 0:
            setattr(model.trainer_spec, field, tokens[index])
    prefix = "first" if metadata.get("tokenizer.ggml.add_space_prefix", True) else "never"
    begins = bool(metadata.get("tokenizer.ggml.add_bos_token", True))
    return _tokenizer(model, "in this GGUF file", [], begins, prefix, one_blank=False)
