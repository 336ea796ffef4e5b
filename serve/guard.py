"""Who may ask: a key, a Host of ours, no web page behind it, and JSON.

On a shared machine loopback is as public as the network, and a web page in the user's own browser can post to it
(with a foreign Origin, or a foreign Host after DNS rebinding). A Unix socket of mode 0600 needs no key.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from glmchat.serve.render import to_bytes

_TYPES = {401: "authentication_error", 403: "permission_error", 415: "invalid_request_error"}


def refusal(status: int, code: str, message: str, hint: str) -> Response:
    body = {"error": {"code": code, "message": message, "hint": hint, "exit": 1, "type": _TYPES[status], "param": None}}
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return Response(to_bytes(body), status, headers, "application/json")


class Guard:
    """ASGI middleware. key None: none is asked for. hosts None: any Host (a Unix socket has no meaningful one)."""

    def __init__(self, app: ASGIApp, key: str | None, hosts: Iterable[str] | None) -> None:
        self._app = app
        self._key = None if key is None else key.encode()
        self._hosts = None if hosts is None else frozenset(h.lower() for h in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        response = self._refused(scope, Headers(scope=scope))
        await (response or self._app)(scope, receive, send)

    def _refused(self, scope: Scope, headers: Headers) -> Response | None:
        if "origin" in headers:
            return refusal(
                403, "serve.origin", "requests of web pages are refused", "call the API from a program, not from a page"
            )
        if self._hosts is not None and not self._own_host(headers.getlist("host")):
            return refusal(
                403,
                "serve.host",
                "the Host header names another machine",
                "glmchat serve --allow-host NAME admits a name",
            )
        given = headers.getlist("authorization")
        if self._key is not None and not self._has_key(given):
            words = "this key is wrong" if given else "a key is needed"
            return refusal(401, "serve.key", words, "send it as `Authorization: Bearer KEY`; glmchat serve printed it")
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return refusal(
                    415, "request.content_type", "the body must be JSON", "send `Content-Type: application/json`"
                )
        return None

    def _own_host(self, given: list[str]) -> bool:
        """An address as such is harmless: a page can only rebind a *name* to this machine."""
        if len(given) != 1 or self._hosts is None:
            return False
        host = given[0].strip().lower()
        if host.startswith("["):
            name = host[1:].partition("]")[0]
        else:
            name = host.rpartition(":")[0] if ":" in host else host
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _has_key(self, given: list[str]) -> bool:
        if len(given) != 1 or self._key is None:
            return False
        scheme, _, key = given[0].partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), self._key)


def own_names(allowed: Iterable[str] = ()) -> set[str]:
    """Names by which clients may call this machine."""
    return {"localhost", socket.gethostname(), *allowed}
