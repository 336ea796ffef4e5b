"""GPT-2 completes text. The Chinese GPT-2 of CPM is given `title<sep>beginning` and writes on to `<eod>`."""

from __future__ import annotations

from pathlib import Path

from glmchat.engine.models.base import ModelSpec
from glmchat.engine.prompts.base import NoChat, PromptFormat
from glmchat.engine.tokenizers.base import Tokenizer
from glmchat.engine.tokenizers.cpm import EOD, UNK, CPMTokenizer


class CPMPrompt(NoChat):
    """Completion with CPM's vocabulary: `<unk>` is never sampled, `<eod>` ends, a full length ends at a sentence."""

    banned_ids = (UNK,)

    def __init__(self, tokenizer: CPMTokenizer) -> None:
        super().__init__(tokenizer, (EOD,))
        self.sentence_ends = tokenizer.sentence_ends


def gpt2_prompt(folder: Path, tokenizer: Tokenizer, spec: ModelSpec) -> PromptFormat:
    """CPM's format for its vocabulary; for any other GPT-2 its own template, if it has one."""
    if isinstance(tokenizer, CPMTokenizer):
        return CPMPrompt(tokenizer)
    from glmchat.engine.prompts.template import template_prompt

    return template_prompt(folder, tokenizer, spec)
