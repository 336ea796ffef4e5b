"""What the server sends: OpenAI's objects and chunks, llama-server's `timings`, and our `glmchat` object.

What is not known is null, never guessed.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

from glmchat.core.errors import DoesNotFit, GlmchatError, UnknownModel, Usage
from glmchat.serve.answer import Answer, Begun, Event, Prefill, Waiting
from glmchat.serve.face import Chunk
from glmchat.serve.host import Busy, Host, StillLoading


def to_bytes(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")


def sse(data: Any) -> bytes:
    """One event. JSON holds no raw newline, so one `data:` line is enough."""
    return b"data: " + to_bytes(data) + b"\n\n"


def comment(event: Event) -> bytes:
    """Progress as an SSE comment, which every client of this API skips; ours reads the JSON in it."""
    match event:
        case Waiting(place):
            return b": glmchat " + to_bytes({"waiting": place}) + b"\n\n"
        case Begun():
            return b": glmchat " + to_bytes({"waiting": 0}) + b"\n\n"
        case Prefill(done, total):
            return b": glmchat " + to_bytes({"prefill": done, "of": total}) + b"\n\n"
        case _:
            return b": keep-alive\n\n"


def error_json(error: GlmchatError) -> dict[str, Any]:
    """OpenAI's form, with our stable code, the hint, and the exit code for the command line."""
    kind = {400: "invalid_request_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
        status_of(error), "server_error"
    )
    return {"error": {**error.to_json(), "type": kind, "param": None}}


def status_of(error: GlmchatError) -> int:
    match error:
        case Busy():
            return 429
        case StillLoading():
            return 503
        case UnknownModel():
            return 404
        case Usage():
            return 400
        case DoesNotFit() if error.code.startswith(("context", "prompt")):
            return 400
        case _:
            return 500


