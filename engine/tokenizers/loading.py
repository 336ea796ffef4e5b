"""The tokenizer of a Llama-like checkpoint, in whichever of the usual forms it is there."""

from __future__ import annotations

from pathlib import Path

from glmchat.checkpoints.gguf_file import open_gguf
from glmchat.checkpoints.spec import ModelSpec
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
            from glmchat.engine.tokenizers.spm import spm_from_gguf

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
        from glmchat.engine.tokenizers.spm import load_tokenizer_model

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
