"""Byte-level BPE vocabularies out of GGUF metadata, built in memory in a fraction of a second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
from tokenizers import Tokenizer as Lower
from tokenizers.models import BPE

from glmchat.checkpoints.vocabularies import damaged_vocabulary
from glmchat.core.errors import Damaged
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.tokenizers.hf import LIKE_CONTROL, HFTokenizer

_CONTROL, _USER_DEFINED = 3, 4  # GGML's token types

# How text is cut before merging, by `tokenizer.ggml.pre`. The expressions are the models' own, as their tokenizer.json
# files have them; what they leave open (digits, contractions, blanks) decides ids, so an unknown name is refused.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_EXPRESSIONS = {
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "smaug-bpe": _LLAMA3, "dbrx": _LLAMA3,
    "qwen2": _QWEN2, "stablelm2": _QWEN2, "deepseek-r1-qwen": _QWEN2,
}  # fmt: skip
_DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_GPT2 = ("gpt-2", "gpt2", "default", "phi-2", "mpt", "olmo", "jais", "exaone")


def bpe_from_gguf(metadata: Mapping[str, Any]) -> HFTokenizer:
    """The tokenizer of a file whose `tokenizer.ggml.model` is "gpt2". Raises Damaged if the parts do not fit."""
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    types = metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(merges, list) or not tokens:
        raise _broken("it has no tokens or no merges")
    kinds = [1] * len(tokens) if types is None else list(types)
    if len(kinds) != len(tokens):
        raise _broken(f"{len(tokens)} tokens have {len(kinds)} types")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    pre = metadata.get("tokenizer.ggml.pre", "default")
    try:
        lower = Lower(BPE({text: index for index, text in enumerate(tokens)}, pairs, ignore_merges=pre in _EXPRESSIONS))
    except Exception as error:
        if isinstance(error, KeyboardInterrupt | MemoryError):
            raise
        raise _broken(one_line(str(error), 120)) from None  # the Rust side raises plain Exception
    lower.pre_tokenizer = _cutter(pre, bool(metadata.get("tokenizer.ggml.add_space_prefix", False)))
    lower.decoder = decoders.ByteLevel()
    user_defined = [index for index, kind in enumerate(kinds) if kind == _USER_DEFINED]
    specials = {tokens[index]: index for index, kind in enumerate(kinds) if kind == _CONTROL}
    specials |= {tokens[index]: index for index in user_defined if LIKE_CONTROL.fullmatch(tokens[index])}
    lower.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    plain = [tokens[index] for index in user_defined if tokens[index] not in specials]  # runs of blanks, for example
    lower.add_tokens([AddedToken(text, normalized=False) for text in plain])
    hidden = frozenset(index for index, kind in enumerate(kinds) if kind == _CONTROL)
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    add_bos = bos if metadata.get("tokenizer.ggml.add_bos_token") and isinstance(bos, int) else None
    return HFTokenizer(lower, specials, hidden, add_bos)


def _cutter(pre: Any, space: bool) -> Any:
    if pre in _EXPRESSIONS:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_EXPRESSIONS[pre]), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False),
            ]
        )
    words = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=True)
    if pre in _DIGITS_FIRST:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    if pre in _GPT2:
        return words
    raise Damaged(
        tr(
            "this file's vocabulary splits text in a way that glmchat does not support: {pre}",
            pre=one_line(repr(pre), 40),
        ),
        hint=tr("use the Hugging Face folder of this model"),
        code="tokenizer.pre",
    )


def _broken(what: str) -> Damaged:
    return damaged_vocabulary(
        tr("the vocabulary in this GGUF file is broken: {what}", what=what), tr("pull the model again")
    )
