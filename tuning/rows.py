"""What a row says: a conversation or a text, or what is wrong with it and where."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glmchat.core.errors import GlmchatError
from glmchat.core.language import tr
from glmchat.core.messages import Message
from glmchat.core.text import one_line
from glmchat.engine.prompts.base import PromptFormat
from glmchat.tuning.examples import Place
from glmchat.tuning.formats import OPENAI, SHAREGPT, Form, Tags
from glmchat.tuning.raw import Fault, Raw


@dataclass(frozen=True, slots=True)
class Conversation:
    """messages end with an answer. learned: of each message, whether it is an answer that is to be learned.

    asked: the last question in the two parts that some formats have (instruction and input).
    """

    messages: tuple[Message, ...]
    learned: tuple[bool, ...]
    place: Place
    asked: tuple[str, str] = ("", "")


@dataclass(frozen=True, slots=True)
class Text:
    text: str
    place: Place


Said = tuple[Message, bool]  # and whether it is learned


class RowFault(Exception):
    """A row that cannot be used. path: of the value that is at fault."""

    def __init__(self, reason: str, path: tuple[str | int, ...], found: str, wanted: str, example: str = "") -> None:
        super().__init__(found)
        self.reason, self.path, self.found, self.wanted, self.example = reason, path, found, wanted, example

    def of(self, row: Raw) -> Fault:
        line, column = row.column_of(self.path)
        name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in self.path).lstrip(".")
        found = f"{one_line(name, 60)}: {self.found}" if name else self.found
        return Fault(Place(row.place.file, line), self.reason, found, self.wanted, self.example, column)


def read_row(row: Raw, form: Form, prompt: PromptFormat, system: str | None = None) -> Conversation | Text:
    """What a row says. prompt: how the model writes calls of tools. system: for rows without one of their own.

    Raises RowFault with what was found where, and what was wanted.
    """
    value = fields_of(row, form)
    if form.is_text:
        key = form.columns["text"]
        text = _string(value[key], (key,))
        if not text.strip():
            raise RowFault("empty", (key,), tr("an empty text"), tr("a text"))
        return Text(text, row.place)
    said = said_before(value, form, prompt, system)
    if {"messages", "answer"} <= form.columns.keys():  # the preferred answers of pairs
        said.append((Message("assistant", _preferred(value, form, "answer")), True))
    return conversation_of(said, value, form, prompt, row.place)


def fields_of(row: Raw, form: Form) -> Mapping[str, Any]:
    """The row's fields, with all that the form needs. Raises RowFault."""
    value = {"": row.value} if form.name == "messages" else row.value
    if not isinstance(value, dict):
        raise RowFault("type", (), kind_of(value), tr("an object with named fields"), _example(form))
    for part in form.needs:
        if form.columns[part] not in value:
            keys = ", ".join(map(str, value)) or tr("none")
            found = tr("no {key}; the row has {keys}", key=repr(form.columns[part]), keys=one_line(keys, 80))
            raise RowFault("missing", (), found, repr(form.columns[part]), _example(form))
    return value


def said_before(value: Mapping[str, Any], form: Form, prompt: PromptFormat, system: str | None) -> list[Said]:
    """All messages of a row, but for an answer in a field beside a list of messages. Raises RowFault."""
    said = list(_messages(value, form, prompt) if "messages" in form.columns else _asked_messages(value, form))
    return _with_head(said, value, form, prompt, system)


def conversation_of(
    said: Sequence[Said], value: Mapping[str, Any], form: Form, prompt: PromptFormat, place: Place
) -> Conversation:
    """Of messages that this model's format can write and learn from. Raises RowFault."""
    _check(said, form)
    if not prompt.takes_tools and any(message.tools or message.role == "tool" or message.name for message, _ in said):
        found, wanted = tr("tools"), tr("none: this model's format does not support tools")
        raise RowFault("tools", (form.columns["messages"],) if "messages" in form.columns else (), found, wanted)
    messages, learned = zip(*said, strict=True)
    asked = "", ""
    if "prompt" in form.columns:
        asked = value[form.columns["prompt"]], value.get(form.columns.get("query", "\0")) or ""
    return Conversation(messages, learned, place, asked)


