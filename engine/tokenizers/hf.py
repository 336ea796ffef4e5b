"""Vocabularies of the `tokenizers` package: tokenizer.json, and what GGUF metadata says of one.

Two ways in: `encode` takes every character as ordinary text, `encode_special` is for our own templates and recognises
control tokens. A person's `<|im_start|>` therefore never becomes the control token.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
from tokenizers import Tokenizer as Lower
from tokenizers.models import BPE

from glmchat.checkpoints.vocabularies import damaged_vocabulary
from glmchat.checkpoints.weight_files import refuse_pointer
from glmchat.core.errors import Damaged
from glmchat.core.language import tr
from glmchat.core.text import one_line

_LARGEST = 256 * 2**20
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how a vocabulary of characters writes a byte
# What a template may mean by a token, even where the file does not mark it as special.
LIKE_CONTROL = re.compile(r"<[^\s<>]+>|\[[A-Za-z0-9_/]+\]")


class HFTokenizer:
    """`lower` with its control tokens known by text: `specials`, text -> id."""

    def __init__(self, lower: Lower, specials: Mapping[str, int], hidden: frozenset[int], add_bos: int | None) -> None:
        """hidden: ids that vanish in decoded text; add_bos: the id that begins a raw completion, if there is one."""
        self._lower = lower
        self._lock = threading.Lock()  # encode_special_tokens below is a switch on the shared object
        lower.encode_special_tokens = True  # True: control tokens in the text are encoded as text
        self.specials = dict(specials)
        self.vocab_size: int = lower.get_vocab_size(with_added_tokens=True)
        self._hidden = hidden
        self._add_bos = add_bos
        self._bytes = _byte_table(lower)

    def encode(self, text: str) -> list[int]:
        with self._lock:
            ids: list[int] = self._lower.encode(text, add_special_tokens=False).ids
        return ids

    def encode_special(self, text: str) -> list[int]:
        with self._lock:
            self._lower.encode_special_tokens = False
            try:
                ids: list[int] = self._lower.encode(text, add_special_tokens=False).ids
            finally:
                self._lower.encode_special_tokens = True
        return ids

    def encode_behind(self, text: str) -> list[int]:
        """Plain text behind a control token, which some vocabularies encode otherwise than the beginning of a text."""
        if not self.specials:
            return self.encode(text)
        control = next(iter(self.specials))
        lead = len(self.encode_special(control))
        if self.encode_special(control + "a")[lead:] == self.encode("a"):
            return self.encode(text)
        mark = self.encode("\n")
        return self.encode("\n" + text)[len(mark) :]

    def encode_completion(self, text: str) -> list[int]:
        """Raw text with the id that begins a text, where this vocabulary has one."""
        ids = self.encode_special(text)
        return ids if self._add_bos is None or ids[:1] == [self._add_bos] else [self._add_bos, *ids]

    def save(self, path: Path) -> None:
        """Write it as a tokenizer.json."""
        self._lower.save(str(path))

    def decode(self, ids: Sequence[int]) -> str:
        if self._bytes is not None:
            return b"".join(self.token_bytes(token) or b"" for token in ids).decode("utf-8", "replace")
        text: str = self._lower.decode([token for token in ids if token not in self._hidden], skip_special_tokens=False)
        return text

    def token_bytes(self, token: int) -> bytes | None:
        if self._bytes is None:
            return None
        if token in self._hidden:
            return b""
        piece = self._lower.id_to_token(token)
        if piece is None:  # padding of the matrix beyond the vocabulary
            return b""
        data = self._bytes.get(token)
        if data is None:
            alphabet = _alphabet()
            if all(c in alphabet for c in piece):
                data = bytes(alphabet[c] for c in piece)
            else:  # an added token is written as itself
                data = piece.encode("utf-8")
            self._bytes[token] = data
        return data

    def piece_bytes(self, token: int) -> bytes:
        known = self.token_bytes(token)
        if known is not None:
            return known
        piece = self._lower.id_to_token(token)
        if piece is None or token in self._hidden:
            return b""
        if byte := _BYTE.fullmatch(piece):
            return bytes.fromhex(byte[1])
        lead = self._lower.encode("a", add_special_tokens=False).ids[-1:]
        return self.decode([*lead, token])[len(self.decode(lead)) :].encode()


def load_tokenizer_json(folder: Path) -> HFTokenizer:
    """The tokenizer.json of a folder. Raises Damaged if it is a pointer, damaged, or of an unknown kind."""
    path = folder / "tokenizer.json"
    refuse_pointer(path)
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("it is larger than 256 MB")
        return wrap(Lower.from_file(str(path)))
    except Exception as error:  # noqa: BLE001 - the Rust side raises plain Exception for everything it cannot read
        raise damaged_vocabulary(
            tr(
                "tokenizer.json in {folder} cannot be read: {error}",
                folder=one_line(str(folder)),
                error=one_line(str(error), 120),
            ),
            tr("pull the model again, or verify it"),
        ) from None


def wrap(lower: Lower) -> HFTokenizer:
    """`lower` with its control tokens found."""
    added = lower.get_added_tokens_decoder()  # id -> AddedToken
    specials = {t.content: index for index, t in added.items() if t.special or LIKE_CONTROL.fullmatch(t.content)}
    hidden = frozenset(index for index, token in added.items() if token.special)
    # The library only holds back tokens that are marked special, so those a template may mean are marked too.
    unmarked = [token for token in added.values() if token.content in specials and not token.special]
    for token in unmarked:
        token.special = True
    if unmarked:
        lower.add_special_tokens(unmarked)
    return HFTokenizer(lower, specials, hidden, _bos_of(lower))


def _bos_of(lower: Lower) -> int | None:
    """The id that the file's post-processor puts before a single text, if it does that."""
    plain = lower.encode("a", add_special_tokens=False).ids
    dressed = lower.encode("a", add_special_tokens=True).ids
    return int(dressed[0]) if len(dressed) > len(plain) and dressed[1 : 1 + len(plain)] == plain else None


@cache
def _alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: character -> byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in set(plain))
    return {**table, **{chr(256 + index): byte for index, byte in enumerate(others)}}


def _byte_table(lower: Lower) -> dict[int, bytes] | None:
    """An empty memo for a byte-level vocabulary; None for one whose pieces are not bytes."""
    decoder = lower.decoder
    return {} if decoder is not None and type(decoder).__name__ == "ByteLevel" else None


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
