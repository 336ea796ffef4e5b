"""Vocabularies of the `tokenizers` package: tokenizer.json, GPT-2's two files, and what GGUF metadata says of one.

Two ways in: `encode` takes every character as ordinary text, `encode_special` is for our own templates and recognises
control tokens. A person's `<|im_start|>` therefore never becomes the control token.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Lower
from tokenizers.models import BPE

from glmchat.checkpoints.vocabularies import damaged_vocabulary
from glmchat.checkpoints.weight_files import refuse_pointer
from glmchat.core.errors import Damaged, Usage
from glmchat.core.json_files import small_json
from glmchat.core.language import tr
from glmchat.core.sandbox import Sandbox
from glmchat.core.text import one_line
from glmchat.engine.tokenizers.words import (
    Word,
    WordFinder,
    blank_before_words,
    named_tokens,
    rebuilding_class,
    special_names,
    tokenizer_class,
    words_of_folder,
)

_LARGEST = 256 * 2**20
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how a vocabulary of characters writes a byte


class HFTokenizer:
    """`lower`, with the words that stand beside its pieces."""

    def __init__(self, lower: Lower, words: Sequence[Word], begin: Sequence[int] = ()) -> None:
        """words: control tokens and added words. begin: the ids that begin a raw completion."""
        self._lower = lower
        self._lock = threading.Lock()  # encode_special_tokens below is a switch on the shared object
        self.vocab_size: int = lower.get_vocab_size(with_added_tokens=True)
        self._control = WordFinder(word for word in words if word.is_control)
        self.specials = {text: word.id for text, word in self._control.by_text.items()}
        self.controls = self.specials
        self.spoken = frozenset(word.id for word in words if word.is_spoken)
        self._special = frozenset(word.text for word in words if word.special)
        self._hidden = frozenset(word.id for word in words if not word.is_shown)
        # The library only holds back tokens that are marked special, so those a template may mean are marked too.
        unmarked = [_added(word, special=True) for word in words if word.is_control and not word.special]
        if unmarked:
            lower.add_special_tokens(unmarked)
        lower.encode_special_tokens = True  # True: control tokens in the text are encoded as text
        self._begin = list(begin)
        self._mark: tuple[str, int] | None = None
        self._bytes = _byte_table(lower)
        if self._bytes is not None:  # an added word is written as itself; its letters are no stand-ins for bytes
            self._bytes |= {w.id: w.text.encode() for w in words if w.is_shown and not _is_byte(lower, w.text)}

    def encode(self, text: str) -> list[int]:
        _refuse_slow(self._lower, text)  # which may take seconds: others go on meanwhile
        with self._lock:
            return _encode(self._lower, text)

    def encode_special(self, text: str) -> list[int]:
        _refuse_slow(self._lower, text)
        with self._lock:
            self._lower.encode_special_tokens = False
            try:
                return _encode(self._lower, text)
            finally:
                self._lower.encode_special_tokens = True

    def encode_rendered(self, text: str, trusted: Callable[[int, int, int], bool]) -> list[int]:
        """As `encode_special`; a control token that is not trusted is text.

        The library knows all or none. Where both stand in a text, each trusted one is written as one added word that
        nobody else can write, and put back among the ids: so what is beside it is encoded as it is beside any word.
        """
        parts, untrusted = self._control.cut(text, trusted)
        if not untrusted:
            return self.encode_special(text)
        mark, number = self._marked()
        controls = iter([part for part in parts if isinstance(part, int)])
        ids = self.encode("".join(mark if isinstance(part, int) else part for part in parts))
        return [next(controls) if token == number else token for token in ids]

    def _marked(self) -> tuple[str, int]:
        with self._lock:
            if self._mark is None:
                text = f"\ue000{secrets.token_hex(16)}\ue001"
                self._lower.add_tokens([AddedToken(text, normalized=False)])
                self._mark = text, self.vocab_size
            return self._mark

    def encode_completion(self, text: str) -> list[int]:
        """Raw text behind the ids that begin a text, where there are some: as in transformers, once more where
        the text brings them itself."""
        return [*self._begin, *self.encode_special(text)]

    def save(self, path: Path) -> None:
        """Write it as a tokenizer.json, as it was before templates had their say."""
        data = json.loads(self._lower.to_str())
        mark = None if self._mark is None else self._mark[0]
        words = [word for word in data["added_tokens"] if word["content"] != mark]
        data["added_tokens"] = [{**word, "special": word["content"] in self._special} for word in words]
        path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")

    def decode(self, ids: Sequence[int]) -> str:
        if self._bytes is not None:
            return b"".join(self.token_bytes(token) or b"" for token in ids).decode("utf-8", "replace")
        # Rows of the matrix beyond the vocabulary are no words; one of those ids is the mark's.
        shown = [token for token in ids if token not in self._hidden and token < self.vocab_size]
        text: str = self._lower.decode(shown, skip_special_tokens=False)
        return text

    def token_bytes(self, token: int) -> bytes | None:
        if self._bytes is None:
            return None
        if token in self._hidden:
            return b""
        piece = self._lower.id_to_token(token)
        if piece is None or token >= self.vocab_size:  # padding of the matrix beyond the vocabulary
            return b""
        data = self._bytes.get(token)
        if data is None:
            alphabet = _alphabet()
            if all(c in alphabet for c in piece):
                data = bytes(alphabet[c] for c in piece)
            else:  # no piece of bytes
                data = piece.encode("utf-8")
            self._bytes[token] = data
        return data

    def piece_bytes(self, token: int) -> bytes:
        known = self.token_bytes(token)
        if known is not None:
            return known
        piece = self._lower.id_to_token(token)
        if piece is None or token in self._hidden or token >= self.vocab_size:
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
        lower = Lower.from_file(str(path))
        lower.no_padding()  # of batches, in training: a chat never pads, and never cuts in silence
        lower.no_truncation()
        told = words_of_folder(folder)
        _add_missing(lower, told)
        if (name := rebuilding_class(folder)) in _LLAMA:
            _prefix_as_llama(lower, small_json(folder / "tokenizer_config.json"))
        if name == "CodeLlamaTokenizer":
            _begin_with(lower, named_tokens(folder)["bos_token"])
        return wrap(lower, special_names(folder) | {word.text for word in told if word.special})
    except BaseException as error:  # noqa: BLE001 - see raise_own
        raise_own(error)
        raise damaged_vocabulary(
            tr(
                "tokenizer.json in {folder} cannot be read: {error}",
                folder=one_line(str(folder)),
                error=one_line(str(error), 120),
            ),
            tr("pull the model again, or verify it"),
        ) from None


def load_byte_pairs(folder: Path, usual: str = "") -> HFTokenizer:
    """vocab.json and merges.txt, put together as the class in tokenizer_config.json does it, or `usual` without one.

    Raises Damaged, also for a class that is not one of `BYTE_PAIRS`.
    """
    paths = folder / "vocab.json", folder / "merges.txt"
    for path in paths:
        refuse_pointer(path)
    settings = small_json(folder / "tokenizer_config.json")
    name, space = tokenizer_class(settings) or usual, settings.get("add_prefix_space") is True
    try:
        lower = Lower(BPE.from_file(*map(str, paths)))
        lower.decoder = decoders.ByteLevel()
        if name == "Qwen2Tokenizer":
            lower.normalizer = normalizers.NFC()
        lower.pre_tokenizer = _cutter(BYTE_PAIRS[name], space)
        told = words_of_folder(folder)
        _add_missing(lower, told)
        special = special_names(folder, usual) | {word.text for word in told if word.special}
        here = [text for text in sorted(special) if lower.token_to_id(text) is not None]
        lower.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in here])
        lower.add_tokens(
            [_added(w, special=False) for w in told if lower.token_to_id(w.text) == w.id and not w.special]
        )
        if settings.get("add_bos_token") is True and (begin := named_tokens(folder, usual).get("bos_token")):
            _begin_with(lower, begin)
        return wrap(lower, frozenset(special))
    except BaseException as error:  # noqa: BLE001 - see raise_own
        raise_own(error)
        raise damaged_vocabulary(
            tr(
                "{name} and {name2} are not a GPT-2 vocabulary: {error}",
                name=paths[0].name,
                name2=paths[1].name,
                error=one_line(str(error), 120),
            ),
            tr("pull the model again"),
        ) from None


def raise_own(error: BaseException) -> None:
    """Raise again what is no fault of a vocabulary. The Rust side raises plain Exception for what it cannot read, and a
    panic is a BaseException."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError | Damaged):
        raise error


