"""Servers that answer in place of an engine: their addresses, their keys, and those that the config names."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from glmchat.core.errors import Usage
from glmchat.core.files import read_given
from glmchat.core.language import tr
from glmchat.core.locations import user_path
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
            tr("{given!r} is not a server address", given=one_line(given)),
            hint=tr("for example http://gpu-box:8000/v1"),
            code="server.url",
        )
    path = parts.path.rstrip("/")
    for tail in _KNOWN_TAILS:
        path = path.removesuffix(tail)
    if not re.search(r"/v\d+[a-z0-9]*$", path):
        path += "/v1"
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


@dataclass(frozen=True, slots=True)
class Server:
    """`[servers.NAME]` of the config. url: of its API. key_file: its first line is the key. model: the usual one."""

    name: str
    url: str
    key_file: str | None = None
    model: str | None = None

    def read_key(self) -> str | None:
        """Raises Usage for a file that cannot be read, or that others may read."""
        if self.key_file is None:
            return None
        if (problem := self.key_problem()) is not None:
            raise problem
        return read_key(Path(self.key_file), None)

    def key_problem(self) -> Usage | None:
        """A key that other users of this machine can read is none."""
        if self.key_file is None:
            return None
        path = user_path(Path(self.key_file))
        try:
            mode = path.stat().st_mode
        except OSError as error:
            return _unreadable(self.key_file, str(error.strerror))
        if not stat.S_ISREG(mode) or not mode & 0o077:
            return None
        return Usage(
            tr("{path} can be read by others", path=one_line(str(path))),
            hint=f"chmod 600 {one_line(str(path))}",
            code="server.key_mode",
        )


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
_FIELDS = ("url", "key_file", "model")


def parse_servers(data: Any, where: str) -> dict[str, Server]:
    """The config's `servers` table. Raises Usage that names the entry at fault; a key never stands in it."""
    if not isinstance(data, dict):
        raise _wrong(where, "servers", tr('[servers.box] with url = "http://gpu-box:8000/v1"'))
    servers = {}
    for name, entry in data.items():
        shown = f"servers.{one_line(str(name), 40)}"
        if not _NAME.fullmatch(name):
            raise _wrong(where, shown, tr("a name has letters, digits, - and _"))
        if not isinstance(entry, dict) or "url" not in entry:
            raise _wrong(where, shown, tr('[servers.box] with url = "http://gpu-box:8000/v1"'))
        for field, value in entry.items():
            if field not in _FIELDS:
                hint = tr("known names: {names}", names=", ".join(_FIELDS))
                if "key" in field.lower():
                    hint = tr('a key stands in a file of its own: key_file = "PATH"')
                raise _wrong(where, f"{shown}.{one_line(field, 40)}", hint)
            if not isinstance(value, str) or not value.strip():
                raise _wrong(where, f"{shown}.{field}", tr("write a text in quotes"))
        try:
            url = api_url(entry["url"])
        except Usage as error:
            raise _wrong(where, f"{shown}.url", error.hint) from None
        if "@" in urlsplit(url).netloc:
            raise _wrong(where, f"{shown}.url", tr('a key stands in a file of its own: key_file = "PATH"'))
        servers[name] = Server(name, url, entry.get("key_file"), entry.get("model"))
    return servers


def _wrong(where: str, what: str, hint: str) -> Usage:
    return Usage(tr("{where}: {key} is not right", where=where, key=what), hint=hint, code="config.server")


def find_server(text: str, servers: Mapping[str, Server]) -> Server | None:
    """The server of that name; None for an address. Raises Usage for a bare word where the config names others."""
    if text in servers:
        return servers[text]
    if servers and _NAME.fullmatch(text) and text != "localhost":
        raise Usage(
            tr("the config has no server {name}", name=one_line(text, 40)),
            hint=tr(
                "it has: {names}; or give an address, for example http://gpu-box:8000/v1", names=", ".join(servers)
            ),
            code="server.name",
        )
    return None


_LARGEST_KEY = 64 * 1024  # bytes


def read_key(file: Path | None, environ_key: str | None) -> str | None:
    """The key for a server: the first line of a file, else from the environment. Raises Usage. Never shown."""
    if file is None:
        return environ_key or None
    try:
        lines = read_given(user_path(file), _LARGEST_KEY).decode("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise _unreadable(str(file), str(reason)) from None
    if not lines:
        raise Usage(
            tr("the key file {path} is empty", path=str(file)),
            hint=tr("the file must contain one line with the key, and you must be able to read it"),
            code="server.key_file",
        )
    return lines[0]


def _unreadable(path: str, reason: str) -> Usage:
    return Usage(
        tr("the key file {path} cannot be read: {reason}", path=one_line(path), reason=reason),
        hint=tr("the file must contain one line with the key, and you must be able to read it"),
        code="server.key_file",
    )
