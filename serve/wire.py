"""Requests as they come in: a body, its conversation or prompt, and what `serve/fields.py` makes of the rest."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from glmchat.core.decoding import PLAIN, Decoding
from glmchat.core.errors import FieldError
from glmchat.core.language import tr
from glmchat.core.messages import Message, Sampling
from glmchat.core.text import one_line
from glmchat.serve import fields
from glmchat.serve.fields import flag, ids, invalid, unsupported

BODY_LIMIT = 16 * 1024 * 1024  # bytes; a context of a million tokens of Chinese text is about 5 MB
MOST_ANSWERS = 256  # of one request
DEPTH = 200  # levels of lists and objects; what walks through them later may recurse
PARTS = 1_000_000  # lists and objects in a body
_MOST_DIGITS = 1000  # of a whole number; reading one takes the square of their number
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[][{}]')
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # how JSON spells half a pair of surrogates, or both
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "observation"})


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One checked request. Either `messages` or `prompts` (each a text or ids) are given."""

    model: str | None
    sampling: Sampling
    messages: tuple[Message, ...] | None = None
    prompts: tuple[str | tuple[int, ...], ...] = ()
    echo: bool = False  # the answer begins with its prompt
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    adapters: Mapping[str, float] | None = None  # None: as the model name says
    continue_final: bool = False
    continue_ids: tuple[int, ...] = ()  # the exact ids of the answer so far; otherwise its text is encoded
    decoding: Decoding = PLAIN
    choices: int = 1  # answers wanted to each prompt
    variables_in: Mapping[str, str] = field(default_factory=dict)  # template variable -> the field that told it
    keep_as: str | None = None  # what the conversation's cache on the disk is called; None: it has no name

    @property
    def is_chat(self) -> bool:
        return self.messages is not None

    @property
    def brings_ids(self) -> bool:
        """Ids of the client's own, which another vocabulary may have made."""
        return bool(self.continue_ids) or any(isinstance(prompt, tuple) for prompt in self.prompts)


def parse_json(body: bytes) -> dict[str, Any]:
    """A request body as a JSON object of whole characters and finite numbers, at most DEPTH levels deep.

    Raises FieldError, with the field's path where one is at fault: a number that no float holds (1e999, or one of
    5,000 digits), NaN and Infinity, which Python's reader would let through, half a character, too many levels.
    """
    if body.count(b"[") + body.count(b"{") > PARTS:  # each takes some 60 bytes, whatever is in it
        raise invalid("the body holds too many lists and objects", "send a smaller one")
    endless = False

    def number(text: str) -> float:
        nonlocal endless
        value = float(text)
        endless = endless or not math.isfinite(value)
        return value

    def whole(text: str) -> int | float:
        return int(text) if len(text) < _MOST_DIGITS else number(text)

    try:
        data = json.loads(body.decode("utf-8"), parse_constant=number, parse_float=number, parse_int=whole)
    except UnicodeDecodeError:
        raise invalid("the body is not UTF-8", "send JSON in UTF-8") from None
    except RecursionError:
        raise _deep(_deep_field(body)) from None
    except ValueError as error:
        raise invalid(f"the body is not JSON: {one_line(str(error))}", 'send an object: {"messages": [...]}') from None
    if not isinstance(data, dict):
        raise invalid("the body is not a JSON object", 'send an object: {"messages": [...]}')
    if where := _too_deep(data):
        raise _deep(where)
    if endless or _HALF.search(body):
        for where, words, hint in _faults(data, ""):
            raise invalid(f"{one_line(where, 80)} {words}", hint, one_line(where, 80))
    return data


def _deep(where: str) -> FieldError:
    return invalid(f"{one_line(where, 80)} is nested too deeply", "send plain fields", one_line(where, 80))


def _deep_field(body: bytes) -> str:
    """The first field of a body that is nested too deeply for Python's reader."""
    depth, name = 0, b"the body"
    for token in _TOKENS.finditer(body):
        word = token.group()
        depth += (word in b"[{") - (word in b"]}")
        if depth > DEPTH:
            break
        if depth == 1 and word[:1] == b'"':
            name = word[1:-1]
    return name.decode("utf-8", "replace")


