"""Words that stand for themselves beside a vocabulary's pieces: control tokens, and words that somebody added.

A file marks some of them as special; templates mean others too, as `<think>`. Both are kept apart from text: they are
tokens where a template wrote them, and plain characters where a person did.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmchat.core.json_files import small_json

# What a template may mean by a token, even where the file does not mark it as special.
LIKE_CONTROL = re.compile(r"<[^\s<>]+>|\[[A-Za-z0-9_/]+\]")
# Marks around a thought. They are shown although some files call them special: without them thought and answer run
# together, and the template, which cuts old thoughts off at them, does not find them again.
_THOUGHT = re.compile(
    r"</?(\w+:)?think(ing)?>|</?(thought|reason|reasoning)>|\[/?THINK\]|<\|(START|END)_THINKING\|>|◁/?think▷"
    r"|<\|?(begin|end)_of_thought\|?>"
)
# What the tokenizers package means by a blank: Unicode's White_Space. Python's own strip() takes U+001C to U+001F too.
_BLANKS = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
_JOINERS_AND_FRAMES = re.compile("[\u200c\u200dⒶ-ⓩ\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189]")
_END = "<|endoftext|>"
_CLASS_TOKENS: Mapping[str, Mapping[str, str]] = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "CodeLlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "CodeGenTokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "GPTNeoXTokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END, "pad_token": "<|padding|>"},
    "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
}
_NAMED = re.compile(r"\w+_token")
_MAP = "special_tokens_map.json"
# Types of models whose tokenizer.json transformers takes as it is written, whatever class the settings name.
AS_WRITTEN = frozenset({
    "beam", "bigbird_pegasus", "ernie4_5", "ernie4_5_moe", "flex_olmo", "fuyu", "glm", "glm4", "glm4_moe",
    "glm4_moe_lite", "got_ocr2", "gpt_bigcode", "granite", "granitemoe", "granitemoehybrid", "granitemoeshared",
    "hyperclovax", "internlm2", "internlm3", "iquestcoder", "jamba", "kimi_linear", "llava", "llava_next",
    "mimo_v2_flash", "minicpm3", "minimax_m2", "ministral", "ministral3", "mistral", "mistral3", "mixtral",
    "modernbert-decoder", "nemotron", "olmo2", "olmo3", "olmo_hybrid", "persimmon", "phi3", "phimoe", "pixtral",
    "stablelm", "xlm-roberta-xl",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Word:
    """One of them. lstrip, rstrip: it swallows the blanks on that side; single: it is none inside of another word."""

    text: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single: bool = False
    normalized: bool = False

    @property
    def is_control(self) -> bool:
        return self.special or LIKE_CONTROL.fullmatch(self.text) is not None

    @property
    def is_shown(self) -> bool:
        """Whether decoded text shows it."""
        return not self.special or self._is_thought

    @property
    def is_spoken(self) -> bool:
        """Whether it is the token where it stands in an answer of the model's: `<think>` and `<tool_call>` are.

        `<|im_start|>` is not, marked special or not: a model that is asked to repeat it spells it out.
        """
        return self._is_thought or (self.is_shown and not self.text.startswith("<|"))

    @property
    def _is_thought(self) -> bool:
        return _THOUGHT.fullmatch(self.text) is not None


class WordFinder:
    """Finds some of a vocabulary's words in text."""

    def __init__(self, words: Iterable[Word]) -> None:
        self.by_text = {word.text: word for word in words if word.text}
        ordered = sorted(self.by_text, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered)) or r"\b\B")

    def cut(self, text: str, trusted: Callable[[int, int, int], bool]) -> tuple[list[str | int], bool]:
        """Ids of trusted words with the text between them, and whether others stayed text.

        trusted(begin, end, id) is asked for each one found.
        """
        parts: list[str | int] = []
        untrusted = False
        end = at = 0
        while match := self._pattern.search(text, at):
            word = self.by_text[match[0]]
            at = match.start() + 1
            if word.single and _inside_a_word(text, *match.span()):
                continue
            if not trusted(*match.span(), word.id):
                untrusted = True
                continue
            before = text[end : match.start()]
            parts += [before.rstrip(_BLANKS) if word.lstrip else before, word.id]
            at = end = match.end()
            if word.rstrip:
                at = end = len(text) - len(text[end:].lstrip(_BLANKS))
        parts.append(text[end:])
        return [part for part in parts if part != ""], untrusted


def _inside_a_word(text: str, begin: int, end: int) -> bool:
    beside = text[begin - 1 : begin] + text[end : end + 1] if begin else text[end : end + 1]
    return any(_of_a_word(c) for c in beside)


