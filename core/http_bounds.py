"""What a server may cost that is asked for a list: time in all, bytes in all, requests in all.

A timeout of httpx counts from byte to byte, and a redirect, a next page or a compressed answer costs a server nothing.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from glmchat.core.errors import Hostile, Interrupted, NetworkFailed
from glmchat.core.language import tr
from glmchat.core.text import one_line

if TYPE_CHECKING:
    import httpx2

    Send = Callable[[httpx2.Request], httpx2.Response]

T = TypeVar("T")
_LOOK_SECONDS = 0.1  # between two looks whether somebody still waits


def result_of(work: Callable[[], T], given_up: Callable[[], bool], seconds: float | None = None) -> T:
    """`work()`, in a thread that is left behind as soon as nobody waits for it any more.

    A name that is looked up and a connection that is being made heed nobody, and a process does not wait for such a
    thread when it ends. Raises what `work` raised, Interrupted where it was given up, TimeoutError after `seconds`.
    """
    ended: SimpleQueue[tuple[T, None] | tuple[None, BaseException]] = SimpleQueue()

    def run() -> None:
        try:
            ended.put((work(), None))
        except BaseException as error:  # noqa: BLE001 (raised by whoever waits)
            ended.put((None, error))

    threading.Thread(target=run, name="question", daemon=True).start()
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        if given_up():
            raise Interrupted(tr("stopped"), hint=tr("try again at any time"))
        if end is not None and time.monotonic() > end:
            raise TimeoutError
        with suppress(Empty):
            result, error = ended.get(timeout=_LOOK_SECONDS)
            if error is not None:
                raise error
            return result  # type: ignore[return-value]


class Bounds:
    """Of one client. seconds and size (bytes, unpacked) count over all its requests.

    Credentials stay with the host that was asked first, and nothing leads from another machine to this one.
    """

    def __init__(self, *, seconds: float = 120.0, size: int = 64 * 2**20, requests: int = 1000) -> None:
        self._seconds, self._size, self._requests = seconds, size, requests
        self._end = time.monotonic() + seconds
        self._first: str | None = None
        self._sockets: list[socket.socket] = []
        self._late = False

    def send(self, request: httpx2.Request, send: Send) -> httpx2.Response:
        """`send(request)` within the bounds. Raises NetworkFailed or Hostile; so does reading the body."""
        import httpx2

        host, left = request.url.host, self._end - time.monotonic()
        self._first = self._first or host
        self._requests -= 1
        if self._requests < 0:
            raise self._endless(host)
        if left <= 0:
            raise self._slow(host)
        if host != self._first:
            request.headers.pop("authorization", None)
            if is_here(host) and not is_here(self._first):
                raise Hostile(
                    tr("{host} redirects to this machine: {target}", host=one_line(self._first), target=one_line(host)),
                    hint=tr("no honest server does: check --endpoint and HF_ENDPOINT"),
                    code="network.redirect",
                )
        limit = threading.Timer(left, self._hang_up)
        limit.daemon = True
        limit.start()
        request.extensions = {**request.extensions, "trace": self._watch}
        try:
            response = send(request)
        except BaseException as error:
            limit.cancel()
            if self._late and isinstance(error, httpx2.HTTPError):
                raise self._slow(host) from None
            raise
        return self._bounded(response, host, limit)

    def _bounded(self, response: httpx2.Response, host: str, limit: threading.Timer) -> httpx2.Response:
        import httpx2

        coding = response.headers.get("content-encoding", "").strip().lower()
        headers = [(k, v) for k, v in response.headers.raw if not coding or k.lower() != b"content-encoding"]
        unpack: Callable[[bytes], Iterator[bytes]] = _plain
        if coding in ("gzip", "x-gzip", "deflate"):
            unpack = _Inflating().unpack
        elif coding not in ("", "identity"):
            limit.cancel()
            response.close()
            raise Hostile(
                tr("{host} compresses its answer as {coding}, which was not asked for", host=host, coding=coding[:40]),
                hint=tr("check --endpoint and HF_ENDPOINT"),
                code="network.coding",
            )
        return httpx2.Response(
            response.status_code,
            headers=headers,
            stream=_counted(self, response, host, limit, unpack),
            extensions=response.extensions,
        )

    def take(self, count: int, host: str) -> None:
        self._size -= count
        if self._size < 0:
            raise self._endless(host)

    def check(self, host: str) -> None:
        if self._late:
            raise self._slow(host)

    def _slow(self, host: str) -> NetworkFailed:
        words = tr("{host} took more than {n} seconds for its answer", host=one_line(host), n=round(self._seconds))
        return NetworkFailed(words, hint=tr("try again later, or use another --endpoint"), code="network.slow")

    def _endless(self, host: str) -> NetworkFailed:
        words = tr("the answer of {host} does not end", host=one_line(host))
        return NetworkFailed(words, hint=tr("check --endpoint and HF_ENDPOINT"), code="network.endless")

    def _watch(self, event: str, info: Mapping[str, Any]) -> None:
        """httpcore's trace hook: remembers each socket as soon as there is one."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self._sockets.append(info["return_value"].get_extra_info("socket"))

    def _hang_up(self) -> None:
        self._late = True
        for one in self._sockets:
            with suppress(OSError):
                socket.socket.shutdown(one, socket.SHUT_RDWR)


def _counted(
    bounds: Bounds,
    response: httpx2.Response,
    host: str,
    limit: threading.Timer,
    unpack: Callable[[bytes], Iterator[bytes]],
) -> httpx2.SyncByteStream:
    """A body that is counted as it is read. httpx2 is imported by whoever makes a connection, so the class is here."""
    import httpx2

    class Counted(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            try:
                for part in response.iter_raw():
                    for piece in unpack(part):
                        bounds.take(len(piece), host)
                        yield piece
            except httpx2.HTTPError:
                bounds.check(host)
                raise
            bounds.check(host)  # a body without a length seems to end where it was cut

        def close(self) -> None:
            limit.cancel()
            response.close()

    return Counted()


def _plain(part: bytes) -> Iterator[bytes]:
    yield part


class _Inflating:
    """gzip or deflate, a piece at a time: a few bytes can hold gigabytes."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(wbits=47)  # either header

    def unpack(self, part: bytes) -> Iterator[bytes]:
        try:
            while part:
                yield self._inflate.decompress(part, 1 << 20)
                part = self._inflate.unconsumed_tail
        except zlib.error as error:
            import httpx2

            raise httpx2.DecodingError(str(error)) from None


def is_here(host: str) -> bool:
    """This machine, or the link-local addresses at which clouds tell secrets."""
    address = address_of(host)
    return address is not None and (address.is_loopback or address.is_unspecified or address.is_link_local)


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is written as, localhost and IPv4 within IPv6 included; None for any other name."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return ipaddress.IPv4Address("127.0.0.1")
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
