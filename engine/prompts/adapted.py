"""The chat formats of one model: its own, and those that its adapters bring.

Trainers save a tokenizer and a chat template into an adapter's folder. Where these differ from the model's, the adapter
was trained with them, and is spoken to with them while it is active.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from glmchat.checkpoints.adapter_check import read_facts
from glmchat.checkpoints.adapter_files import brings_text, own_tokenizer
from glmchat.checkpoints.adapter_fit import words_with
from glmchat.checkpoints.adapter_settings import formats_of_two
from glmchat.checkpoints.spec import ModelSpec
from glmchat.checkpoints.vocabularies import WORDS_WITHOUT_ROWS
from glmchat.checkpoints.vocabulary_trial import try_vocabulary
from glmchat.core.errors import Usage
from glmchat.core.fingerprints import State, state_of
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.prompts.base import PromptFormat
from glmchat.engine.prompts.chat_template import folder_template
from glmchat.engine.prompts.template import BaseModel, TemplatePrompt, TemplateTokenizer, template_format
from glmchat.engine.tokenizers.base import Tokenizer
from glmchat.engine.tokenizers.loading import load_plain_tokenizer

Adapters = Sequence[Path] | None
"""Folders of the adapters that will answer; None: those that are active."""


class Formats:
    """Of one model. own: the model's, None without a tokenizer. Any thread may ask."""

    def __init__(self, own: PromptFormat | None, spec: ModelSpec) -> None:
        self.own = self.active = own
        self._spec = spec
        self._brought: dict[Path, tuple[State, PromptFormat | None]] = {}
        self._lock = threading.Lock()

    def of(self, adapters: Adapters) -> PromptFormat | None:
        """How these adapters want conversations written; they need not be attached.

        Raises Damaged or Hostile for what they bring, and Usage if it does not fit the model, or two of them disagree.
        """
        if adapters is None or self.own is None:
            return self.active
        brought = ((folder, self._of_one(folder)) for folder in adapters)
        own = {folder.name: prompt for folder, prompt in brought if prompt is not None}
        if len({_kind(prompt) for prompt in own.values()}) > 1:
            raise formats_of_two(list(own))
        return next(iter(own.values()), self.own)

    def check(self, folder: Path) -> None:
        """Raise what `of` raises for the adapter there alone."""
        self.of([folder])

    def rows(self, prompt: PromptFormat | None) -> int:
        """Words that the network has rows for while it is spoken to like this."""
        return self._spec.vocab_size if prompt is None or prompt.rows is None else prompt.rows

    def with_rows(self, prompt: PromptFormat, ids: list[int]) -> list[int]:
        """The ids of a text. Raises Usage for a word of the vocabulary that the network has no row for: the published
        Gemma 3 1B has one such word."""
        rows = self.rows(prompt)
        if (strange := next((token for token in ids if token >= rows), None)) is None:
            return ids
        specials = getattr(prompt.tokenizer, "specials", {})
        word = next((text for text, token in specials.items() if token == strange), None)
        raise Usage(
            tr(
                "the tokenizer knows the word {word}, but the network has no row for it",
                word=_shown(prompt.tokenizer, strange) if word is None else one_line(word, 40),
            ),
            hint=tr("leave the word out of the text and of the chat template"),
            code="prompt.no_row",
        )

    def stop_ids(self, prompt: PromptFormat | None) -> tuple[int, ...]:
        return prompt.stop_ids if prompt is not None else self._spec.eos_ids

    def close(self) -> None:
        """End the helper processes."""
        for prompt in (self.own, *(prompt for _, prompt in self._brought.values())):
            if isinstance(prompt, TemplatePrompt):
                prompt.close()

    def _of_one(self, folder: Path) -> PromptFormat | None:
        """What the adapter there brings; the model's own, where it brings just that; None: nothing."""
        state = state_of(folder)
        with self._lock:
            known = self._brought.get(folder)
            if known is None or known[0] != state:
                assert self.own is not None
                words, prompt = words_with(read_facts(folder).to_json(), self._spec), None
                if brings_text(folder) or words != self._spec.vocab_size:
                    prompt = adapter_prompt(folder, self.own, self._spec, words)
                known = self._brought[folder] = state, prompt
            return known[1]


def adapter_prompt(folder: Path, base: PromptFormat, spec: ModelSpec, rows: int) -> PromptFormat:
    """How an adapter's folder wants conversations written: its own chat template, its own words; `base` where it brings
    nothing that differs. rows: words that the network has rows for while the adapter is in use.

    Only for families whose models bring templates. Raises Damaged, Hostile, and Usage for words of another model.
    """
    if not isinstance(base, TemplatePrompt | BaseModel):
        return base
    tokenizer = cast(TemplateTokenizer, base.tokenizer)
    if own_tokenizer(folder):
        try_vocabulary(folder)
        own = cast(TemplateTokenizer, load_plain_tokenizer(folder, None))
        if _has_other_words(own, tokenizer, rows, resized=rows != spec.vocab_size):
            tokenizer = own
    source, tokens = folder_template(folder) if folder.is_dir() else (None, {})
    known = base.template if isinstance(base, TemplatePrompt) else None
    if source is None and known is not None:
        source, tokens = known.source, {**known.tokens, **tokens}
    same = source == (None if known is None else known.source)
    if same and tokenizer is base.tokenizer and rows == spec.vocab_size:
        return base
    end = tokenizer.specials.get(tokens.get("eos_token", ""))
    prompt = template_format(tokenizer, [*spec.eos_ids, *([] if end is None else [end])], source, tokens)
    prompt.rows = rows
    return prompt


def _kind(prompt: PromptFormat) -> tuple[object, ...]:
    """What is different for formats that write the same conversation in different ways."""
    words = tuple(sorted(getattr(prompt.tokenizer, "specials", {}).items()))
    return prompt.identity, prompt.rows, prompt.tokenizer.vocab_size, words


def _has_other_words(own: TemplateTokenizer, base: TemplateTokenizer, rows: int, *, resized: bool) -> bool:
    """Whether the words of an adapter are others than the model's. Raises Usage where they cannot be right for it."""
    if own.vocab_size > max(rows, min(base.vocab_size, rows + WORDS_WITHOUT_ROWS)):
        raise Usage(
            tr("its tokenizer has {words} words, but there are rows for {rows}", words=own.vocab_size, rows=rows),
            hint=tr("save it with embedding and head (PEFT: save_embedding_layers=True), or merge it with PEFT"),
            code="adapter.vocabulary",
        )
    common = min(own.vocab_size, base.vocab_size)
    others = [token for token in range(common) if own.token_bytes(token) != base.token_bytes(token)]
    added = {*own.specials.values(), *base.specials.values()}
    strange = [] if resized or type(own) is not type(base) else [token for token in others if token not in added]
    if len(strange) > common // 100:
        raise Usage(
            tr(
                "its tokenizer is another model's: token {token} is {theirs} in it, but {ours} here",
                token=strange[0],
                theirs=_shown(own, strange[0]),
                ours=_shown(base, strange[0]),
            ),
            hint=tr("use it with its own base"),
            code="adapter.vocabulary",
        )
    known = own.specials.items() <= base.specials.items()
    return not known or bool(others) or own.vocab_size > base.vocab_size or base.vocab_size > rows + WORDS_WITHOUT_ROWS


def _shown(tokenizer: Tokenizer, token: int) -> str:
    return one_line(repr((tokenizer.token_bytes(token) or b"").decode("utf-8", "replace")), 40)
