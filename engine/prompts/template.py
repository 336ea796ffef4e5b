"""Prompts from chat templates, in which a person's text stays text.

Before rendering, every control token that stands in a message is replaced by a run of digits that nobody can guess;
the template sees everything else as it is, so trimming and searching work as its author meant. After rendering, the
control tokens that are left are the template's own and become ids; the digits become the person's characters again,
encoded as ordinary text together with the words around them. A fragment at a message's edge that could make up a
control token with its neighbour is replaced in the same way.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from glmchat.checkpoints.gguf_file import open_gguf
from glmchat.checkpoints.spec import ModelSpec
from glmchat.core.errors import GlmchatError
from glmchat.core.fingerprints import of_text
from glmchat.core.messages import Message
from glmchat.engine.prompts.base import NO_VARIABLES, NoChat, PromptFormat
from glmchat.engine.prompts.chat_template import ChatTemplate, folder_template
from glmchat.engine.tokenizers.base import Tokenizer
from glmchat.engine.tokenizers.gpt2 import EOD, UNK, CPMTokenizer

# Ends of a turn that files forget to list among their end tokens.
_TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "</s>",
)


class TemplateTokenizer(Tokenizer, Protocol):
    """A tokenizer that knows its control tokens by text."""

    specials: dict[str, int]

    def encode_behind(self, text: str) -> list[int]:
        """Plain text that follows a control token: some vocabularies put a blank only before the first word."""
        ...

    def encode_completion(self, text: str) -> list[int]: ...


class TemplatePrompt(PromptFormat):
    """A chat format that the checkpoint itself brings as a Jinja template."""

    def __init__(self, tokenizer: TemplateTokenizer, stop_ids: Sequence[int], template: ChatTemplate) -> None:
        super().__init__(tokenizer, stop_ids)
        self._tokenizer = tokenizer
        self._template = template
        ordered = sorted(tokenizer.specials, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, ordered)) or r"\b\B")
        self._heads = {text[:n] for text in ordered for n in range(1, len(text))}
        self._tails = {text[n:] for text in ordered for n in range(1, len(text))}
        self._longest = max(map(len, ordered), default=0)

    @cached_property
    def has_system(self) -> bool:  # type: ignore[override]
        """Does a system message reach the prompt? Templates without one refuse it or drop it in silence."""
        mark = "system-prompt-probe"
        try:
            text = self._template.render([{"role": "system", "content": mark}, {"role": "user", "content": "a"}])
        except GlmchatError as error:
            if error.code == "template.refused":
                return False
            raise
        return mark in text

    @property
    def identity(self) -> str:
        return "sha256:" + of_text(self._template.source)

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any] = NO_VARIABLES) -> list[int]:
        hidden = _Hidden(self)
        prepared = [
            {key: hidden.hide(str(value)) for key, value in message.to_json().items()}
            for message in self._with_system(messages)
        ]
        text = self._template.render(prepared, variables=hidden.hide_all(variables))
        return self.encode(text, hidden)

    def complete(self, text: str) -> list[int]:
        return self._tokenizer.encode_completion(text)

    def close(self) -> None:
        """End the helper process."""
        self._template.close()

    def _with_system(self, messages: Sequence[Message]) -> Sequence[Message]:
        if not messages or messages[0].role != "system" or self.has_system:
            return messages
        first = next((i for i, m in enumerate(messages) if m.role == "user"), None)
        if first is None:
            return messages
        merged = Message("user", f"{messages[0].content}\n\n{messages[first].content}")
        return [*messages[1:first], merged, *messages[first + 1 :]]

    def encode(self, text: str, hidden: _Hidden) -> list[int]:
        """Ids of rendered text: control tokens of the template as ids, what was hidden as plain text."""
        if not hidden.found:
            return self._tokenizer.encode_special(text)
        ids: list[int] = []
        end = 0
        for match in self._control.finditer(text):
            ids += self._plain(hidden.show(text[end : match.start()]), first=not ids)
            ids.append(self._tokenizer.specials[match[0]])
            end = match.end()
        return ids + self._plain(hidden.show(text[end:]), first=not ids)

    def _plain(self, text: str, first: bool) -> list[int]:
        if not text:
            return []
        return self._tokenizer.encode(text) if first else self._tokenizer.encode_behind(text)


class _Hidden:
    """Fragments of one conversation that must not be taken for control tokens, and the digits that stand for them."""

    def __init__(self, prompt: TemplatePrompt) -> None:
        self._prompt = prompt
        self._key = str(secrets.randbelow(9 * 10**23) + 10**23)
        self.found: list[str] = []

    def _put_away(self, fragment: str) -> str:
        self.found.append(fragment)
        return f"{self._key}{len(self.found) - 1:06d}"

    def hide(self, text: str) -> str:
        """`text` with every control token, and every beginning or end of one at its edges, replaced by digits."""
        text = self._prompt._control.sub(lambda match: self._put_away(match[0]), text)
        body = text.strip()  # a template may trim before it joins
        if not body:
            return text
        lead, trail = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
        for size in range(min(self._prompt._longest, len(body)), 0, -1):
            if body[-size:] in self._prompt._heads:
                body = body[:-size] + self._put_away(body[-size:])
                break
        for size in range(min(self._prompt._longest, len(body)), 0, -1):
            if body[:size] in self._prompt._tails:
                body = self._put_away(body[:size]) + body[size:]
                break
        return lead + body + trail

    def hide_all(self, value: Any) -> Any:
        """`hide` for every text in a JSON value."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, Mapping):
            return {key: self.hide_all(item) for key, item in value.items()}
        return [self.hide_all(item) for item in value] if isinstance(value, list | tuple) else value

    def show(self, text: str) -> str:
        """The digits taken back."""
        return re.sub(self._key + r"(\d{6})", lambda match: self.found[int(match[1])], text)


def template_prompt(path: Path, tokenizer: Tokenizer, spec: ModelSpec) -> PromptFormat:
    """The chat format of a folder or GGUF file; `NoChat` for a base model, which only completes text."""
    specials: Mapping[str, int] = getattr(tokenizer, "specials", {})
    ends = [specials[text] for text in _TURN_ENDS if text in specials]
    stop_ids = [*spec.eos_ids, *ends]
    if path.is_file():
        source, tokens = _gguf_template(path)
    else:
        source, tokens = folder_template(path)
    if source is None:
        return NoChat(tokenizer, stop_ids)
    return TemplatePrompt(tokenizer, stop_ids, ChatTemplate(source, tokens))  # type: ignore[arg-type]


def _gguf_template(path: Path) -> tuple[str | None, dict[str, str]]:
    metadata: Mapping[str, Any] = open_gguf(path).metadata
    pieces = metadata.get("tokenizer.ggml.tokens")
    tokens: dict[str, str] = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and isinstance(pieces, list) and 0 <= index < len(pieces):
            tokens[name] = pieces[index]
    source = metadata.get("tokenizer.chat_template")
    return (source if isinstance(source, str) else None), tokens


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
    return template_prompt(folder, tokenizer, spec)
