"""Requests that no honest client makes: what each is, which status it gets, and what its refusal has to name.

More of the table in tests/fuzz/hostile_inputs.py, for `glmchat serve`.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from typing import Any

USER = {"role": "user", "content": "hi"}
LONG = "x" * 1_000_000
HUGE = 10**400
CHAT, COMPLETE, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
JSON = b"application/json"


@dataclass(frozen=True, slots=True)
class Request:
    """words: what must stand in the answer; of a refusal of a field, its name. more: lines of the head."""

    name: str
    path: str
    body: bytes
    status: int
    words: str
    kind: bytes = JSON
    more: tuple[bytes, ...] = ()
    chunked: bool = False

    def head(self) -> bytes:
        length = b"Transfer-Encoding: chunked" if self.chunked else b"Content-Length: %d" % len(self.body)
        lines = (b"Host: localhost", b"Connection: close", b"Content-Type: " + self.kind, length, *self.more)
        return b"POST " + self.path.encode() + b" HTTP/1.1\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": [USER], **fields}).encode()


def message(**fields: Any) -> bytes:
    return chat(messages=[{**USER, **fields}])


def raw(field: str, text: str) -> bytes:
    """A value that Python's writer does not write."""
    return b'{"messages": [{"role": "user", "content": "hi"}], "' + field.encode() + b'": ' + text.encode() + b"}"


def deep(sign: str, levels: int) -> str:
    opening, closing = {"[": ("[", "]"), "{": ('{"a":', "}")}[sign]
    return opening * levels + "1" + closing * levels


REQUESTS = (
    Request("a role that is a list", CHAT, message(role=["user"]), 400, "messages[0].role"),
    Request("a role that is an object", CHAT, message(role={"a": 1}), 400, "messages[0].role"),
    Request("a role of 400 digits", CHAT, message(role=HUGE), 400, "messages[0].role"),
    Request("a role of a million letters", CHAT, message(role=LONG), 400, "messages[0].role"),
    Request("a content that is a number", CHAT, message(content=HUGE), 400, "messages[0].content"),
    Request("a part whose type is a list", CHAT, message(content=[{"type": [], "text": "x"}]), 400, "content[0]"),
    Request("messages that are an object", CHAT, chat(messages={"role": "user"}), 400, "messages"),
    Request("messages that are none", CHAT, chat(messages=[]), 400, "messages"),
    Request("200,000 messages", CHAT, chat(messages=[USER] * 200_000), 400, "messages"),
    Request("a message that is null", CHAT, chat(messages=[None]), 400, "messages[0]"),
    Request("a limit of 400 digits", CHAT, chat(max_tokens=HUGE), 400, "max_tokens"),
    Request("a seed of 400 digits", CHAT, chat(seed=HUGE), 400, "seed"),
    Request("a temperature of 400 digits", CHAT, chat(temperature=HUGE), 400, "temperature"),
    Request("a min_p of 400 digits", CHAT, chat(min_p=HUGE), 400, "min_p"),
    Request("a temperature that is NaN", CHAT, raw("temperature", "NaN"), 400, "temperature"),
    Request("a temperature of 1e999", CHAT, raw("temperature", "1e999"), 400, "temperature"),
    Request("a seed of 5,000 digits", CHAT, raw("seed", "9" * 5000), 400, "seed"),
    Request("ids beyond 64 bits", COMPLETE, json.dumps({"prompt": [2**64]}).encode(), 400, "prompt"),
    Request("ids below zero", COMPLETE, json.dumps({"prompt": [[-1]]}).encode(), 400, "prompt"),
    Request("a bias for a token of 400 digits", CHAT, chat(logit_bias={"9" * 400: 1}), 400, "logit_bias"),
    Request("a model of a million letters", CHAT, chat(model=LONG), 404, "model"),
    Request("a model that is a path", CHAT, chat(model="../../../etc/passwd"), 404, "model"),
    Request("a model that is a list", CHAT, chat(model=["x"]), 400, "model"),
    Request("an adapter that is a path", CHAT, chat(adapters=[{"name": "../../etc/passwd"}]), 404, "adapters"),
    Request("an adapter of a million letters", "/v1/load_lora_adapter", json.dumps({"lora_name": LONG}).encode(), 404,
            "adapter"),
    Request("a stop of half a character", CHAT, chat(stop="\ud800"), 400, "stop"),
    Request("a question of half a character", CHAT, message(content="\udfff"), 400, "messages[0].content"),
    Request("a field of half a character", CHAT, chat(**{"\ud800": 1}), 400, "half a character"),
    Request("a field of a million letters", CHAT, chat(**{LONG: 1}), 400, "xxx"),
    Request("a body of 100,000 lists", CHAT, deep("[", 100_000).encode(), 400, "nested too deeply"),
    Request("a stop in 100,000 lists", CHAT, raw("stop", deep("[", 100_000)), 400, "stop"),
    Request("tools in 300 objects", CHAT, raw("tools", deep("{", 300)), 400, "tools"),
    Request("a schema in 100,000 objects", CHAT, raw("response_format", deep("{", 100_000)), 400, "response_format"),
    Request("a body that is a list", CHAT, b"[]", 400, "not a JSON object"),
    Request("a body of random bytes", CHAT, bytes(range(256)) * 40, 400, "not UTF-8"),
    Request("a body that is empty", CHAT, b"", 400, "not JSON"),
    Request("a text to count that is a list", TOKENIZE, b'{"prompt": [[]]}', 400, "prompt"),
    Request("a form of a web page", CHAT, b"messages=hi", 415, "application/json",
            b"application/x-www-form-urlencoded"),
    Request("plain text", CHAT, chat(), 415, "application/json", b"text/plain"),
    Request("a form of several parts", CHAT, chat(), 415, "application/json", b"multipart/form-data; boundary=x"),
    Request("a packed body", CHAT, gzip.compress(chat()), 415, "gzip", more=(b"Content-Encoding: gzip",)),
    Request("17 MiB", CHAT, message(content="x" * (17 * 2**20)), 413, "16"),
    Request("two lengths", CHAT, chat(), 400, "Invalid HTTP", more=(b"Content-Length: 99999999999",)),
    Request("chunks without end", CHAT, b"10000\r\n" + b" " * 65_536 + b"\r\n", 413, "16", chunked=True),
)  # fmt: skip