_LONG = 20_000  # characters
# What an expression is quadratic in. So many characters take 20 ms then, 20,000 of them five seconds.
_RUN = re.compile(r"\s{1000}|[^\W\d_]{1000}|\d{1000}|[^\w\s]{1000}|_{1000}")
_SECONDS, _CHARACTERS_A_SECOND = 2.0, 25_000  # what a long text may take, on a busy machine
_TRIAL = "glmchat.engine.tokenizers.trial"


def _refuse_slow(lower: Lower, text: str) -> None:
    r"""Raise Usage for a long text that the expressions of a vocabulary do not get through in time.

    Some are quadratic in runs of blanks (`\s+$`), and the library lets nothing else of this process run meanwhile, so
    a long text, or one with a long run, is encoded in a process that can be ended first.
    """
    is_long = len(text) > _LONG
    if not (is_long or _RUN.search(text)) or not _has_expression(lower):
        return
    seconds = _SECONDS + len(text) / _CHARACTERS_A_SECOND
    table, sandbox = (lower if is_long else _expressions(lower)).to_str(), Sandbox(_TRIAL)
    try:
        if sandbox.obstacle() is None:
            memory = 2**30 + 64 * (len(table) + 4 * len(text))
            request = {"reader": "text", "path": table, "text": text, "seconds": seconds, "memory": memory}
            sandbox.send(request)
            reply = sandbox.reply(4 * seconds)
            if "late" in reply or "died" in reply:
                raise Usage(
                    tr("the vocabulary takes more than {seconds} s to cut this text", seconds=f"{seconds:.0f}"),
                    hint=tr("shorten long runs of blanks or of one character"),
                    code="tokenizer.slow",
                )
    finally:
        sandbox.stop()


