"""Every odd value at every field of every route: an answer or a refusal that names the field, and never a 500.

Covers serve/wire.py, serve/fields.py, serve/app.py: valid requests are taken, and each place in them is given every
kind of JSON value at its boundaries.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fakes import FakeEngine

from glmchat.serve import fields
from glmchat.serve.app import build_app
from glmchat.serve.host import Host
from glmchat.serve.run import store_adapter

ALLOWED = (200, 400, 404, 413, 422)
HALF = "a\ud800"


def nested(levels: int, kind: type) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value] if kind is list else {"a": value}
    return value


# What JSON can say but Python's writer cannot is written into the text: "@1e999@" becomes 1e999.
RAW = {
    **{text: text for text in ("1e999", "-1e999", "NaN", "9" * 5000)},
    "[[": "[" * 10_000 + "]" * 10_000,
    "{{": '{"a":' * 10_000 + "1" + "}" * 10_000,
}
SMALL: Sequence[Any] = (None, True, False, 0, -1, 2**64, 0.5, "@1e999@", "", "x", HALF, [], ["x"], {}, {"x": 1})
VALUES: Sequence[Any] = (
    *SMALL,
    *(1, 2**31, 2**63, -(2**63) - 1, 10**400, -(10**400), 1e308, -0.0, "@-1e999@", "@NaN@", "@" + "9" * 5000 + "@"),
    *("a\0b", "\udfff", "\x1b]0;x\x07", "../../../etc/passwd", "/etc/passwd", "9" * 400, "\u202e", "x" * 5000),
    *([[]], [None], [""], [HALF], [1], [1.5], [True], [-1], [10**400], [2**64], [{}], ["x"] * 2000, [1] * 2000),
    *({"": None}, {HALF: HALF}, {"type": []}, {"type": {}}, {"type": "text"}, {"type": "json_schema"}),
    *({"type": "enabled"}, {"type": "json_schema", "json_schema": {"schema": 3}}, {"7": 10**400}, {"9" * 11: 1}),
    *({"²": 1}, {"٣": 1}, {"name": "x"}, [{"name": "x"}], [{"type": "text", "text": "x"}]),
    *([{"type": "text", "text": 10**400}], [{"type": ["text"], "text": "x"}]),
    *(nested(150, list), nested(150, dict), "@[[@", "@{{@"),
)

USER = {"role": "user", "content": "hi"}
TALK: dict[str, Any] = {"messages": [USER]}
SAID: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "s", "tools": [{"name": "t"}]},
        {"role": "user", "content": [{"type": "text", "text": "x"}], "name": "n", "metadata": "m"},
        {"role": "assistant", "content": "x"},
    ]
}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
Place = tuple[dict[str, Any], tuple[str | int, ...]]


def places() -> Iterator[tuple[str, Place, Sequence[Any]]]:
    heard = sorted(fields._HEARD)
    passed = sorted(fields.HARMLESS | fields._NEUTRAL.keys())
    chat, completion = "/v1/chat/completions", "/v1/completions"
    for name in heard:
        if name != "prompt":
            yield chat, (TALK, (name,)), VALUES
        if name != "messages":
            yield completion, ({"prompt": "a"}, (name,)), VALUES
    for name in passed:
        yield chat, (TALK, (name,)), SMALL
        yield completion, ({"prompt": "a"}, (name,)), SMALL
    for inner in (
        *((0,), (0, "tools"), (0, "tools", 0), (0, "tools", 0, "name"), (1, "role"), (1, "content"), (1, "content", 0)),
        *((1, "content", 0, "type"), (1, "content", 0, "text"), (1, "name"), (1, "metadata"), (1, "tool_calls")),
        *((1, "function_call"), (1, "audio"), (1, "refusal"), (1, "tool_call_id"), (1, "prefix"), (2, "prefix")),
        *((2, "partial"), (2, "content"), (2, "reasoning_content"), (2, "tool_calls"), (1, "frobnicate")),
    ):
        yield chat, (SAID, ("messages", *inner)), VALUES
        yield "/tokenize", (SAID, ("messages", *inner)), SMALL
    begun = {"messages": SAID["messages"], "continue_final": True, "continue_token_ids": [1]}
    inside: Sequence[tuple[dict[str, Any], tuple[str | int, ...]]] = (
        ({"adapters": [{"name": "poet", "scale": 1}]}, ("adapters", 0)),
        ({"adapters": [{"name": "poet", "scale": 1}]}, ("adapters", 0, "name")),
        ({"adapters": [{"name": "poet", "scale": 1}]}, ("adapters", 0, "scale")),
        ({"chat_template_kwargs": {"enable_thinking": True}}, ("chat_template_kwargs", "enable_thinking")),
        ({"chat_template_kwargs": {"x": {"y": 1}}}, ("chat_template_kwargs", "x", "y")),
        ({"stream_options": {"include_usage": True}}, ("stream_options", "include_usage")),
        ({"logit_bias": {"7": 1}}, ("logit_bias", "7")),
        ({"logprobs": True}, ("top_logprobs",)),
        ({"reasoning": {"effort": "low"}}, ("reasoning", "effort")),
        ({"reasoning": {"effort": "low"}}, ("reasoning", "max_tokens")),
        ({"thinking": {"type": "enabled"}}, ("thinking", "type")),
        ({"thinking": {"enabled": True}}, ("thinking", "enabled")),
        ({"response_format": SCHEMA}, ("response_format", "type")),
        ({"response_format": SCHEMA}, ("response_format", "json_schema")),
        ({"response_format": SCHEMA}, ("response_format", "json_schema", "schema")),
        ({"response_format": SCHEMA}, ("response_format", "json_schema", "schema", "type")),
        ({"response_format": SCHEMA}, ("response_format", "json_schema", "name")),
        ({"response_format": {"type": "json_object"}}, ("response_format", "schema")),
        *(({"structured_outputs": {}}, ("structured_outputs", name)) for name in ("choice", "json", "regex", "x")),
        ({"stop": ["a"]}, ("stop", 0)),
        ({"stop_token_ids": [1]}, ("stop_token_ids", 0)),
        ({"guided_choice": ["a"]}, ("guided_choice", 0)),
        (begun, ("continue_token_ids",)),
        (begun, ("continue_token_ids", 0)),
        (begun, ("continue_final",)),
    )
    for more, path in inside:
        yield chat, ({**TALK, **more}, path), VALUES
    for prompt, path in ((["a"], ("prompt", 0)), ([1], ("prompt", 0)), ([[1]], ("prompt", 0, 0))):
        yield completion, ({"prompt": prompt}, path), VALUES
    for name in ("prompt", "text", "content"):
        yield "/tokenize", ({name: "a"}, (name,)), VALUES
    for name in ("chat_template_kwargs", "continue_final", "enable_thinking", "messages"):
        yield "/tokenize", (TALK, (name,)), VALUES
    yield "/v1/load_lora_adapter", ({"lora_name": "poet"}, ("lora_name",)), VALUES
    yield "/v1/load_lora_adapter", ({"lora_name": "poet"}, ("lora_path",)), VALUES
    yield "/v1/unload_lora_adapter", ({"lora_name": "poet"}, ("lora_name",)), VALUES


def written(data: Any) -> bytes:
    text = json.dumps(data)
    for name, raw in RAW.items():
        text = text.replace(f'"@{name}@"', raw)
    return text.encode()


def with_value(request: dict[str, Any], path: Sequence[str | int], value: Any) -> dict[str, Any]:
    data = copy.deepcopy(request)
    at: Any = data
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return data


def complaint(answer: httpx2.Response, path: Sequence[str | int]) -> str | None:
    """What is wrong with an answer to a request whose value at `path` was odd."""
    if answer.status_code not in ALLOWED:
        return f"{answer.status_code} {answer.text[:100]}"
    if answer.status_code == 200:
        return None
    error, name = answer.json()["error"], str(path[0])
    if name in ("continue_final", "continue_final_message"):
        name = "continue_final"
    if not str(error["param"]).startswith(name):
        return f"param {error['param']}: {error['message'][:100]}"
    if len(answer.content) > 3000 or not error["hint"] or "\x1b" in answer.text:
        return f"{len(answer.content)} bytes, hint {error['hint']!r}"
    return None


def test_every_odd_value_at_every_field_is_an_answer_or_a_refusal_that_names_it(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.ERROR)
    host = Host(
        lambda report: FakeEngine(["a"], context=20_000),
        "fake",
        adapters={"poet": tmp_path},
        find_adapter=store_adapter,
    )
    host.start()
    assert host.loaded.wait(20)
    complaints: dict[tuple[str, str, str], list[str]] = {}
    asked = 0

    async def ask_all() -> None:
        nonlocal asked
        transport = httpx2.ASGITransport(build_app(host), raise_app_exceptions=False)
        headers = {"Content-Type": "application/json"}
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
            for route, (request, path), values in places():
                for value in values:
                    answer = await client.post(route, content=written(with_value(request, path, value)))
                    asked += 1
                    if words := complaint(answer, path):
                        place = ".".join(map(str, path))
                        complaints.setdefault((route, place, words), []).append(json.dumps(value)[:40])
            assert (await client.post("/v1/chat/completions", json=TALK)).status_code == 200

    try:
        asyncio.run(ask_all())
    finally:
        host.stop()
    assert not complaints, "\n".join(f"{key}: {values}" for key, values in complaints.items())
    assert asked > 8000
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
