"""The one place that makes HTTP clients, and the one that puts their failures into words.

httpx2 left to itself sends 127.0.0.1 through HTTP_PROXY, refuses GNOME's `socks://` with a ValueError and raises for a
broken proxy variable before any request is made. Here the route is chosen per request (so a redirect is routed afresh),
by `core.proxies`. TLS is set up when the first https request needs it: loading the certificates takes 0.1 s.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from glmchat.core.errors import GlmchatError, NetworkFailed
from glmchat.core.language import tr
from glmchat.core.proxies import ProxyRules, without_password
from glmchat.core.text import one_line

if TYPE_CHECKING:
    from types import TracebackType

    import httpx2

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
) -> httpx2.Client:
    """A client that honours the proxy variables, except for loopback and Unix sockets. Thread-safe; close it.

    base_url: joined with relative request URLs; with `uds` it defaults to "http://localhost".
    uds:      path of a Unix socket; every request goes there, no proxy, no TLS.
    timeout:  seconds that may pass without a byte (None: for ever), or an httpx2.Timeout.
    environ:  where the proxy variables are read, os.environ by default.
    """
    import httpx2

    from glmchat import __version__

    if not isinstance(timeout, httpx2.Timeout):
        connect = CONNECT_TIMEOUT if timeout is None else min(timeout, CONNECT_TIMEOUT)
        timeout = httpx2.Timeout(timeout, connect=connect)
    routes = _Routes(uds, ProxyRules.from_environment(environ))
    return httpx2.Client(
        base_url=base_url or ("http://localhost" if uds else ""),
        headers={"User-Agent": f"glmchat/{__version__}", **(headers or {})},
        timeout=timeout,
        follow_redirects=follow_redirects,
        transport=cast("httpx2.BaseTransport", routes),
        trust_env=False,  # all that the environment says is read in _Routes
    )


class _Routes:
    """An httpx2 transport that picks a connection pool per request: the Unix socket, direct, or a proxy."""

    def __init__(self, uds: str | None, rules: ProxyRules) -> None:
        self._uds = uds
        self._rules = rules
        self._pools: dict[tuple[str | None, bool], httpx2.HTTPTransport] = {}
        self._lock = threading.Lock()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        proxy = None if self._uds else self._rules.choose(url.scheme, url.host, url.port)
        return self._pool(proxy, tls=url.scheme == "https").handle_request(request)

    def _pool(self, proxy: str | None, *, tls: bool) -> httpx2.HTTPTransport:
        import httpx2

        with self._lock:
            if (proxy, tls) not in self._pools:
                # An empty context trusts no certificate: right for plain http, where none is ever looked at.
                verify: ssl.SSLContext | bool = True if tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
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


def network_error(error: Exception, url: str = "", *, code: str = "network") -> GlmchatError:
    """An httpx2 exception as one sentence and a hint. A GlmchatError comes back as it is.

    url: what was asked; shown as host only, so that neither a signed query nor a password can leak.
    """
    import httpx2

    if isinstance(error, GlmchatError):
        return error
    host = host_of(url)
    detail = one_line(str(error) or type(error).__name__, 160)
    proxy = _proxy_for(url)
    through = tr(" through the proxy {proxy}", proxy=proxy) if proxy else ""
    hint = tr("check the connection, then run the same command again: what is here already is kept")
    match error:
        case httpx2.ProxyError():
            words = tr("the proxy {proxy} refused: {reason}", proxy=proxy or "?", reason=detail)
            hint = tr("check HTTPS_PROXY, ALL_PROXY and NO_PROXY")
        case httpx2.ConnectTimeout():
            words = tr("{host} did not answer within {n} seconds", host=host, n=round(CONNECT_TIMEOUT)) + through
        case httpx2.TimeoutException():
            words = tr("{host} stopped sending", host=host) + through
        case httpx2.ConnectError() if "certificate" in detail.lower():
            words = tr("{host} cannot prove who it is: {reason}", host=host, reason=detail)
            hint = tr("behind a company proxy, set SSL_CERT_FILE to the company's certificates")
        case httpx2.ConnectError():
            words = tr("cannot reach {host}{through}: {reason}", host=host, through=through, reason=detail)
            if proxy:
                hint = tr("check HTTPS_PROXY, ALL_PROXY and NO_PROXY")
        case httpx2.InvalidURL() | httpx2.UnsupportedProtocol():
            words, hint = (
                tr("{url} is no address: {reason}", url=repr(one_line(without_password(url))), reason=detail),
                tr("it starts with https:// or http://"),
            )
        case _:
            words = tr("the connection to {host} broke{through}: {reason}", host=host, through=through, reason=detail)
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
