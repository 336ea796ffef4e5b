"""Rows with a better and a worse answer to one question, in the forms that are usual."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from glmchat.core.language import tr
from glmchat.core.messages import Message
from glmchat.engine.prompts.base import PromptFormat
from glmchat.tuning.examples import Place
from glmchat.tuning.formats import OPENAI, SHAREGPT, Form
from glmchat.tuning.raw import Raw
from glmchat.tuning.rows import Conversation, RowFault, Said, conversation_of, fields_of, kind_of, said_before

_TURN = re.compile(r"\n\n(Human|Assistant):")  # of Anthropic's hh-rlhf, whose sides are whole talks as one text
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two conversations that differ in their last message alone, which is what is learned of them."""

    chosen: Conversation
    rejected: Conversation

    @property
    def place(self) -> Place:
        return self.chosen.place

    @property
    def question(self) -> tuple[Message, ...]:
        return self.chosen.messages[:-1]

    @property
    def answers(self) -> tuple[Message, Message]:
        return self.chosen.messages[-1], self.rejected.messages[-1]


def read_pair(row: Raw, form: Form, prompt: PromptFormat, system: str | None = None) -> Pair:
    """What a row of pairs says. system: for rows without one of their own.

    Raises RowFault for one that lacks a side, or whose sides are no two answers to one question.
    """
    value = fields_of(row, form)
    chosen, rejected = (_side(row, value, form, part, prompt, system) for part in ("chosen", "rejected"))
    pair, path = Pair(chosen, rejected), (form.columns["rejected"],)
    if chosen.messages[:-1] != rejected.messages[:-1]:
        found, wanted = tr("two answers to different questions"), tr("the same messages before both answers")
        raise RowFault("pair", path, found, wanted)
    if chosen.messages[-1].content.strip() == rejected.messages[-1].content.strip():
        raise RowFault("pair", path, tr("the same answer twice"), tr("a better answer and another one"))
    return pair


def _side(
    row: Raw, value: Mapping[str, Any], form: Form, part: str, prompt: PromptFormat, system: str | None
) -> Conversation:
    """A side is its last answer, as a text or a message, or a whole conversation as a list or a text."""
    key = form.columns[part]
    given = value[key]
    if isinstance(given, dict):
        given = [given]
    if isinstance(given, list):
        said = _listed(value, form, key, given, prompt, system)
    elif not isinstance(given, str):
        raise RowFault("type", (key,), kind_of(given), tr("an answer, or a list of messages"), '"…"')
    elif not given.strip():
        raise RowFault("empty", (key,), tr("an empty answer"), tr("an answer"))
    elif {"prompt", "messages"} & form.columns.keys():
        said = [*_question(value, form, prompt, system), (Message("assistant", given), True)]
    else:
        said = _told(key, given, system)
    if not said[-1][0].content.strip():
        raise RowFault("empty", (key,), tr("an empty answer"), tr("an answer"))
    whole = replace(form, columns={name: column for name, column in form.columns.items() if name != "prompt"})
    last = len(said) - 1
    return conversation_of([(m, n == last) for n, (m, _) in enumerate(said)], value, whole, prompt, row.place)


def _listed(
    value: Mapping[str, Any], form: Form, key: str, given: list[Any], prompt: PromptFormat, system: str | None
) -> list[Said]:
    """A whole conversation, or the one answer to the row's question."""
    said = said_before({**value, key: given}, _as_messages(form, key, given), prompt, None)
    first = next((number for number, (message, _) in enumerate(said) if message.role != "system"), len(said))
    if first < len(said) and said[first][0].role == "assistant" and {"prompt", "messages"} & form.columns.keys():
        if len(said) - first > 1:
            raise RowFault("pair", (key,), tr("several messages"), tr("one answer, or the whole conversation"))
        return [*_question(value, form, prompt, system), said[first]]
    if first == 0 and system:
        said.insert(0, (Message("system", system), False))
    return said


def _question(value: Mapping[str, Any], form: Form, prompt: PromptFormat, system: str | None) -> list[Said]:
    """What both sides answer: a text, or messages. Raises RowFault where it is answered already."""
    key = form.columns.get("prompt", "")
    listed = value.get(key)
    if isinstance(listed, list):
        form = _as_messages(form, key, listed)
    said = said_before(value, form, prompt, system)
    if said and said[-1][0].role == "assistant":
        path = (form.columns["messages"],)
        raise RowFault("order", path, tr("a question that is answered already"), tr("messages up to the question"))
    return said


def _as_messages(form: Form, key: str, listed: list[Any]) -> Form:
    """The form of a row whose field `key` holds the conversation."""
    first = listed[0] if listed and isinstance(listed[0], dict) else {}
    tags = next((tags for tags in (form.tags, OPENAI, SHAREGPT) if tags.role in first), form.tags)
    return replace(form, columns={**form.columns, "messages": key}, tags=tags)


def _told(key: str, text: str, system: str | None) -> list[Said]:
    """A talk that stands in one text with \\n\\nHuman: and \\n\\nAssistant: before its turns."""
    parts = _TURN.split(text if text.startswith("\n\n") else f"\n\n{text}")
    if len(parts) < 5 or parts[0].strip():
        found, wanted = tr("an answer without its question"), tr("a column of the question: --columns prompt=…")
        raise RowFault("missing", (key,), found, wanted)
    turns = zip(parts[1::2], parts[2::2], strict=True)
    said = [(Message(_ROLES[role], words.strip()), False) for role, words in turns]
    return [(Message("system", system), False), *said] if system else said
