"""What a request is made of: the server's address, the body that it is sent, and a way to stop it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.messages import Message, Sampling
from glmchat.core.text import whole_text


class Stop:
    """Stops one answer from any thread, also while nothing comes: the socket is shut down under the reader.

    Use it once. `stream` then ends with `Finished(finish_reason="cancelled")`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_set = False
        self._socket: socket.socket | None = None

    @property
    def is_set(self) -> bool:
        return self._is_set

    def now(self) -> None:
        with self._lock:
            self._is_set = True
            self._shut()

    def watch(self, event: str, info: Mapping[str, Any]) -> None:
        """httpcore's trace hook: remembers the socket as soon as there is one."""
        # TLS wraps the socket in another one, and a proxy may do so twice: the last one is the one that is read.
        if event.endswith((".connect_tcp.complete", ".connect_unix_socket.complete", ".start_tls.complete")):
            raw = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._socket = raw
                if self._is_set:
                    self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # closed already
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # an SSLSocket's own would talk TLS first


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
    if sampling.template_variables:
        fields["chat_template_kwargs"] = dict(sampling.template_variables)
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


def header_key(key: str | None) -> str | None:
    """A key as it can stand in a header: a file's last newline is no part of it. Raises Usage, without the key."""
    key = key.strip() if key else None
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise Usage(
            tr("the key contains characters that do not belong in a key"),
            hint=tr("check OPENAI_API_KEY"),
            code="server.key_form",
        )
    return key or None
