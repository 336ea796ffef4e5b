"""Requests as they come in: a body, its conversation or prompt, and what `serve/fields.py` makes of the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glmchat.core.decoding import PLAIN, Decoding
from glmchat.core.language import tr
from glmchat.core.messages import Message, Sampling
from glmchat.core.text import one_line
from glmchat.serve import fields
from glmchat.serve.fields import flag, ids, invalid, unsupported
from glmchat.serve.fields import text as whole_text

BODY_LIMIT = 16 * 1024 * 1024  # bytes; a context of a million tokens of Chinese text is about 5 MB
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "observation"})


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One checked request for an answer. Exactly one of `messages`, `prompt` and `prompt_ids` is given."""

    model: str | None
    sampling: Sampling
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    stream: bool = False
    include_usage: bool = False
    return_token_ids: bool = False
    adapters: Mapping[str, float] | None = None  # None: as the model name says
    continue_final: bool = False
    continue_ids: tuple[int, ...] = ()  # the exact ids of the answer so far; otherwise its text is encoded
    decoding: Decoding = PLAIN
    choices: int = 1  # answers wanted, made one after the other

    @property
    def is_chat(self) -> bool:
        return self.messages is not None


def parse_json(body: bytes) -> dict[str, Any]:
    """A request body as a JSON object. NaN and Infinity, which Python's reader would let through, are refused."""

    def refuse(constant: str) -> None:
        raise invalid(f"{constant} is not JSON", "give a number, or leave the field out")

    try:
        data = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError:
        raise invalid("the body is not UTF-8", "send JSON in UTF-8") from None
    except RecursionError:
        raise invalid("the body is nested too deeply", "send an object of plain fields") from None
    except ValueError as error:  # JSONDecodeError, and integers of more than 4,300 digits
        raise invalid(f"the body is not JSON: {one_line(str(error))}", 'send an object: {"messages": [...]}') from None
    if not isinstance(data, dict):
        raise invalid("the body is not a JSON object", 'send an object: {"messages": [...]}')
    return data


def parse_chat(data: Mapping[str, Any], defaults: Mapping[str, Any]) -> GenerationRequest:
    """A `/v1/chat/completions` body. `defaults`: sampling settings for what the client leaves open."""
    messages = parse_messages(data)
    common = _common(data, defaults, chat=True)
    continue_final = continues(data)
    if continue_final and messages[-1].role != "assistant":
        raise invalid(
            "continue_final needs an assistant message at the end",
            "send the answer so far as the last message",
            "messages",
        )
    if data.get("add_generation_prompt") is False and not continue_final:
        raise unsupported("add_generation_prompt")
    return GenerationRequest(
        messages=messages,
        continue_final=continue_final,
        continue_ids=ids(data, "continue_token_ids") if continue_final else (),
        **common,
    )


def continues(data: Mapping[str, Any]) -> bool:
    """Whether the last message is an answer to go on with: our own field, vLLM's, or Mistral's, DeepSeek's and
    Moonshot's mark on the message itself.
    """
    last = data["messages"][-1]
    marked = [name for name in ("prefix", "partial") if flag(last, name)]
    return flag(data, "continue_final") or flag(data, "continue_final_message") or bool(marked)


def parse_completion(data: Mapping[str, Any], defaults: Mapping[str, Any]) -> GenerationRequest:
    """A `/v1/completions` body: `prompt` is text, a list that holds one text, or a list of ids."""
    prompt = data.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    common = _common(data, defaults, chat=False)
    if isinstance(prompt, str):
        return GenerationRequest(prompt=whole_text(prompt, "prompt"), **common)
    if isinstance(prompt, list) and prompt and not any(isinstance(part, (str, list)) for part in prompt):
        return GenerationRequest(prompt_ids=ids({"prompt": prompt}, "prompt"), **common)
    raise invalid(
        "prompt must be a text or a list of token ids, one prompt a request",
        '{"prompt": "Once upon a time"}',
        "prompt",
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
    if role not in ROLES:
        raise invalid(
            f"{where}.role is {one_line(repr(role), 60)}", "one of " + ", ".join(sorted(ROLES)), f"{where}.role"
        )
    for name in ("tool_calls", "function_call", "audio"):
        if item.get(name):
            raise unsupported(f"{where}.{name}", tr("put it into the text of a message"))
    for name in ("prefix", "partial"):
        if flag(item, name) and not last:
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
        return Message.from_json({**item, "role": role, "content": whole_text(content, f"{where}.content")})
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
        "stream": flag(data, "stream"),
        "include_usage": flag(options or {}, "include_usage"),
        "return_token_ids": flag(data, "return_token_ids"),
        "adapters": _adapters(data.get("adapters")),
    }


def _adapters(value: Any) -> dict[str, float] | None:
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
