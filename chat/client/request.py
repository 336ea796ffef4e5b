"""What is sent for an answer: OpenAI's fields to everybody, extensions to those who know them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from glmchat.core.messages import Message, Sampling

EXTENSIONS = ("top_k", "min_p", "repetition_penalty", "ignore_eos")  # vLLM's and llama-server's, not OpenAI's
_NEUTRAL = Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)


def sampling_fields(sampling: Sampling, *, ours: bool, asked: Collection[str] | None = None) -> dict[str, Any]:
    """OpenAI's fields to everybody; the extensions to our own server, to others only where they say something.

    asked: the fields that somebody set; the server decides the others. None: all of them are meant.
    """
    fields: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    for name in ("temperature", "top_p", "max_tokens", "seed"):
        if (asked is None or name in asked) and (value := getattr(sampling, name)) is not None:
            fields[name] = value
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    for name in EXTENSIONS:
        value = getattr(sampling, name)
        if name in asked if asked is not None else ours or value != getattr(_NEUTRAL, name):
            fields[name] = value
    if ours:
        fields["return_token_ids"] = True
    return fields


def adapter_fields(adapters: Sequence[tuple[str, float]] | None, *, ours: bool) -> dict[str, Any]:
    """adapters: (store name, scale). None leaves them to the server; an empty list means none, where that is known."""
    if adapters is None or not (adapters or ours):
        return {}
    return {"adapters": [{"name": name, "scale": scale} for name, scale in adapters]}


def messages_json(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{**m.to_json(), "content": whole_text(m.content)} for m in messages]


def whole_text(text: str) -> str:
    """Half a surrogate pair (a terminal may hand one over) is no character and cannot be sent."""
    return text.encode("utf-8", "replace").decode()
