"""The tokenizer of a Llama-like checkpoint, in whichever of the usual forms it is there.

SentencePiece vocabularies of the Llama kind are read here: a tokenizer.model file, or the pieces in GGUF metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from glmchat.checkpoints.gguf_file import open_gguf
from glmchat.checkpoints.spec import ModelSpec
from glmchat.checkpoints.vocabularies import damaged_vocabulary
from glmchat.checkpoints.weight_files import refuse_pointer
from glmchat.core.errors import Damaged
from glmchat.core.json_files import read_json
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.tokenizers.base import Tokenizer


def load_plain_tokenizer(path: Path, spec: ModelSpec | None) -> Tokenizer:
    """From GGUF metadata, tokenizer.json, or tokenizer.model. Raises Damaged if there is none or it does not fit."""
    tokenizer = _from_gguf(path) if path.is_file() else _from_folder(path)
    if spec is not None and tokenizer.vocab_size > spec.vocab_size:
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
    metadata = open_gguf(path).metadata
    match metadata.get("tokenizer.ggml.model"):
        case "gpt2":
            from glmchat.engine.tokenizers.hf import bpe_from_gguf

            return bpe_from_gguf(metadata)
        case "llama":
            return spm_from_gguf(metadata)
        case kind:
            raise Damaged(
                tr(
                    "{name} has a vocabulary of the kind {kind}, which cannot be read",
                    name=one_line(path.name),
                    kind=one_line(repr(kind), 40),
                ),
                hint=tr("use the Hugging Face folder of this model"),
                code="tokenizer.kind",
            )


def _from_folder(folder: Path) -> Tokenizer:
    if (folder / "tokenizer.json").is_file():
        from glmchat.engine.tokenizers.hf import load_tokenizer_json

        return load_tokenizer_json(folder)
    if (folder / "tokenizer.model").is_file():
        return load_tokenizer_model(folder)
    raise Damaged(
        tr("{folder} contains no tokenizer", folder=one_line(str(folder))),
        hint=tr("expected tokenizer.json or tokenizer.model beside config.json: pull the model again"),
        code="tokenizer.missing",
    )


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
    """A sentencepiece processor. Control pieces are never found in plain text; byte pieces are put together."""

    def __init__(self, processor: Any, add_bos: int | None) -> None:
        self._processor = processor
        self._add_bos = add_bos
        self.vocab_size: int = processor.get_piece_size()
        every = range(self.vocab_size)
        self._hidden = frozenset(i for i in every if processor.is_control(i) or processor.is_unknown(i))
        self.specials = {processor.id_to_piece(i): i for i in every if processor.is_control(i)}
        self._bytes = {i: bytes([int(processor.id_to_piece(i)[3:5], 16)]) for i in every if processor.is_byte(i)}
        self._pattern = _any_of(self.specials)
        # A piece that stands for a blank is put before the first word, and not before what follows a control token.
        self._dummy = bool(processor.encode_as_pieces("a")[0].startswith("▁"))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text, out_type=int)
        return ids

    def encode_special(self, text: str) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(self._pattern.split(text)):
            if index % 2:
                ids.append(self.specials[part])
            elif part:
                ids.extend(self.encode_behind(part) if ids else self.encode(part))
        return ids

    def encode_behind(self, text: str) -> list[int]:
        """Plain text behind a control token: encoded behind a newline, which is taken off, so no blank is put in."""
        if not self._dummy:
            return self.encode(text)
        lead = self.encode("\n")
        return self.encode("\n" + text)[len(lead) :]

    def encode_completion(self, text: str) -> list[int]:
        """Raw text with the id that begins a text, where this vocabulary has one."""
        ids = self.encode_special(text)
        return ids if self._add_bos is None or ids[:1] == [self._add_bos] else [self._add_bos, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        raw = b"".join(self._raw(token) for token in ids)
        text = raw.decode("utf-8", "replace")
        return text[1:] if self._dummy and text.startswith(" ") else text

    def _raw(self, token: int) -> bytes:
        if token in self._hidden or token >= self.vocab_size:
            return b""
        data = self._bytes.get(token)
        if data is None:
            data = self._bytes[token] = self._processor.id_to_piece(token).replace("▁", " ").encode("utf-8")
        return data

    def token_bytes(self, token: int) -> bytes | None:
        return None if self._dummy else self._raw(token)  # the first blank of a text is dropped: not token by token

    def piece_bytes(self, token: int) -> bytes:
        return self._raw(token)


def _any_of(words: Mapping[str, int]) -> re.Pattern[str]:
    ordered = sorted(words, key=len, reverse=True)
    return re.compile("(" + "|".join(re.escape(word) for word in ordered) + ")" if ordered else r"(\b\B)")


def load_tokenizer_model(folder: Path) -> SentencePieceTokenizer:
    """The tokenizer.model of a folder. Raises Damaged if it is a pointer or cannot be read."""
    path = folder / "tokenizer.model"
    refuse_pointer(path)
    return _processor(path.read_bytes(), one_line(str(path)))


def _processor(serialized: bytes, where: str, add_bos: bool = True) -> SentencePieceTokenizer:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
    except (RuntimeError, OSError, ValueError) as error:
        raise damaged_vocabulary(
            tr("the vocabulary {where} cannot be read: {error}", where=where, error=one_line(str(error), 120)),
            tr("pull the model again, or verify it"),
        ) from None
    bos = processor.bos_id()
    return SentencePieceTokenizer(processor, bos if add_bos and bos >= 0 else None)


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
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    model.normalizer_spec.remove_extra_whitespaces = False
    return _processor(
        model.SerializeToString(), "in this GGUF file", bool(metadata.get("tokenizer.ggml.add_bos_token", True))
    )