def _too_deep(data: Mapping[str, Any]) -> str | None:
    """The field that is nested too deeply."""
    for name, value in data.items():
        level = [value]
        for _ in range(DEPTH):
            level = [inner for item in level for inner in _inner(item) if isinstance(inner, (dict, list))]
            if not level:
                break
        else:
            return name
    return None


def _inner(item: Any) -> Any:
    return item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()


def _faults(item: Any, where: str) -> Iterator[tuple[str, str, str]]:
    """Path, words and hint of each number that is not finite, and of each lone surrogate: JSON can spell half a
    character, and no tokenizer takes it.
    """
    if isinstance(item, float) and not math.isfinite(item):
        yield where, "is no finite number", "give a number, or leave the field out"
    elif isinstance(item, str) and not _is_whole(item):
        yield where, "holds half a character (a lone surrogate)", "send whole Unicode characters"
    elif isinstance(item, dict):
        for name, value in item.items():
            path = f"{where}.{name}" if where else name
            yield from _faults(name, path)
            yield from _faults(value, path)
    elif isinstance(item, list):
        for index, value in enumerate(item):
            yield from _faults(value, f"{where}[{index}]")


def _is_whole(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def parse_chat(data: Mapping[str, Any], defaults: Mapping[str, Any]) -> GenerationRequest:
    """A `/v1/chat/completions` body. `defaults`: sampling settings for what the client leaves open."""
    messages = parse_messages(data)
    common = _common(data, defaults, chat=True)
    asked = continues(data)
    continue_final = asked is not None
    if asked is not None and messages[-1].role != "assistant":
        raise invalid(
            f"{asked} needs an assistant message at the end", "send the answer so far as the last message", asked
        )
    if data.get("add_generation_prompt") is False and not continue_final:
        raise unsupported("add_generation_prompt")
    return GenerationRequest(
        messages=messages,
        continue_final=continue_final,
        continue_ids=ids(data, "continue_token_ids") if continue_final else (),
        **common,
    )


def continues(data: Mapping[str, Any]) -> str | None:
    """The field that asks to go on with the last message, an answer: our own, vLLM's, or Mistral's, DeepSeek's and
    Moonshot's mark on the message itself. None: nothing asks for it.
    """
    last = len(data["messages"]) - 1
    marks = [f"messages[{last}].{name}" for name in ("prefix", "partial") if _mark(data["messages"][last], last, name)]
    own = [name for name in ("continue_final", "continue_final_message") if flag(data, name)]
    return next(iter(own + marks), None)


def _mark(item: Mapping[str, Any], index: int, name: str) -> bool:
    return flag(item, name, f"messages[{index}].{name}")


def parse_completion(data: Mapping[str, Any], defaults: Mapping[str, Any]) -> GenerationRequest:
    """A `/v1/completions` body. `prompt` is a text, a list of ids, or a list of one of the two, as in OpenAI's API:
    each has `n` answers, in the order of the prompts.
    """
    prompt, echo = data.get("prompt"), flag(data, "echo")
    limit, most = fields.spelt(data, "max_tokens")
    only_reads = echo and type(most) is int and most == 0  # OpenAI's way of asking for the prompt's numbers alone
    left_out = {"echo", limit} if only_reads else {"echo"}
    common = _common({name: value for name, value in data.items() if name not in left_out}, defaults, chat=False)
    if echo:
        asked: Decoding = common["decoding"]
        of_prompt = asked.top_logprobs is not None
        common["decoding"] = replace(asked, of_prompt=of_prompt, only_reads=only_reads)
    given = prompt if isinstance(prompt, list) and any(isinstance(one, (str, list)) for one in prompt) else [prompt]
    if len(given) * common["choices"] > MOST_ANSWERS:
        raise invalid(f"prompt asks for more than {MOST_ANSWERS} answers", "send fewer in one request", "prompt")
    return GenerationRequest(prompts=tuple(_prompt(one) for one in given), echo=echo, **common)


def _prompt(given: Any) -> str | tuple[int, ...]:
    if isinstance(given, str):
        return given
    if isinstance(given, list) and given:
        return ids({"prompt": given}, "prompt")
    raise invalid(
        "prompt must be a text or a list of token ids, or a list of such", '{"prompt": "Once upon a time"}', "prompt"
    )


def parse_messages(data: Mapping[str, Any]) -> tuple[Message, ...]:
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        raise invalid(
            "messages must be a list that is not empty",
            '{"messages": [{"role": "user", "content": "Hello"}]}',
            "messages",
        )
    return tuple(_message(item, index, last=index + 1 == len(messages)) for index, item in enumerate(messages))


def _message(item: Any, index: int, *, last: bool) -> Message:
    where = f"messages[{index}]"
    if not isinstance(item, dict):
        raise invalid(f"{where} is not an object", '{"role": "user", "content": "Hello"}', where)
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise invalid(
            f"{where}.role is {one_line(repr(role), 60)}", "one of " + ", ".join(sorted(ROLES)), f"{where}.role"
        )
    for name in ("tool_calls", "function_call", "audio"):
        if item.get(name):
            raise unsupported(f"{where}.{name}", tr("put it into the text of a message"))
    for name in ("prefix", "partial"):
        if _mark(item, index, name) and not last:
            raise invalid(f"{where}.{name} is for the last message", param=f"{where}.{name}")
    content = item.get("content")
    if content is None and role == "assistant":  # what OpenAI sends for an answer that was only a tool call
        content = ""
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{n}]") for n, part in enumerate(content))
    if not isinstance(content, str):
        raise invalid(
            f"{where}.content must be a text", 'a string, or a list of {"type": "text", "text": …}', f"{where}.content"
        )
    role = "system" if role == "developer" else role
    try:
        return Message.from_json({**item, "role": role, "content": content})
    except ValueError as error:
        raise invalid(
            f"{where}.{error} is of the wrong kind", "name is a text, tools is a list of objects", f"{where}.{error}"
        ) from None


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise invalid(
        f"{where} is {one_line(repr(kind), 60)}: this model reads text only", "send parts of type text", where
    )