def _asked_messages(value: Mapping[str, Any], form: Form) -> Iterator[Said]:
    """Question and answer, behind the questions and answers of the history."""
    columns = form.columns
    key = columns.get("history", "")
    history = value.get(key) or []
    if isinstance(history, str):  # in a cell of a table
        history = _json(history, (key,))
    wanted = tr("a list of pairs of a question and an answer")
    if not isinstance(history, list):
        raise RowFault("type", (key,), kind_of(history), wanted, '[["…", "…"]]')
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowFault("type", (key, number), kind_of(pair), wanted, '["…", "…"]')
        yield Message("user", _string(pair[0], (key, number, 0))), False
        yield Message("assistant", _string(pair[1], (key, number, 1))), True
    parts = [_string(value[columns["prompt"]], (columns["prompt"],))]
    query = columns.get("query")
    if query is not None and value.get(query):
        parts.append(_string(value[query], (query,)))
    question = "\n".join(part for part in parts if part)
    if not question.strip():
        raise RowFault("empty", (columns["prompt"],), tr("an empty question"), tr("a question"))
    yield Message("user", question), False
    if "answer" in columns:
        yield Message("assistant", _preferred(value, form, "answer")), True


def _messages(value: Mapping[str, Any], form: Form, prompt: PromptFormat) -> Iterator[Said]:
    key, tags = form.columns["messages"], form.tags
    listed: Any = value[key]
    head: tuple[str | int, ...] = (key,) if key else ()
    if isinstance(listed, dict) and "messages" in listed:  # of OpenAI's preferences, tools beside them
        listed, head = listed["messages"], (*head, "messages")
    if isinstance(listed, str):
        listed = _json(listed, head)
    wanted = tr("a list of messages")
    example = json.dumps([{tags.role: "user", tags.content: "…"}], ensure_ascii=False)
    if not isinstance(listed, list) or not listed:
        raise RowFault("type", head, kind_of(listed), wanted, example)
    for number, item in enumerate(listed):
        path = (*head, number)
        if not isinstance(item, dict):
            raise RowFault("type", path, kind_of(item), tr("a message"), example)
        if tags.role not in item:
            keys = one_line(", ".join(map(str, item)), 60)
            raise RowFault("missing", path, tr("no {key}; it has {keys}", key=repr(tags.role), keys=keys), tags.role)
        word = _string(item[tags.role], (*path, tags.role))
        role = tags.roles.get(word, word if word in tags.roles.values() else None)
        if role is None:
            known = ", ".join(tags.roles)
            raise RowFault("role", (*path, tags.role), repr(one_line(word, 40)), tr("one of {names}", names=known))
        counts = item.get("loss", True) is not False and item.get("weight", 1) != 0
        yield from _said(item, role, path, tags, prompt, counts)


def _said(
    item: Mapping[str, Any], role: str, path: tuple[str | int, ...], tags: Tags, prompt: PromptFormat, counts: bool
) -> Iterator[Said]:
    """One message of a file: a text, or a call of a tool in one of the three forms that are usual."""
    content = item.get(tags.content)
    name = item.get("metadata") if role == "assistant" else item.get("name")
    if role == "tool" and "observation" in item and "parameters" in item:  # ChatGLM3's demo: call and result at once
        yield _call(prompt, name, item["parameters"], path), counts
        yield Message("tool", _content(item["observation"], (*path, "observation"))), False
    elif role == "call":
        call = _json(_string(content, (*path, tags.content)), (*path, tags.content))
        yield from ((message, counts) for message in _calls(prompt, call, (*path, tags.content)))
    elif role == "assistant" and item.get("tool_calls"):
        calls = item["tool_calls"]
        if content:
            found = tr("an answer that speaks and calls a tool at once")
            raise RowFault("tools", path, found, tr("one message for each"))
        yield from ((message, counts) for message in _calls(prompt, calls, (*path, "tool_calls")))
    else:
        text = _content(content, (*path, tags.content))
        kept = name if isinstance(name, str) and name and role in ("assistant", "tool") else None
        tools = item.get("tools")
        if role == "system" and tools:
            yield prompt.tool_offer(text, _functions(tools, (*path, "tools"))), False
        else:
            yield Message(role, text, kept), role == "assistant" and counts


def _calls(prompt: PromptFormat, calls: Any, path: tuple[str | int, ...]) -> list[Message]:
    listed = calls if isinstance(calls, list) else [calls]
    if len(listed) != 1:
        raise RowFault("tools", path, tr("{count} calls in one turn", count=len(listed)), tr("one call in a turn"))
    call = listed[0].get("function", listed[0]) if isinstance(listed[0], dict) else None
    if not isinstance(call, dict) or "name" not in call:
        raise RowFault("tools", path, kind_of(calls), tr("a call"), '{"name": "…", "arguments": {…}}')
    return [_call(prompt, call["name"], call.get("arguments", {}), path)]


def _call(prompt: PromptFormat, name: Any, arguments: Any, path: tuple[str | int, ...]) -> Message:
    if isinstance(arguments, str):
        arguments = _json(arguments, path)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise RowFault("tools", path, tr("a call without name and arguments"), '{"name": "…", "arguments": {…}}')
    return prompt.tool_call(name, arguments)


