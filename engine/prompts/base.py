"""From a conversation to ids: what every family's prompt format offers.

A format builds ids, not text: control tokens are put in as ids, and what a person typed is encoded as ordinary text,
so nobody can write `<|user|>` into a question and be taken for the template.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from glmchat.checkpoints.chat_template import no_template, unheard
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.messages import Message
from glmchat.engine.tokenizers.base import Tokenizer

NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})
_THINKING = frozenset({"enable_thinking", "thinking", "reasoning_effort"})
_NO_THOUGHT = (False, None, "none", "off")


@dataclass(frozen=True, slots=True)
class Answered:
    """A conversation with its last answer, in ids: what the chat sends, what the model has to write, what ends it.

    stop: one id, or none where the format ends no answer.
    """

    prompt: list[int]
    answer: list[int]
    stop: list[int]


class PromptFormat(ABC):
    """One family's way of writing a conversation down. Subclasses give `render`; the rest has sensible defaults."""

    has_system: bool = True  # False: a system prompt is prepended to the first question
    takes_tools: bool = False  # whether a system message may offer tools
    banned_ids: tuple[int, ...] = ()  # never sampled
    rows: int | None = None  # words that the network has rows for, where an adapter brings another number of them
    variables: frozenset[str] | None = frozenset()  # what the format may be told beside the messages; None: anything
    # Completion mode only: one that has reached its length runs on to the next of these, so it ends at a sentence.
    sentence_ends: tuple[int, ...] = ()

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._stop_ids = tuple(dict.fromkeys(stop_ids))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer and are never shown."""
        return self._stop_ids

    @abstractmethod
    def render(self, messages: Sequence[Message], variables: Mapping[str, Any] = NO_VARIABLES) -> list[int]:
        """Ids of the whole conversation, up to and with the words that open the next answer.

        variables: what a chat template is told beside the messages; a format that is code has none to hear.
        """

    def require_heard(self, variables: Mapping[str, Any]) -> None:
        """Raise Usage for a variable that changes nothing here. A model without thoughts is not told not to think."""
        known = self.variables
        if known is None or variables.keys() <= known:
            return
        names = variables.keys() - known
        if not (self.is_silent_of_thoughts and names <= _THINKING and all(variables[n] in _NO_THOUGHT for n in names)):
            raise unheard(names, known)

    @property
    def is_silent_of_thoughts(self) -> bool:
        """Whether the format knows nothing of thoughts, so that to ask for none is to ask for what it does."""
        return False

    def render_open(self, messages: Sequence[Message], variables: Mapping[str, Any] = NO_VARIABLES) -> list[int]:
        """Like `render`, but the last message is an answer that was cut off and is to be continued."""
        if not messages or messages[-1].role != "assistant":
            raise Usage(
                tr("there is no unfinished answer to continue"),
                hint=tr("the last message must be from the assistant"),
                code="prompt.nothing_to_continue",
            )
        return self.render(messages[:-1], variables) + self.encode_answer(messages[-1].content)

    def encode_answer(self, text: str) -> list[int]:
        """Ids of what there is of an answer that is to be continued."""
        return self.tokenizer.encode(text)

    def render_answered(self, messages: Sequence[Message], variables: Mapping[str, Any] = NO_VARIABLES) -> Answered:
        """What is learned from a conversation whose last message is an answer; the prompt is `render`'s of the rest."""
        prompt = self.render(messages[:-1], variables)
        return Answered(prompt, self.encode_answer(messages[-1].content), list(self.stop_ids[:1]))

    def tool_call(self, name: str, arguments: Mapping[str, Any]) -> Message:
        """The answer by which the model calls a tool, as this family writes it."""
        call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        return Message("assistant", call, name)

    def tool_offer(self, system: str, functions: Sequence[Mapping[str, Any]]) -> Message:
        """The system message that offers functions: name, description, parameters. system: what else it says."""
        return Message("system", system, tools=tuple({"type": "function", "function": f} for f in functions))

    def prepends_system(self, messages: Sequence[Message]) -> bool:
        """Whether these messages open a conversation whose system prompt this family can only read as a question."""
        roles = [m.role for m in messages]
        return "system" in roles and roles.count("user") == 1 and not self.has_system

    @property
    def identity(self) -> str:
        """What sets this way of writing conversations apart from others; goes into the record of every answer."""
        return type(self).__name__

    def clean(self, text: str) -> str:
        """The family's clean-up of an answer, as its own program did it before showing and remembering it."""
        return text

    def settled(self, text: str) -> int:
        """How much of the beginning of an unfinished answer is cleaned up the same, whatever follows it."""
        return len(text)

    def separable(self, text: str) -> int:
        """How much of the beginning of a settled text is cleaned up by itself: clean(head) + clean(rest) is the whole
        cleaned up, whatever follows it.
        """
        return len(text)

    def complete(self, text: str) -> list[int]:
        """Ids of raw text for completion mode; control tokens such as [MASK] are recognised here."""
        return self.tokenizer.encode_special(text)


class NoChat(PromptFormat):
    """A base model: it completes text and has no chat template."""

    has_system = False

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any] = NO_VARIABLES) -> list[int]:
        raise no_template()


def read_messages(messages: Sequence[Message | Mapping[str, Any]], prompt: PromptFormat) -> list[Message]:
    """The conversation as messages. Raises Usage for what is none, and for tools where `prompt` takes none."""
    try:
        conversation = [m if isinstance(m, Message) else Message.from_json(m) for m in messages]
    except (AttributeError, ValueError):
        raise Usage(
            tr("a message needs a role and a content"), hint='{"role": "user", "content": "…"}', code="prompt.message"
        ) from None
    if not prompt.takes_tools and any(m.tools is not None for m in conversation):
        raise Usage(
            tr("this model's format does not support tools"),
            hint=tr("ChatGLM3-6B, GLM-4 and templates with tools do; for others, describe them in the system message"),
            code="prompt.tools",
        )
    return conversation
