"""The tokenizer of a folder that holds no config.json: its files say whose vocabulary it is."""

from __future__ import annotations

from pathlib import Path

from glmchat.checkpoints.config import read_json
from glmchat.engine.tokenizers.base import Tokenizer


def tokenizer_of_files(folder: Path) -> Tokenizer:
    """Raises Damaged if the files are damaged, or none of them is a vocabulary that is known."""
    if (folder / "ice_text.model").is_file():
        from glmchat.engine.tokenizers.chatglm import ChatGLMTokenizer

        return ChatGLMTokenizer(folder / "ice_text.model")
    for name in ("chinese_vocab.model", "spiece.model"):
        if (folder / name).is_file():
            from glmchat.engine.tokenizers.cpm import CPMTokenizer

            return CPMTokenizer(folder / name)
    settings = folder / "tokenizer_config.json"
    kind = read_json(settings).get("tokenizer_class") if settings.is_file() else None
    if (folder / "tokenizer.model").is_file() and kind == "ChatGLM4Tokenizer":
        from glmchat.engine.tokenizers.glm4 import GLM4Tokenizer

        return GLM4Tokenizer(folder / "tokenizer.model")
    if (folder / "tokenizer.model").is_file() and kind == "ChatGLMTokenizer":
        from glmchat.engine.tokenizers.chatglm2 import ChatGLM2Tokenizer

        # Only ChatGLM3's file brings a chat template; its vocabulary is that of ChatGLM2 and the role tokens.
        return ChatGLM2Tokenizer(folder / "tokenizer.model", roles="chat_template" in read_json(settings))
    from glmchat.engine.tokenizers.plain import load_plain_tokenizer

    return load_plain_tokenizer(folder, None)
