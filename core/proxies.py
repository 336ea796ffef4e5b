"""Which proxy a request goes through, read from the environment the way curl reads it, with the traps closed.

`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `SOCKS_PROXY` (lower case wins) name proxies, `NO_PROXY` the hosts
that need none. Loopback never goes through a proxy. `socks://`, which GNOME writes, means `socks5://`. A value that is
no address is reported when a request would need it, and not before: a broken ALL_PROXY must not stop a chat with a
local engine.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line

_SCHEMES = {"http": "http", "https": "https", "socks": "socks5", "socks5": "socks5", "socks5h": "socks5h"}
_WITH_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


def is_loopback(host: str) -> bool:
    """True for localhost, *.localhost, 127.0.0.0/8, ::1 and the unspecified address, which connects to loopback."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or address.is_unspecified or bool(mapped and mapped.is_loopback)


def without_password(url: str) -> str:
    """The same URL or proxy value with user and password hidden: safe for messages and logs."""
    return re.sub(r"(^|//)[^/@]*@", r"\1***@", url, count=1)


def normal_proxy(value: str, name: str, *, bare: str = "http") -> str:
    """`value` of the variable `name` as a URL that httpx2 takes.

    bare: the scheme of a value without one ("http" as in curl, "socks5" for SOCKS_PROXY).
    Raises Usage that names the variable and hides the password.
    """
    text = value.strip().strip("'\"")
    shown = one_line(without_password(text))
    found = _WITH_SCHEME.match(text)
    scheme = found.group(1).lower() if found else bare
    rest = text[found.end() :] if found else text
    hint = tr("for example {name}=http://proxy.example:3128; unset {name} to go without", name=name)
    if scheme not in _SCHEMES:
        raise Usage(
            tr(
                "{name} is {value}: there is no way to use a {scheme} proxy",
                name=name,
                value=repr(shown),
                scheme=one_line(scheme, 20),
            ),
            hint=hint,
            code="proxy.scheme",
        )
    url = f"{_SCHEMES[scheme]}://{rest}"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port  # .port raises ValueError outside 0-65535
    except ValueError:
        host, port = None, None
    if not host or port == 0 or not re.fullmatch(r"[\w.-]+|[0-9a-fA-F:.%]+", host) or re.search(r"[\s\x00-\x1f]", url):
        raise Usage(
            tr("{name} is {value}, which is no proxy address", name=name, value=repr(shown)),
            hint=hint,
            code="proxy.broken",
        )
    return url.rstrip("/")


@dataclass(frozen=True, slots=True)
class ProxyRules:
    """What the environment says; `choose` answers for one URL."""

    by_scheme: Mapping[str, tuple[str, str]]  # "http" | "https" | "all" | "socks" -> (variable, its raw value)
    exempt: tuple[str, ...]  # the entries of NO_PROXY

    @staticmethod
    def from_environment(environ: Mapping[str, str] | None = None) -> ProxyRules:
        """Read `*_proxy` and NO_PROXY. In a CGI process (REQUEST_METHOD) HTTP_PROXY is a request header: ignored."""
        environ = os.environ if environ is None else environ
        found: dict[str, tuple[str, str]] = {}
        for scheme in ("http", "https", "all", "socks"):
            for name in (f"{scheme}_proxy", f"{scheme.upper()}_PROXY"):
                if name == "HTTP_PROXY" and "REQUEST_METHOD" in environ:
                    continue
                if name in environ:  # an empty lower-case value switches the upper-case one off
                    if environ[name].strip():
                        found[scheme] = (name, environ[name])
                    break
        listed = environ.get("no_proxy", environ.get("NO_PROXY", ""))
        return ProxyRules(found, tuple(part for part in re.split(r"[,\s]+", listed.lower()) if part))

    def choose(self, scheme: str, host: str, port: int | None = None) -> str | None:
        """The proxy's URL for one request, or None for a direct connection. Raises Usage for a broken value."""
        if is_loopback(host) or self.is_exempt(host, port or {"http": 80, "https": 443}.get(scheme)):
            return None
        for key in (scheme, "all", "socks"):
            if key in self.by_scheme:
                name, value = self.by_scheme[key]
                return normal_proxy(value, name, bare="socks5" if key == "socks" else "http")
        return None

    def is_exempt(self, host: str, port: int | None) -> bool:
        """Does NO_PROXY name the host? "*", names (and what lies under them), addresses, networks; ":port" narrows."""
        name = host.strip("[]").rstrip(".").lower()
        return any(_covers(entry, name, port) for entry in self.exempt)


def _covers(entry: str, name: str, port: int | None) -> bool:
    entry = entry.rpartition("://")[2]
    if entry == "*":
        return True
    if found := re.fullmatch(r"(\[[^\]]*\]|[^:]*):(\d+)", entry):
        entry = found.group(1)
        if port != int(found.group(2)):
            return False
    entry = entry.strip("[]")
    try:
        return ipaddress.ip_address(name) in ipaddress.ip_network(entry, strict=False)
    except (ValueError, TypeError):  # one of the two is a name
        pass
    entry = entry.removeprefix("*").strip(".")
    return bool(entry) and (name == entry or name.endswith("." + entry))
