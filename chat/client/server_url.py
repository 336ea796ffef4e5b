"""The address of a server as people type it: with or without a scheme, with or without /v1."""

from __future__ import annotations

import re
from urllib.parse import urlsplit, urlunsplit

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line

_KNOWN_TAILS = ("/chat/completions", "/completions", "/models", "/chat")


def api_url(text: str) -> str:
    """`gpu-box:8000`, `http://gpu-box:8000/`, `…/v1`, `…/v1/chat/completions` -> `http://gpu-box:8000/v1`.

    A path that ends in a version of its own (`/api/v3`, `/compatible-mode/v1`) is left alone. Raises Usage.
    """
    given = text.strip()
    address = given if "://" in given else f"http://{given}"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or re.search(r"\s", address):
        raise Usage(
            tr("{given!r} is no server address", given=one_line(given)),
            hint=tr("for example http://gpu-box:8000/v1"),
            code="server.url",
        )
    path = parts.path.rstrip("/")
    for tail in _KNOWN_TAILS:
        path = path.removesuffix(tail)
    if not re.search(r"/v\d+[a-z0-9]*$", path):
        path += "/v1"
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))
