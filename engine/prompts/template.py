"""Prompts from chat templates, in which a person's text stays text.

The template is given what was said as it was said, so trimming, searching and cutting work as its author meant; the
process that renders it says of every character whose it is (engine/prompts/typed_text.py). A control token becomes its
id where the template wrote it. In the model's own answers those do too that its answers show, as `</think>`; whatever a
person typed is encoded as ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from glmchat.checkpoints.chat_template import template_of, variables_of
from glmchat.checkpoints.gguf_file import open_gguf
from glmchat.checkpoints.spec import ModelSpec
from glmchat.core.errors import Damaged, GlmchatError, Usage
from glmchat.core.fingerprints import of_text
from glmchat.core.language import tr
from glmchat.core.messages import Message
from glmchat.engine.prompts.base import NO_VARIABLES, Answered, NoChat, PromptFormat
from glmchat.engine.prompts.chat_template import ChatTemplate, folder_template
from glmchat.engine.prompts.typed_text import MODEL, TEMPLATE, OwnedText
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
    "<eos>",
    "<|eos|>",
    "<|eot|>",
    "<|end_of_turn|>",
    "<|endofturn|>",
    "[|endofturn|]",
    "<turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<｜end▁of▁sentence｜>",
    "<|return|>",
    "<|call|>",
    "<|user|>",  # where the next role's mark is the end, as in GLM-4
    "<|observation|>",
)


class TemplateTokenizer(Tokenizer, Protocol):
    """A tokenizer that knows its control tokens by text."""

    vocab_size: int
    specials: dict[str, int]
    spoken: frozenset[int]  # ids of the control tokens that stand in the model's own answers

    def encode_rendered(self, text: str, trusted: Callable[[int, int, int], bool]) -> list[int]:
        """Ids of rendered text. trusted(begin, end, id): whether the control token there is one, or typed text."""
        ...

    def encode_completion(self, text: str) -> list[int]: ...
    def token_bytes(self, token: int) -> bytes | None: ...


class TemplatePrompt(PromptFormat):
    """A chat format that the checkpoint itself brings as a Jinja template."""

    def __init__(self, tokenizer: TemplateTokenizer, stop_ids: Sequence[int], template: ChatTemplate) -> None:
        super().__init__(tokenizer, stop_ids)
        self._tokenizer = tokenizer
        self._template = template

    @property
    def template(self) -> ChatTemplate:
        return self._template

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._all_stop_ids

    @cached_property
    def _all_stop_ids(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys([*super().stop_ids, *self._ends_of_the_template()]))

    def _ends_of_the_template(self) -> list[int]:
        """The control token that the template writes behind an answer: files forget to list it among their ends."""
        mark, specials = "end-of-answer-probe", self._tokenizer.specials
        if "<|channel|>" in specials:  # an answer in several messages: what ends one is not what ends the last
            return []
        asked = {"role": "user", "content": "a"}
        for later in ([asked], []):
            try:
                text = self._template.render([asked, {"role": "assistant", "content": mark}, *later])
            except GlmchatError:
                continue
            behind = str(text).rpartition(mark)[2].lstrip() if mark in text else ""
            found = max((word for word in specials if behind.startswith(word)), key=len, default=None)
            return [] if found is None or specials[found] in self._tokenizer.spoken else [specials[found]]
        return []

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

    @cached_property
    def takes_tools(self) -> bool:  # type: ignore[override]
        """Does the template ask for them? One that does not would drop them in silence."""
        return bool(re.search(r"{[{%][^}]*\btools\b", self._template.source))

    @cached_property
    def variables(self) -> frozenset[str] | None:  # type: ignore[override]
        return variables_of(self._template.source)

    @property
    def is_silent_of_thoughts(self) -> bool:
        return "think" not in self._template.source.lower()

    @property
    def identity(self) -> str:
        return "sha256:" + of_text(self._template.source)

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any] = NO_VARIABLES) -> list[int]:
        return self._encode(self._text(messages, variables))

    def render_answered(self, messages: Sequence[Message], variables: Mapping[str, Any] = NO_VARIABLES) -> Answered:
        """What the template writes behind the prompt, up to the token that ends the turn, is the model's to write.

        Raises Usage for a template that writes an answered conversation otherwise than it opened it.
        """
        asked, whole = self._text(messages[:-1], variables), self._text(messages, variables, opens=False)
        if not whole.startswith(asked):
            raise Usage(
                tr("the model's chat template writes the prompt of this answer in another way than the chat sends it"),
                hint=tr("it opens answers with words that answers in its history lack: it cannot be trained on"),
                code="template.not_a_prefix",
            )
        prompt, rest, ends = self._encode(asked), whole[len(asked) :], set(self.stop_ids)
        joint = self._encode(whole)
        written = joint[len(prompt) :] if joint[: len(prompt)] == prompt else self._encode(rest)
        at = next((n for n, token in enumerate(written) if token in ends), None)
        if at is not None:
            return Answered(prompt, written[:at], [written[at]])
        said = rest[: rest.owners.rfind(MODEL) + 1]  # nothing ends it here: blanks behind it are the template's layout
        return Answered(prompt, self._encode(said), list(self._turn_end[:1]))

    @cached_property
    def _turn_end(self) -> list[int]:
        return [*self._ends_of_the_template(), *self.stop_ids]

    def tool_call(self, name: str, arguments: Mapping[str, Any]) -> Message:
        call = super().tool_call(name, arguments)
        named = "<tool_call>" in self._template.source
        return replace(call, content=f"<tool_call>\n{call.content}\n</tool_call>", name=None) if named else call

    def _text(self, messages: Sequence[Message], variables: Mapping[str, Any], *, opens: bool = True) -> OwnedText:
        """opens: with the words that open the next answer."""
        tools = next((message.tools for message in messages if message.tools is not None), None)
        if tools is not None:
            variables = {**variables, "tools": list(tools)}
            messages = [replace(m, tools=None) for m in messages if m.tools is None or m.content]
        prepared = [message.to_json() for message in self._with_system(messages)]
        try:
            return self._template.render(prepared, add_generation_prompt=opens, variables=variables)
        except Damaged as error:
            if error.code in ("template.broken", "template.limit") and self._renders_a_question():
                raise Usage(
                    tr("this conversation cannot be rendered: {reason}", reason=error.message),
                    hint=tr("a plain question can: leave out tools, names and variables of the template, or say less"),
                    code="template.conversation",
                ) from None
            raise

    def _renders_a_question(self) -> bool:
        """Whether the template does its work for a plain question, so that it is the conversation it stumbles over."""
        try:
            self._template.render([{"role": "user", "content": "a"}])
        except GlmchatError:
            return False
        return True

    def encode_answer(self, text: str) -> list[int]:
        return self._encode(OwnedText(text, MODEL * len(text)))

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

    def _encode(self, text: OwnedText) -> list[int]:
        spoken = self._tokenizer.spoken.difference(self.stop_ids)

        def trusted(begin: int, end: int, token: int) -> bool:
            owners = set(text.owners[begin:end])
            return owners == {TEMPLATE} or (owners == {MODEL} and token in spoken)

        return self._tokenizer.encode_rendered(text, trusted)


class BaseModel(NoChat):
    """A model without a chat format: a text to complete begins as its vocabulary says."""

    def __init__(self, tokenizer: TemplateTokenizer, stop_ids: Sequence[int]) -> None:
        super().__init__(tokenizer, stop_ids)
        self._tokenizer = tokenizer

    def complete(self, text: str) -> list[int]:
        return self._tokenizer.encode_completion(text)


def template_prompt(path: Path, tokenizer: Tokenizer, spec: ModelSpec) -> PromptFormat:
    """The chat format of a folder or GGUF file; `NoChat` for a base model, which only completes text."""
    if path.is_file():
        source, tokens = _gguf_template(path)
    else:
        source, tokens = folder_template(path)
    return template_format(tokenizer, spec.eos_ids, source, tokens)


def template_format(
    tokenizer: Tokenizer, given: Sequence[int], source: str | None, tokens: Mapping[str, str]
) -> TemplatePrompt | BaseModel:
    """A format by this template, None: it has none. given: the ends of a turn that the files list."""
    specials: Mapping[str, int] = getattr(tokenizer, "specials", {})
    ends = [specials[text] for text in _TURN_ENDS if text in specials]
    if "<|channel|>" in specials and "<|end|>" in specials:  # which ends a thought there, and the answer follows
        ends.remove(specials["<|end|>"])
    if source is None:
        return BaseModel(tokenizer, [*given, *ends])  # type: ignore[arg-type]
    return TemplatePrompt(tokenizer, [*given, *ends], ChatTemplate(source, dict(tokens)))  # type: ignore[arg-type]


def _gguf_template(path: Path) -> tuple[str | None, dict[str, str]]:
    metadata: Mapping[str, Any] = open_gguf(path).metadata
    pieces = metadata.get("tokenizer.ggml.tokens")
    tokens: dict[str, str] = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and isinstance(pieces, list) and 0 <= index < len(pieces):
            tokens[name] = pieces[index]
    return template_of(path), tokens


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