def _of_a_word(character: str) -> bool:
    """What the tokenizers package means by \\w (UTS 18): marks, joiners and letters in frames too, and no fractions."""
    kind = unicodedata.category(character)
    return kind[0] in "LM" or kind in ("Nd", "Nl", "Pc") or _JOINERS_AND_FRAMES.fullmatch(character) is not None


def always(begin: int, end: int, token: int) -> bool:
    """What a template itself or a text to complete holds: every control token is one."""
    return True


def words_of_folder(folder: Path) -> list[Word]:
    """The words that a folder's settings name with an id, in the order of their ids.

    tokenizer_config.json wins over added_tokens.json, which knows only texts; what is called a `…_token` somewhere is
    special.
    """
    settings, names = small_json(folder / "tokenizer_config.json"), special_names(folder)
    words: dict[int, Word] = {}
    for text, number in small_json(folder / "added_tokens.json").items():
        if _is_id(number):
            words[number] = Word(text, number, special=text in names, normalized=text not in names)
    told = settings.get("added_tokens_decoder")
    for number, item in told.items() if isinstance(told, Mapping) else ():
        content, flags = _text(item), item if isinstance(item, Mapping) else {}
        if content is None or not str(number).isdecimal():
            continue
        words[int(number)] = Word(
            content,
            int(number),
            special=bool(flags.get("special", False)) or content in names,
            lstrip=bool(flags.get("lstrip")),
            rstrip=bool(flags.get("rstrip")),
            single=bool(flags.get("single_word")),
            normalized=bool(flags.get("normalized", True)),
        )
    return [words[number] for number in sorted(words)]


def tokenizer_class(settings: Mapping[str, Any]) -> str:
    """What tokenizer_config.json calls the class, slow or fast; "" where it does not say."""
    return str(settings.get("tokenizer_class") or "").removesuffix("Fast")


def rebuilding_class(folder: Path) -> str:
    """The class that says how the tokenizer.json of this folder cuts a text; "" where the file itself does."""
    as_written = small_json(folder / "config.json").get("model_type") in AS_WRITTEN
    return "" if as_written else tokenizer_class(small_json(folder / "tokenizer_config.json"))


def blank_before_words(settings: Mapping[str, Any], usual: bool = True) -> str:
    """Where Llama's classes put a blank before a word that follows none: "first", "always" or "never".

    "first": before the first word of a text. "always" (`legacy`): before what follows a control token too. usual:
    whether there is one at all where `add_prefix_space` does not say. As transformers' classes of these names do.
    """
    name, asked = tokenizer_class(settings), settings.get("add_prefix_space")
    if name == "GemmaTokenizer" or not (usual if asked is None else asked):
        return "never"
    return "always" if settings.get("legacy") and name != "CodeLlamaTokenizer" else "first"


def special_names(folder: Path, usual: str = "") -> frozenset[str]:
    """Texts that the folder's settings call special, with or without an id. usual: the class where they name none."""
    names = set(named_tokens(folder, usual).values())
    for data in _settings(folder):
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = data.get(key)
            items = more.values() if isinstance(more, Mapping) else more if isinstance(more, list) else ()
            names |= {text for item in items if (text := _text(item)) is not None}
    return frozenset(names)


def named_tokens(folder: Path, usual: str = "") -> dict[str, str]:
    """bos_token, eos_token and their like, which templates write by name.

    What the files do not name is as the class says that they name (transformers' own defaults); null names none.
    """
    name = tokenizer_class(small_json(folder / "tokenizer_config.json")) or usual
    if (
        name not in _CLASS_TOKENS
        and (folder / "tokenizer.model").is_file()
        and not (folder / "tokenizer.json").is_file()
    ):
        name = "LlamaTokenizer"  # the names of SentencePiece's own control pieces
    tokens = dict(_CLASS_TOKENS.get(name, {}))
    for data in _settings(folder):
        for name, value in data.items():
            if _NAMED.fullmatch(name) and (text := _text(value)) is not None:
                tokens[name] = text
            elif value is None:
                tokens.pop(name, None)
    return tokens


def _settings(folder: Path) -> list[Mapping[str, Any]]:
    """The files that name tokens, the one that wins last: beside `added_tokens_decoder` transformers reads no map."""
    settings = small_json(folder / "tokenizer_config.json")
    return [settings] if "added_tokens_decoder" in settings else [settings, small_json(folder / _MAP)]


def _text(item: Any) -> str | None:
    """A token is written as its text, or as an object that holds it."""
    text = item.get("content") if isinstance(item, Mapping) else item
    return text if isinstance(text, str) else None


def _is_id(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0