class Rendering:
    """The objects of one answer: a completion or a chat, streamed or whole."""

    def __init__(self, answer: Answer) -> None:
        self._answer, self._host = answer, answer.host
        self._chat = answer.request.is_chat
        self._head = {
            "id": ("chatcmpl-" if self._chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": answer.request.model or answer.host.model,
        }
        self._ids: list[int] = []
        self._text: list[str] = []
        self._opening: Mapping[str, Any] = {}  # facts of the first piece, until they were sent with every hash

    def first(self) -> bytes | None:
        """The chunk that opens a stream. A completion has none unless ids are asked for."""
        if not self._chat and not self._answer.request.return_token_ids:
            return None
        delta = {"role": "assistant", "content": ""} if self._chat else ""
        extra = {"prompt_token_ids": self._answer.ids} if self._answer.request.return_token_ids else {}
        return sse(self._chunk(delta, None, (), extra))

    def piece(self, chunk: Chunk) -> bytes | None:
        """A chunk of text; None if there is nothing to say (half a character, and nobody asked for ids)."""
        self._ids.extend(chunk.token_ids)
        self._text.append(chunk.text)
        asked = self._answer.request.return_token_ids
        if not chunk.text and not (asked and chunk.token_ids):
            return None
        extra = self._replay_facts(chunk) if asked and not chunk.finish_reason else {}
        return sse(self._chunk({"content": chunk.text} if self._chat else chunk.text, None, chunk.token_ids, extra))

    def _replay_facts(self, chunk: Chunk) -> dict[str, Any]:
        """With the first piece, so that whoever stops before the end knows all the same what a replay needs; once more
        with the first piece after the weights were hashed, if that took longer.
        """
        engine = self._host.engine
        identified = engine is None or engine.identified
        opening = chunk.facts or (self._opening if identified else {})
        self._opening = {} if identified else chunk.facts or self._opening
        return {"glmchat": self._identity(opening)} if opening else {}

    def last(self, chunk: Chunk) -> bytes:
        """The chunk with the finish reason, and what is known of the answer; with include_usage that comes apart."""
        facts = self._facts(chunk)
        delta: Any = {} if self._chat else ""
        if not self._answer.request.include_usage:
            return sse(self._chunk(delta, chunk.finish_reason, (), facts)) + b"data: [DONE]\n\n"
        closing = self._chunk(delta, chunk.finish_reason, (), {"usage": None})
        usage = {**self._kind(".chunk"), "choices": [], **facts}
        return sse(closing) + sse(usage) + b"data: [DONE]\n\n"

    def whole(self, last: Chunk) -> dict[str, Any]:
        text = "".join(self._text)
        choice: dict[str, Any] = {"index": 0, "finish_reason": last.finish_reason, "logprobs": None}
        choice.update({"message": {"role": "assistant", "content": text}} if self._chat else {"text": text})
        data: dict[str, Any] = {**self._kind(""), "choices": [choice], **self._facts(last)}
        if self._answer.request.return_token_ids:
            choice["token_ids"] = self._ids
            data["prompt_token_ids"] = self._answer.ids
        return data

    def _kind(self, suffix: str) -> dict[str, Any]:
        name = "chat.completion" + suffix if self._chat else "text_completion"
        return {"id": self._head["id"], "object": name, **self._head}

    def _chunk(self, delta: Any, finish: str | None, ids: Any, extra: Mapping[str, Any]) -> dict[str, Any]:
        choice = {"index": 0, ("delta" if self._chat else "text"): delta, "logprobs": None, "finish_reason": finish}
        if self._answer.request.return_token_ids:
            choice["token_ids"] = list(ids)
        return {**self._kind(".chunk"), "choices": [choice], **extra}

    def _identity(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The `glmchat` object: what answers, and how."""
        host = self._host
        engine = dict(host.engine.facts()) if host.engine else {}
        return {
            **engine,
            "seed": facts.get("seed"),
            "model": host.model,
            "revision": host.revision,
            "quant": host.quant or engine.get("quant"),
            "adapters": [
                {"name": n, "scale": s, **({"forced": True} if n in host.forced else {})}
                for n, s in self._answer.adapters.items()
            ],
            "adapter_hashes": {name: host.digests.get(name) for name in self._answer.adapters},
            "cached_n": facts.get("cached_n"),
            "passes": facts.get("passes"),
            "sampling": self._answer.request.sampling.to_json(),
            # Always None, as nothing speculates (docs/decisions/0013); kept because every record of an answer has it.
            "speculation": None,
            "stopped_by": facts.get("stopped_by"),
            "system_prepended": self._system_prepended(),
            "threads": engine.get("threads"),
            "kernel": engine.get("kernel"),
            "load_ms": host.load_ms,
        }

    def _system_prepended(self) -> bool:
        engine, messages = self._host.engine, self._answer.request.messages
        return engine is not None and messages is not None and engine.prepends_system(messages)

    def _facts(self, chunk: Chunk) -> dict[str, Any]:
        facts = dict(chunk.facts)
        prompt, cached = len(self._answer.ids), facts.get("cached_n")
        made = facts.get("predicted_n", len(self._ids))
        return {
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": made,
                "total_tokens": prompt + made,
                "prompt_tokens_details": None if cached is None else {"cached_tokens": cached},
            },
            "timings": {
                # llama-server counts the tokens it read, not those it still knew: the speed is prompt_n / prompt_ms.
                "prompt_n": None if facts.get("prompt_n") is None else facts["prompt_n"] - (cached or 0),
                "cache_n": cached,
                **{name: facts.get(name) for name in ("prompt_ms", "predicted_n", "predicted_ms")},
            },
            "glmchat": self._identity(facts),
        }


def models_json(host: Host) -> dict[str, Any]:
    """The base first, then the adapters that a request may name as its model (vLLM's form: `parent` is the base)."""
    context = host.engine.context if host.engine else None
    family = host.engine.family if host.engine else None
    facts = host.engine.facts() if host.engine else {}

    def row(name: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": host.created,
            "owned_by": "glmchat",
            "root": host.model,
            "parent": parent,
            "max_model_len": context,
            "family": family,
            "revision": host.revision,
            "quant": host.quant,
            **{name: facts[name] for name in ("device", "device_reason") if name in facts},
        }

    return {"object": "list", "data": [row(host.model, None), *(row(name, host.model) for name in host.adapters())]}