def _with_head(
    said: list[Said], value: Mapping[str, Any], form: Form, prompt: PromptFormat, system: str | None
) -> list[Said]:
    """The system message: what the row says, else what is asked for; and the tools that are offered."""
    key, offered = form.columns.get("system"), form.columns.get("tools")
    text = _string(value[key], (key,)) if key is not None and value.get(key) else None
    if said and said[0][0].role == "system" and said[0][0].tools is not None:
        return said
    if said and said[0][0].role == "system":
        text, said = said[0][0].content if text is None else text, said[1:]
    text = text or system or ""
    tools: Any = value.get(offered or "\0")
    path: tuple[str, ...] = (offered or "",)
    if isinstance(inside := value.get(form.columns.get("messages", "\0")), dict):
        tools, path = inside.get("tools"), (form.columns["messages"], "tools")
    if tools:
        functions = _functions(tools, path)
        return [(prompt.tool_offer(text, functions), False), *said] if functions else said
    return [(Message("system", text), False), *said] if text else said


def _functions(tools: Any, path: tuple[str | int, ...]) -> list[Mapping[str, Any]]:
    listed = _json(tools, path) if isinstance(tools, str) else tools
    if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
        raise RowFault("tools", path, kind_of(listed), tr("a list of functions"), '[{"name": "…", "parameters": {…}}]')
    return [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in listed]


def _check(said: Sequence[Said], form: Form) -> None:
    """A question first, an answer last, no empty answers, and one of them to learn."""
    answers = [message for message, _ in said if message.role == "assistant"]
    path = (form.columns["messages"],) if form.columns.get("messages") else ()
    if not answers:
        raise RowFault("order", path, tr("no answer"), tr("a question and an answer"))
    if said[-1][0].role != "assistant":
        found = tr("a conversation that ends with a message of {role}", role=said[-1][0].role)
        raise RowFault("order", path, found, tr("an answer at the end"))
    first = next(message for message, _ in said if message.role != "system")
    if first.role == "assistant":
        raise RowFault("order", path, tr("an answer at the beginning"), tr("a question before it"))
    if any(not message.content.strip() for message in answers):
        key = form.columns.get("answer")
        raise RowFault("empty", (key,) if key else path, tr("an empty answer"), tr("an answer"))
    if not any(learned for _, learned in said):  # "loss": false or "weight": 0 in each
        raise RowFault("unlearned", path, tr("no answer that is to be learned"), tr("an answer that counts"))


def _preferred(value: Mapping[str, Any], form: Form, part: str) -> str:
    key = form.columns[part]
    given = value[key]
    if (
        isinstance(given, list) and given and isinstance(given[-1], dict)
    ):  # whole conversations: the last message is what differs
        given = given[-1]
    if isinstance(given, dict):
        tags = next((tags for tags in (form.tags, SHAREGPT, OPENAI) if tags.content in given), form.tags)
        given = given.get(tags.content)
    return _string(given, (key,))


def _content(value: Any, path: tuple[str | int, ...]) -> str:
    """A message's text, also as OpenAI's list of parts."""
    if isinstance(value, list):
        parts = [part for part in value if isinstance(part, dict) and part.get("type") == "text"]
        if len(parts) < len(value):
            raise RowFault("type", path, tr("a part that is no text"), tr("text alone"))
        return "".join(_string(part.get("text"), path) for part in parts)
    if isinstance(value, dict):  # a tool's result
        return json.dumps(value, ensure_ascii=False)
    return _string(value, path)


def _string(value: Any, path: tuple[str | int, ...]) -> str:
    if not isinstance(value, str):
        raise RowFault("type", path, kind_of(value), tr("a text in quotes"), '"…"')
    return value


def _json(text: str, path: tuple[str | int, ...]) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowFault("type", path, one_line(repr(text), 60), tr("JSON inside the text")) from None


def kind_of(value: Any) -> str:
    """What somebody who wrote it would call it."""
    kinds = {dict: tr("an object"), list: tr("a list"), str: tr("a text"), bool: tr("true or false")}
    kind = kinds.get(type(value), tr("a number") if isinstance(value, int | float) else tr("null"))
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return f"{kind}: {one_line(shown, 40)}"


def _example(form: Form) -> str:
    row: dict[str, Any] = {form.columns[part]: "…" for part in form.needs}
    if key := form.columns.get("messages"):
        row[key] = [{form.tags.role: "user", form.tags.content: "…"}]
    return json.dumps(row, ensure_ascii=False)


def words_of(error: GlmchatError) -> RowFault:
    """What a chat format says of a conversation that it cannot write."""
    return RowFault("format", (), error.message, error.hint)