def _expressions(lower: Lower) -> Lower:
    """How a text is cut, without the words: they are most of a vocabulary."""
    cut = Lower(BPE())
    if lower.normalizer is not None:
        cut.normalizer = lower.normalizer
    if lower.pre_tokenizer is not None:
        cut.pre_tokenizer = lower.pre_tokenizer
    return cut


def _has_expression(lower: Lower) -> bool:
    stages = (lower.normalizer, lower.pre_tokenizer)
    return any(stage is not None and b'"Regex"' in stage.__getstate__() for stage in stages)


def _encode(lower: Lower, text: str) -> list[int]:
    try:
        ids: list[int] = lower.encode(text, add_special_tokens=False).ids
    except BaseException as error:  # noqa: BLE001 - see raise_own
        raise_own(error)
        raise damaged_vocabulary(
            tr("the vocabulary cannot encode this text: {error}", error=one_line(str(error), 120)),
            tr("pull the model again, or verify it"),
        ) from None
    return ids


def wrap(lower: Lower, special: frozenset[str] = frozenset()) -> HFTokenizer:
    """`lower` with its added words found. special: the texts that settings beside the file call so."""
    words = [
        Word(t.content, index, t.special or t.content in special, t.lstrip, t.rstrip, t.single_word, t.normalized)
        for index, t in lower.get_added_tokens_decoder().items()
    ]
    return HFTokenizer(lower, words, _begin_of(lower))


