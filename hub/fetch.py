"""One request for one file, and what the answer means.

A mirror may answer a Range request with the whole file, with another range, with a web page, with a redirect to a
store elsewhere, or with numbers that are not true. Here an answer becomes a `Reply` whose bytes can be trusted to lie
where it says, or one of two verdicts: `Refused` (this source will not do for this file) and `Broken` (it may do in a
moment).
"""

from __future__ import annotations

import contextlib
import email.utils
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urljoin, urlsplit
from urllib.request import url2pathname

from glmchat.core.errors import Hostile
from glmchat.core.files import open_file
from glmchat.core.http import host_of, network_error
from glmchat.core.http_bounds import is_here
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.hub.file_request import Candidate
from glmchat.hub.safe_paths import inside
from glmchat.hub.store import BLOCK

if TYPE_CHECKING:
    import httpx2

Why = Literal["missing", "denied", "wrong", "html", "untrusted"]
LONGEST_WAIT = 300.0  # seconds; a hub that asks for more is an answer for the user, not a pause
_MAX_REDIRECTS = 8
_LARGE = 8_000_000  # bytes; from here on a body is worth a connection of its own
_READ = 256 * 1024  # bytes a read may bring; more does not help and costs fresh memory each time


class Refused(Exception):
    """This source will not do for this file, however often it is asked."""

    def __init__(self, reason: str, why: Why, *, for_token: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.why = reason, why
        self.for_token = for_token  # it was the token that was refused: without one the file may be public


class Broken(Exception):
    """The connection or the server failed; another time it may work. `retry_after` in seconds, if it said so."""

    def __init__(
        self, reason: str, *, retry_after: float | None = None, stalled: bool = False, unreached: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason, self.retry_after, self.stalled = reason, retry_after, stalled
        self.unreached = unreached  # no connection was made at all


@dataclass(frozen=True, slots=True)
class Reply:
    """Bytes of a file from `start` on. total: its whole size, if the server says; etag: strong, unquoted, or None."""

    start: int
    total: int | None
    chunks: Iterator[bytes]
    etag: str | None
    linked_etag: str | None  # the hub's own name for the content: sha256 or git blob id
    complete: bool = False  # 416 for a file that is all here


@contextlib.contextmanager
def open_reply(
    client: httpx2.Client,
    candidate: Candidate,
    offset: int,
    *,
    size: int | None,
    if_range: str | None,
    watch: Callable[[httpx2.Response], contextlib.AbstractContextManager[None]],
) -> Iterator[Reply]:
    """Ask `candidate` for the bytes from `offset` on. Raises Refused or Broken; reading the chunks may raise Broken.

    size:     the known size, which decides whether a web page is what was asked for.
    if_range: the ETag that what is here belongs to, when nothing else can prove it.
    watch:    keeps the response where a cancel can find and close it.
    """
    if urlsplit(candidate.url).scheme == "file":
        with _open_local(candidate, offset) as reply:
            yield reply
        return
    headers = {"accept-encoding": "identity"}
    if offset:
        headers["range"] = f"bytes={offset}-"
        if if_range:
            headers["if-range"] = f'"{if_range}"'
    response, hub_headers = _follow(client, candidate, headers)
    try:
        with watch(response):
            yield _understand(response, hub_headers, candidate, offset, size)
    finally:
        response.close()


def _follow(
    client: httpx2.Client, candidate: Candidate, extra: dict[str, str]
) -> tuple[httpx2.Response, dict[str, str]]:
    """Follow redirects by hand: a token never leaves for another host; the hub's headers are kept on the way."""
    import httpx2

    url = candidate.url
    headers = {name.lower(): value for name, value in candidate.headers.items()}
    hub_headers: dict[str, str] = {}
    for _ in range(_MAX_REDIRECTS):
        try:
            response = client.send(client.build_request("GET", url, headers={**headers, **extra}), stream=True)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            stalled = isinstance(error, httpx2.ReadTimeout)
            unreached = isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError)
            raise Broken(network_error(error, url).message, stalled=stalled, unreached=unreached) from None
        for name in ("x-linked-etag", "x-repo-commit"):
            if value := response.headers.get(name):
                hub_headers.setdefault(name, value)
        if response.status_code not in (301, 302, 303, 307, 308):
            return response, hub_headers
        response.close()
        target = _target(url, response.headers.get("location", ""))
        if not _same_site(url, target):
            headers = {}  # the token, and whatever else an LFS server gave for its own store
        url = target
    raise Refused(tr("redirects in a loop"), "wrong")


def _target(url: str, location: str) -> str:
    """Where a redirect leads. Raises Refused for what is no web address, and for a circle of one."""
    try:
        target = urljoin(url, location)
        parts = urlsplit(target)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0 and target != url
        # This machine's own servers, and the secrets of its cloud, are nobody else's to name.
        usable = usable and (not is_here(parts.hostname or "") or is_here(urlsplit(url).hostname or ""))
    except ValueError:  # http://[/, a port of nine digits
        target, usable = location, False
    if not usable:
        raise Refused(tr("redirects to {target}", target=repr(one_line(target.partition("?")[0], 80))), "wrong")
    return target


def _same_site(one: str, other: str) -> bool:
    """Same host and port; going from http to https on one host counts as the same."""
    a, b = urlsplit(one), urlsplit(other)
    if a.hostname != b.hostname:
        return False
    ports = {"http": 80, "https": 443}
    here, there = (a.scheme, a.port or ports.get(a.scheme)), (b.scheme, b.port or ports.get(b.scheme))
    return here == there or (here, there) == (("http", 80), ("https", 443))


def _understand(
    response: httpx2.Response, hub_headers: dict[str, str], candidate: Candidate, offset: int, size: int | None
) -> Reply:
    status, headers = response.status_code, response.headers
    etag = strong_etag(headers.get("etag"))
    linked = strong_etag(hub_headers.get("x-linked-etag"))
    if linked is None and hub_headers.get("x-repo-commit"):
        linked = etag  # a hub's ETag is the content's name; another server's may be anything
    if status == 416:
        total = _unsatisfied_total(headers.get("content-range"))
        if offset and total == offset:
            return Reply(offset, total, iter(()), etag, linked, complete=True)
        raise Refused(tr("says the file has {total} bytes", total="?" if total is None else total), "wrong")
    if status not in (200, 206):
        _verdict(response, candidate)
    start, total = 0, _number(headers.get("content-length"))
    if status == 206:
        match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", headers.get("content-range", "").strip())
        if not match:
            raise Refused(tr("answered with part of the file and did not say which part"), "wrong")
        start = int(match.group(1))
        total = None if match.group(3) == "*" else int(match.group(3))
        if start > offset:
            raise Refused(
                tr("sent bytes from {start} when asked to start at {offset}", start=start, offset=offset), "wrong"
            )
    coding = headers.get("content-encoding", "").strip().lower()
    encoded = coding not in ("", "identity")
    if encoded:
        if status == 206:
            raise Refused(tr("sends parts of the file compressed"), "wrong")
        if coding not in ("gzip", "deflate"):  # others, and two on each other, unfold a little to gigabytes at once
            raise Refused(tr("sends the file compressed as {coding}", coding=one_line(coding, 40)), "wrong")
        total = None
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    page = kind in ("text/html", "application/xhtml+xml")
    if (
        page
        and not urlsplit(candidate.url).path.lower().endswith((".html", ".htm"))
        and (size is None or total != size)
    ):
        raise Refused(tr("returned a web page instead of the file"), "html")
    return Reply(start, total, _chunks(response, candidate.url, decode=encoded), etag, linked)


def _chunks(response: httpx2.Response, url: str, *, decode: bool) -> Iterator[bytes]:
    import httpx2

    length = _number(response.headers.get("content-length"))
    plain = not decode and response.http_version == "HTTP/1.1" and "transfer-encoding" not in response.headers
    try:
        if plain and length is not None and length >= _LARGE:
            yield from _straight(response, length, url)
        else:
            yield from response.iter_bytes() if decode else response.iter_raw()
    except httpx2.ReadTimeout as error:
        raise Broken(network_error(error, url).message, stalled=True) from None
    except (httpx2.HTTPError, httpx2.StreamError) as error:
        raise Broken(network_error(error, url).message) from None


def _straight(response: httpx2.Response, length: int, url: str) -> Iterator[bytes]:
    """A large body of known length from the connection itself, in large reads.

    The HTTP parser copies every byte three times and wakes Python for each 64 kB, which took more time than the network
    and the hash together. Its first chunk is all that it has buffered; what follows is nothing but body. The connection
    is closed afterwards and not used again.
    """
    import httpcore2

    body = response.iter_raw()  # kept until the end: a generator that is collected closes the connection
    first = next(body, b"")
    yield first
    left = length - len(first)
    stream = response.extensions["network_stream"]
    timeout = response.request.extensions.get("timeout", {}).get("read")
    while left > 0:
        try:
            chunk = stream.read(min(left, _READ), timeout=timeout)
        except httpcore2.ReadTimeout:
            raise Broken(tr("{host} stopped sending", host=host_of(url)), stalled=True) from None
        except httpcore2.NetworkError as error:
            detail = one_line(str(error), 100)
            words = tr(
                "the connection to {host} was lost{through}: {reason}", host=host_of(url), through="", reason=detail
            )
            raise Broken(words) from None
        if not chunk:
            return  # the transfer sees that bytes are missing
        left -= len(chunk)
        yield chunk


def _verdict(response: httpx2.Response, candidate: Candidate) -> None:
    """Every status but 200, 206 and 416. Always raises."""
    status, headers = response.status_code, response.headers
    reason = one_line(headers.get("x-error-message", ""), 120)
    words = tr("answered {status}", status=status) + (f" ({reason})" if reason else "")
    if status in (408, 425, 429) or status >= 500:
        wait = asked_wait(headers)
        if wait:
            words += tr(" and asks to wait {n} seconds", n=round(wait))
        raise Broken(words, retry_after=wait)
    if status in (401, 403):
        token = any(name.lower() == "authorization" for name in candidate.headers)
        gated = headers.get("x-error-code") == "GatedRepo"
        why = tr("the token does not give access") if token else tr("a token is needed")
        raise Refused(f"{words}: {why}", "denied", for_token=token and not gated)
    raise Refused(words, "missing")


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to be left alone for: Retry-After, else the hub's RateLimit (IETF draft
    httpapi-ratelimit-headers, read by huggingface_hub): `"resolvers";r=0;t=55`. None where it does not say."""
    wait = retry_after(headers.get("retry-after"))
    limit = re.search(r'"[\w-]+"\s*;\s*r=(\d{1,9})\s*;\s*t=(\d{1,9})', headers.get("ratelimit", ""))
    if wait is None and limit is not None and int(limit[1]) == 0:
        wait = float(limit[2]) + 1  # whole seconds, rounded by the sender
    return wait


def retry_after(value: str | None, now: Callable[[], float] = time.time) -> float | None:
    """Seconds to wait, from `Retry-After: 120` or a date (RFC 9110, 10.2.3). None if absent or broken."""
    if not value:
        return None
    if value.strip().isdecimal():
        return float(value.strip())
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now())
    except (ValueError, TypeError, OverflowError):
        return None


def strong_etag(value: str | None) -> str | None:
    """An ETag without quotes. A weak one (W/"…") counts only if it is a hash, which names the content all the same."""
    if not value:
        return None
    weak = value.startswith("W/")
    text = value.removeprefix("W/").strip().strip('"')
    if weak and not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text):
        return None
    return text or None


def _number(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"\s*\d{1,18}\s*", text) else None


def _unsatisfied_total(content_range: str | None) -> int | None:
    match = re.fullmatch(r"bytes \*/(\d{1,18})", (content_range or "").strip())
    return int(match.group(1)) if match else None


@contextlib.contextmanager
def _open_local(candidate: Candidate, offset: int) -> Iterator[Reply]:
    """A file in a mirror folder; one that a link takes outside the folder is refused."""
    path = Path(url2pathname(urlsplit(candidate.url).path))
    try:
        if candidate.folder is not None:
            try:
                path = inside(candidate.folder, path.relative_to(candidate.folder).as_posix())
            except ValueError:
                raise Refused(tr("is outside the mirror folder"), "wrong") from None
        with open_file(path) as file:
            total = path.stat().st_size
            if offset > total:
                raise Refused(tr("has {total} bytes", total=total), "wrong")
            file.seek(offset)
            yield Reply(offset, total, iter(lambda: file.read(BLOCK), b""), None, None)
    except Hostile as error:
        raise Refused(error.message, "wrong") from None
    except FileNotFoundError:
        raise Refused(tr("does not have it"), "missing") from None
    except OSError as error:
        raise Broken(tr("cannot be read: {reason}", reason=error.strerror)) from None


def source_name(candidate: Candidate) -> str:
    """How a candidate is called in messages and manifests: its label, or host[:port], or the folder."""
    if candidate.label:
        return one_line(candidate.label)
    return one_line(str(candidate.folder)) if candidate.folder is not None else host_of(candidate.url)
