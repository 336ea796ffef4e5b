"""Requests as they come in: OpenAI's fields, vLLM's extensions and ours, each checked once, here.

What glmchat cannot do (several answers, log probabilities, tools, images) is refused by name: a client that believes it
was heard is worse off than one that is told. Unknown fields are ignored, as every server of this API does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.messages import Message, Sampling, check_template_variables
from glmchat.core.text import one_line

BODY_LIMIT = 16 * 1024 * 1024  # bytes; a context of a million tokens of Chinese text is about 5 MB
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "observation"})
_SPELLINGS = {
    "max_completion_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "chat_template_kwargs": "template_variables",
}
_REFUSED: Mapping[str, tuple[Any, ...]] = {  # field -> values that ask for nothing
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
}


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

    @property
    def is_chat(self) -> bool:
        return self.messages is not None


def invalid(message: str, hint: str = "see the OpenAI API reference for the form of a request") -> Usage:
    return Usage(message, hint=hint, code="request.invalid")


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
    continue_final = _flag(data, "continue_final") or _flag(data, "continue_final_message")
    if continue_final and messages[-1].role != "assistant":
        raise invalid(
            "continue_final needs an assistant message at the end", "send the answer so far as the last message"
        )
    return GenerationRequest(
        messages=messages,
        continue_final=continue_final,
        continue_ids=_ids(data, "continue_token_ids") if continue_final else (),
        **_common(data, defaults),
    )


def parse_completion(data: Mapping[str, Any], defaults: Mapping[str, Any]) -> GenerationRequest:
    """A `/v1/completions` body: `prompt` is text, a list that holds one text, or a list of ids."""
    prompt = data.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    common = _common(data, defaults)
    if isinstance(prompt, str):
        return GenerationRequest(prompt=_text(prompt, "prompt"), **common)
    if isinstance(prompt, list) and prompt and not any(isinstance(part, (str, list)) for part in prompt):
        return GenerationRequest(prompt_ids=_ids({"prompt": prompt}, "prompt"), **common)
    raise invalid(
        "prompt must be a text or a list of token ids, one prompt a request", '{"prompt": "Once upon a time"}'
    )


def parse_messages(data: Mapping[str, Any]) -> tuple[Message, ...]:
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        raise invalid(
            "messages must be a list that is not empty", '{"messages": [{"role": "user", "content": "Hello"}]}'
        )
    return tuple(_message(item, index) for index, item in enumerate(messages))


def _message(item: Any, index: int) -> Message:
    where = f"messages[{index}]"
    if not isinstance(item, dict):
        raise invalid(f"{where} is not an object", '{"role": "user", "content": "Hello"}')
    role = item.get("role")
    if role not in ROLES:
        raise invalid(f"{where}.role is {one_line(repr(role), 60)}", "one of " + ", ".join(sorted(ROLES)))
    content = item.get("content")
    if content is None and role == "assistant":  # what OpenAI sends for an answer that was only a tool call
        content = ""
    if isinstance(content, list):
        content = "".join(_part(part, f"{where}.content[{n}]") for n, part in enumerate(content))
    if not isinstance(content, str):
        raise invalid(f"{where}.content must be a text", 'a string, or a list of {"type": "text", "text": …}')
    role = "system" if role == "developer" else role
    try:
        return Message.from_json({**item, "role": role, "content": _text(content, f"{where}.content")})
    except ValueError as error:
        raise invalid(f"{where}.{error} is of the wrong kind", "name is a text, tools is a list of objects") from None


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise invalid(f"{where} is {one_line(repr(kind), 60)}: this model reads text only", "send parts of type text")


def _text(value: str, where: str) -> str:
    """JSON can spell half a surrogate pair, which is no character and no tokenizer takes."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise invalid(f"{where} holds half a character (a lone surrogate)", "send whole Unicode characters") from None
    return value


def _flag(data: Mapping[str, Any], name: str) -> bool:
    value = data.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise invalid(f"{name} must be true or false")
    return value


def _ids(data: Mapping[str, Any], name: str) -> tuple[int, ...]:
    value = data.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
        raise invalid(f"{name} must be a list of token ids")
    return tuple(value)


def _common(data: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    for name, harmless in _REFUSED.items():
        if (value := data.get(name)) is not None and value not in harmless:
            raise Usage(
                tr("{name} is not supported by glmchat", name=name),
                hint=tr("leave the field out"),
                code="request.unsupported",
            )
    model = data.get("model")
    if model is not None and not isinstance(model, str):
        raise invalid("model must be a text", "GET /v1/models lists the names")
    options = data.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise invalid("stream_options must be an object", '{"include_usage": true}')
    return {
        "model": model or None,
        "sampling": _sampling(data, defaults),
        "stream": _flag(data, "stream"),
        "include_usage": _flag(options or {}, "include_usage"),
        "return_token_ids": _flag(data, "return_token_ids"),
        "adapters": _adapters(data.get("adapters")),
    }


def _sampling(data: Mapping[str, Any], defaults: Mapping[str, Any]) -> Sampling:
    values = dict(defaults)
    given = {_SPELLINGS.get(k, k): v for k, v in data.items() if v is not None}
    for item in fields(Sampling):
        if item.name not in given:
            continue
        value = given[item.name]
        match item.name:
            case "stop":
                value = (value,) if isinstance(value, str) else value
                if not isinstance(value, (list, tuple)) or not all(isinstance(s, str) and s for s in value):
                    raise invalid("stop must be a text or a list of texts, none of them empty")
                if len(value) > 16:
                    raise invalid("stop holds more than 16 texts")
                value = tuple(_text(s, "stop") for s in value)
            case "template_variables":
                value = template_variables(given, "template_variables")
            case "ignore_eos":
                value = _flag(given, "ignore_eos")
            case "top_k" | "seed" | "max_tokens":
                if isinstance(value, float) and value.is_integer():
                    value = int(value)
                if not isinstance(value, int) or isinstance(value, bool):
                    raise invalid(f"{item.name} must be a whole number")
                if item.name == "top_k" and value == -1:  # vLLM's way of switching it off
                    value = 0
                if item.name == "seed" and value < 0:  # llama-server's way of asking for a random one
                    continue
            case _:
                if not isinstance(value, (int, float)) or isinstance(value, bool):
                    raise invalid(f"{item.name} must be a number")
                value = float(value)
        values[item.name] = value
    return Sampling(**values)


def template_variables(data: Mapping[str, Any], field: str = "chat_template_kwargs") -> dict[str, Any]:
    """What the chat template is told beside the messages. Raises Usage for names that are the conversation's own."""
    value = data.get(field) or {}
    if not isinstance(value, dict):
        raise invalid("chat_template_kwargs must be an object", '{"enable_thinking": false}')
    check_template_variables(value)
    return value


def _adapters(value: Any) -> dict[str, float] | None:
    if value is None:
        return None
    form = '[{"name": "my-lora", "scale": 1.0}]'
    if not isinstance(value, list):
        raise invalid("adapters must be a list", form)
    scales: dict[str, float] = {}
    for item in value:
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            raise invalid("each of adapters must be an object with a name", form)
        scale = item.get("scale", 1.0)
        if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not -100 <= scale <= 100:
            raise invalid("the scale of an adapter must be a number between -100 and 100", form)
        if item["name"] in scales:
            raise invalid(f"the adapter {one_line(repr(item['name']), 60)} is named twice", form)
        scales[item["name"]] = float(scale)
    return scales