def _added(word: Word, *, special: bool) -> AddedToken:
    return AddedToken(
        word.text,
        single_word=word.single,
        lstrip=word.lstrip,
        rstrip=word.rstrip,
        normalized=word.normalized,
        special=special,
    )


def _add_missing(lower: Lower, told: Sequence[Word]) -> None:
    """Words that the settings name and tokenizer.json lacks, as long as they come to their own ids."""
    for word in told:
        if lower.token_to_id(word.text) is None and word.id == lower.get_vocab_size(with_added_tokens=True):
            add = lower.add_special_tokens if word.special else lower.add_tokens
            add([_added(word, special=word.special)])


_LLAMA = frozenset({"LlamaTokenizer", "CodeLlamaTokenizer"})


def _prefix_as_llama(lower: Lower, settings: Mapping[str, Any]) -> None:
    """Llama's own class decides by `legacy` where a blank stands before a word, whatever its tokenizer.json says."""
    if not isinstance(lower.model, BPE) or not lower.model.byte_fallback:
        return
    lower.normalizer = None
    lower.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=blank_before_words(settings), split=False)


def _begin_with(lower: Lower, text: str) -> None:
    """Code Llama's class begins each text with this token, whatever its tokenizer.json says."""
    number = lower.token_to_id(text)
    if number is not None:
        lower.post_processor = processors.TemplateProcessing(single=[text, "$A"], special_tokens=[(text, number)])


def _begin_of(lower: Lower) -> list[int]:
    """The ids that the file's post-processor puts before a single text."""
    plain = lower.encode("a", add_special_tokens=False).ids
    dressed: list[int] = lower.encode("a", add_special_tokens=True).ids
    at = next((n for n in range(len(dressed)) if dressed[n : n + len(plain)] == plain), 0)
    return dressed[:at]


@cache
def _alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: character -> byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in plain}
    others = (byte for byte in range(256) if byte not in set(plain))
    return {**table, **{chr(256 + index): byte for index, byte in enumerate(others)}}


def _is_byte(lower: Lower, text: str) -> bool:
    """One letter that stands for a byte in this vocabulary, and for one that texts are made of.

    A word that has the id of such a byte cannot be told from it. Control characters are in no text, nor some bytes in
    any UTF-8: there the word is meant.
    """
    byte = _alphabet().get(text)
    rare = byte is None or (byte < 0x20 and byte not in b"\t\n") or byte in (0x7F, 0xC0, 0xC1) or byte > 0xF4
    return not rare and text in lower.get_vocab(with_added_tokens=False)


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
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "falcon3": _LLAMA3, "falcon-h1": _LLAMA3,
    "pixtral": _LLAMA3, "midm-2.0": _LLAMA3, "lfm2": _LLAMA3, "smaug-bpe": _LLAMA3, "dbrx": _LLAMA3,
    "qwen2": _QWEN2, "stablelm2": _QWEN2, "deepseek-r1-qwen": _QWEN2,
}  # fmt: skip
# Where the file does not say whether a text begins with the begin token, llama.cpp takes it from the name.
_BEGINS = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"})
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
    except BaseException as error:  # noqa: BLE001 - see raise_own
        raise_own(error)
        raise _broken(one_line(str(error), 120)) from None
    lower.pre_tokenizer = _cutter(pre, bool(metadata.get("tokenizer.ggml.add_space_prefix", False)))
    lower.decoder = decoders.ByteLevel()
    words = [
        Word(tokens[index], index, special=kind == _CONTROL)
        for index, kind in enumerate(kinds)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    lower.add_special_tokens([_added(word, special=True) for word in words if word.special])
    lower.add_tokens([_added(word, special=False) for word in words if not word.special])  # runs of blanks, for example
    bos, asked = metadata.get("tokenizer.ggml.bos_token_id"), metadata.get("tokenizer.ggml.add_bos_token")
    begins = pre in _BEGINS if asked is None else bool(asked)
    return HFTokenizer(lower, words, [bos] if begins and isinstance(bos, int) else [])


BYTE_PAIRS = {"GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}  # class -> how it cuts a text


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