def _common(data: Mapping[str, Any], defaults: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    fields.refuse_unheard(data)
    model = data.get("model")
    if model is not None and not isinstance(model, str):
        raise invalid("model must be a text", "GET /v1/models lists the names", "model")
    options = data.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise invalid("stream_options must be an object", '{"include_usage": true}', "stream_options")
    return {
        "model": model or None,
        "sampling": fields.sampling(data, defaults, max_tokens=None if chat else fields.COMPLETION_TOKENS),
        "decoding": fields.decoding(data, chat=chat),
        "choices": fields.choices(data),
        "variables_in": fields.fields_of_variables(data),
        "stream": flag(data, "stream"),
        "include_usage": flag(options or {}, "include_usage", "stream_options.include_usage"),
        "return_token_ids": flag(data, "return_token_ids"),
        "adapters": parse_adapters(data.get("adapters")),
        "keep_as": fields.keep_as(data),
    }


def parse_adapters(value: Any) -> dict[str, float] | None:
    """The field `adapters`: name -> scale; None: it is not there."""
    if value is None:
        return None
    form = '[{"name": "my-lora", "scale": 1.0}]'
    if not isinstance(value, list):
        raise invalid("adapters must be a list", form, "adapters")
    scales: dict[str, float] = {}
    for item in value:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise invalid("each of adapters must be an object with a name", form, "adapters")
        scale = item.get("scale", 1.0)
        if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not -100 <= scale <= 100:
            raise invalid("the scale of an adapter must be a number between -100 and 100", form, "adapters")
        if item["name"] in scales:
            raise invalid(f"the adapter {one_line(repr(item['name']), 60)} is named twice", form, "adapters")
        scales[item["name"]] = float(scale)
    return scales
