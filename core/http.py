"""Every HTTP client is made here: which proxy it takes, how long it waits, what it trusts."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from glmchat.core.errors import GlmchatError, NetworkFailed, Usage
from glmchat.core.http_bounds import address_of
from glmchat.core.language import tr
from glmchat.core.text import one_line

if TYPE_CHECKING:
    from types import TracebackType

    import httpx2

    from glmchat.core.http_bounds import Bounds

_SCHEMES = {"http": "http", "https": "https", "socks": "socks5", "socks5": "socks5", "socks5h": "socks5h"}
_NUMBER = re.compile(r"\[Errno -?\d+\] ")  # of an error of the system, which its words say too
_WITH_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


def is_loopback(host: str) -> bool:
    """True for localhost, *.localhost, 127.0.0.0/8, ::1 and the unspecified address, which connects to loopback."""
    address = address_of(host)
    return address is not None and (address.is_loopback or address.is_unspecified)


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
    match = _WITH_SCHEME.match(text)
    scheme = match.group(1).lower() if match else bare
    rest = text[match.end() :] if match else text
    hint = tr("for example {name}=http://proxy.example:3128; unset {name} to use no proxy", name=name)
    if scheme not in _SCHEMES:
        raise Usage(
            tr(
                "{name} is {value}: {scheme} proxies are not supported",
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
            tr("{name} is {value}, which is not a proxy address", name=name, value=repr(shown)),
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
        proxies: dict[str, tuple[str, str]] = {}
        for scheme in ("http", "https", "all", "socks"):
            for name in (f"{scheme}_proxy", f"{scheme.upper()}_PROXY"):
                if name == "HTTP_PROXY" and "REQUEST_METHOD" in environ:
                    continue
                if name in environ:  # an empty lower-case value switches the upper-case one off
                    if environ[name].strip():
                        proxies[scheme] = (name, environ[name])
                    break
        listed = environ.get("no_proxy", environ.get("NO_PROXY", ""))
        return ProxyRules(proxies, tuple(part for part in re.split(r"[,\s]+", listed.lower()) if part))

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
    if match := re.fullmatch(r"(\[[^\]]*\]|[^:]*):(\d+)", entry):
        entry = match.group(1)
        if port != int(match.group(2)):
            return False
    entry = entry.strip("[]")
    try:
        return ipaddress.ip_address(name) in ipaddress.ip_network(entry, strict=False)
    except (ValueError, TypeError):  # one of the two is a name
        pass
    entry = entry.removeprefix("*").strip(".")
    return bool(entry) and (name == entry or name.endswith("." + entry))


DEFAULT_TIMEOUT = 30.0  # seconds without a byte; connecting gets at most CONNECT_TIMEOUT
CONNECT_TIMEOUT = 10.0


def make_client(
    base_url: str | None = None,
    *,
    uds: str | None = None,
    timeout: float | httpx2.Timeout | None = DEFAULT_TIMEOUT,
    headers: Mapping[str, str] | None = None,
    follow_redirects: bool = False,
    environ: Mapping[str, str] | None = None,
    bounds: Bounds | None = None,
) -> httpx2.Client:
    """A client that honours the proxy variables, except for loopback and Unix sockets. Thread-safe; close it.

    base_url: joined with relative request URLs; with `uds` it defaults to "http://localhost".
    uds:      path of a Unix socket; every request goes there, no proxy, no TLS.
    timeout:  seconds that may pass without a byte (None: for ever), or an httpx2.Timeout.
    environ:  where the proxy variables are read, os.environ by default.
    bounds:   what all its requests may cost together; nothing compressed is asked for then.
    """
    import httpx2

    from glmchat import __version__

    if not isinstance(timeout, httpx2.Timeout):
        connect = CONNECT_TIMEOUT if timeout is None else min(timeout, CONNECT_TIMEOUT)
        timeout = httpx2.Timeout(timeout, connect=connect)
    routes = _Routes(uds, ProxyRules.from_environment(environ), bounds)
    plain = {"Accept-Encoding": "identity"} if bounds else {}
    return httpx2.Client(
        base_url=base_url or ("http://localhost" if uds else ""),
        headers={"User-Agent": f"glmchat/{__version__}", **plain, **(headers or {})},
        timeout=timeout,
        follow_redirects=follow_redirects,
        transport=cast("httpx2.BaseTransport", routes),
        trust_env=False,  # all that the environment says is read in _Routes
    )


class _Routes:
    """An httpx2 transport that picks a connection pool per request: the Unix socket, direct, or a proxy."""

    def __init__(self, uds: str | None, rules: ProxyRules, bounds: Bounds | None = None) -> None:
        self._uds, self._rules, self._bounds = uds, rules, bounds
        self._pools: dict[tuple[str | None, bool], httpx2.HTTPTransport] = {}
        self._lock = threading.Lock()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        proxy = None if self._uds else self._rules.choose(url.scheme, url.host, url.port)
        send = self._pool(proxy, tls=url.scheme == "https").handle_request
        if self._uds:
            try:
                return send(request)
            except BaseException as error:
                _close_socket(error)
                raise
        return self._bounds.send(request, send) if self._bounds else send(request)

    def _pool(self, proxy: str | None, *, tls: bool) -> httpx2.HTTPTransport:
        import httpx2

        with self._lock:
            if (proxy, tls) not in self._pools:
                # An empty context trusts no certificate: right for plain http, where none is ever looked at.
                verify = trusted_certificates() if tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                self._pools[proxy, tls] = httpx2.HTTPTransport(verify=verify, proxy=proxy, uds=self._uds)
            return self._pools[proxy, tls]

    def close(self) -> None:
        with self._lock:
            for pool in self._pools.values():
                pool.close()
            self._pools.clear()

    def __enter__(self) -> _Routes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _close_socket(error: BaseException | None) -> None:
    """httpcore2 leaves a Unix socket open to which nobody listens (`connect_unix_socket`): only its frame knows it."""
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_name == "connect_unix_socket" and "sock" in frame.f_locals:
                frame.f_locals["sock"].close()
        error = error.__cause__ or error.__context__


def trusted_certificates() -> ssl.SSLContext:
    """What an https connection trusts: the system's certificates, or those of SSL_CERT_FILE and SSL_CERT_DIR.

    Raises Usage that names the variable whose file cannot be read.
    """
    import httpx2

    try:
        return httpx2.create_ssl_context()
    except OSError as error:  # ssl.SSLError is one
        name = next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), "SSL_CERT_FILE")
        reason = str(error) if isinstance(error, ssl.SSLError) else error.strerror or str(error)
        raise Usage(
            tr(
                "{name} is {value}, which holds no certificates: {reason}",
                name=name,
                value=repr(one_line(os.environ.get(name, ""))),
                reason=one_line(reason, 100),
            ),
            hint=tr("name a file of PEM certificates, or unset {name}", name=name),
            code="certificates.unreadable",
        ) from None


def _certificate_hint(detail: str) -> str:
    """What helps against a certificate that is not accepted, by what is wrong with it."""
    if "mismatch" in detail or "doesn't match" in detail or "not valid for" in detail:
        return tr("the certificate is of another server: check the address")
    if "expired" in detail or "not yet valid" in detail:
        return tr("check this machine's clock; else the server's certificate must be renewed")
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if os.environ.get(name) and not os.environ.get("SSL_CERT_FILE"):
            return tr("{name} is not read here: set SSL_CERT_FILE to the same file", name=name)
    return tr("behind a company proxy, set SSL_CERT_FILE to the company's certificates")


def network_error(error: Exception, url: str = "", *, code: str = "network", hint: str = "") -> GlmchatError:
    """An httpx2 exception as one sentence and a hint. A GlmchatError comes back as it is.

    url: what was asked; shown as host only, so that neither a signed query nor a password can leak.
    hint: what helps where nothing was downloaded.
    """
    import httpx2

    if isinstance(error, GlmchatError):
        return error
    host = host_of(url)
    detail = one_line(_NUMBER.sub("", str(error)) or type(error).__name__, 160)
    proxy = _proxy_for(url)
    through = tr(" through the proxy {proxy}", proxy=proxy) if proxy else ""
    hint = hint or tr("check the connection, then run the same command again: the files downloaded so far are kept")
    match error:
        case httpx2.ProxyError():
            words = tr("the proxy {proxy} refused: {reason}", proxy=proxy or "?", reason=detail)
            hint = tr("check HTTPS_PROXY, ALL_PROXY and NO_PROXY")
        case httpx2.ConnectTimeout():
            words = tr("{host} did not answer within {n} seconds", host=host, n=round(CONNECT_TIMEOUT)) + through
        case httpx2.TimeoutException():
            words = tr("{host} stopped sending", host=host) + through
        case httpx2.ConnectError() if "certificate" in detail.lower():
            words = tr("the identity of {host} could not be verified: {reason}", host=host, reason=detail)
            words += through
            hint = _certificate_hint(detail)
        case httpx2.ConnectError():
            words = tr("cannot reach {host}{through}: {reason}", host=host, through=through, reason=detail)
            if proxy:
                hint = tr("check HTTPS_PROXY, ALL_PROXY and NO_PROXY")
        case httpx2.InvalidURL() | httpx2.UnsupportedProtocol():
            words, hint = (
                tr("{url} is not a valid address: {reason}", url=repr(one_line(without_password(url))), reason=detail),
                tr("it starts with https:// or http://"),
            )
        case _:
            words = tr(
                "the connection to {host} was lost{through}: {reason}", host=host, through=through, reason=detail
            )
    return NetworkFailed(words, hint=hint, code=code)


def host_of(url: str) -> str:
    """host[:port] of a URL, without user, password, path and query."""
    from urllib.parse import urlsplit

    try:
        return one_line(urlsplit(url).netloc.rpartition("@")[2]) or "the server"
    except ValueError:
        return "the server"


def _proxy_for(url: str) -> str | None:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        chosen = ProxyRules.from_environment().choose(parts.scheme, parts.hostname or "localhost", parts.port)
    except (ValueError, GlmchatError):  # only decorates a message about something else
        return None
    return without_password(chosen) if chosen else None
