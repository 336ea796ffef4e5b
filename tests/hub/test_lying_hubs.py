"""Hubs that never end, drip, lead in circles or unfold: one line and an exit code, and nothing is left half written.

Covers core/http_bounds.py, hub/sources.py, hub/fetch.py.
"""

from __future__ import annotations

import functools
import gzip
import json
import resource
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hub_helpers import glmchat
from loopback_hub import LoopbackHub

from glmchat.core import locations
from glmchat.core.errors import GlmchatError
from glmchat.core.http import make_client
from glmchat.core.http_bounds import Bounds, is_here
from glmchat.hub import fetch, sources
from glmchat.hub.fetch import Refused

PACE = 0.05  # seconds between the bytes of a server that drips
COMMIT = "a" * 40
Write = Callable[[bytes], int]
Speak = Callable[[str, Write], None]
JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
SIBLINGS = [{"rfilename": "config.json", "size": 3, "blobId": "0" * 40}]
LISTING: dict[str, Any] = {"id": "a/b", "sha": COMMIT, "siblings": SIBLINGS}


@contextmanager
def speaking(speak: Speak) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A server that hands each connection to `speak`; -> its address, and (path, authorization) of each request."""
    asked: list[tuple[str, str]] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            line, key = self.rfile.readline().decode("latin-1").split(), ""
            while row := self.rfile.readline().strip():
                if row.lower().startswith(b"authorization:"):
                    key = row.decode()
            if line:
                asked.append((line[1], key))
                with suppress(OSError):
                    speak(line[1], self.wfile.write)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def body(data: Any, **headers: str) -> bytes:
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return JSON + more.encode() + b"Content-Length: %d\r\n\r\n" % len(text) + text


def endless(head: bytes, piece: bytes) -> Speak:
    def speak(path: str, write: Write) -> None:
        write(head)
        block = piece * max(1, 65536 // len(piece))
        while True:
            write(block)

    return speak


def dripping(head: bytes, piece: bytes) -> Speak:
    def speak(path: str, write: Write) -> None:
        write(head)
        while True:
            write(piece)
            time.sleep(PACE)

    return speak


def saying(answer: bytes) -> Speak:
    def speak(path: str, write: Write) -> None:
        write(answer)

    return speak


def pages(path: str, write: Write) -> None:
    """A listing without hashes, so that the tree is asked, whose every page names itself as the next one."""
    bare = {"id": "a/b", "sha": COMMIT, "siblings": [{"rfilename": "config.json"}]}
    write(body([], Link=f'<{path}>; rel="next"') if "/tree/" in path else body(bare))


def bomb(layers: int) -> bytes:
    data = b"[" + b" " * 300_000_000
    for _ in range(layers):
        data = gzip.compress(data, 1)
    return data


LIES: dict[str, Callable[[], Speak]] = {
    "a listing without end": lambda: endless(JSON + b"\r\n", b"[" * 10),
    "chunks without end": lambda: endless(JSON + b"Transfer-Encoding: chunked\r\n\r\n", b"5\r\n     \r\n"),
    "headers without end": lambda: endless(JSON, b"X-A: b\r\n"),
    "a header without end": lambda: endless(JSON + b"X-A: ", b"a"),
    "a bomb": lambda: saying(body(bomb(1), Content_Encoding="gzip")),
    "a bomb in a bomb": lambda: saying(body(bomb(2), Content_Encoding="gzip, gzip")),
    "a coding that nobody asked for": lambda: saying(body(b"x", Content_Encoding="br")),
    "a circle": lambda: saying(b"HTTP/1.1 302 Found\r\nLocation: /api/models/a/b\r\nContent-Length: 0\r\n\r\n"),
    "a redirect to a file": lambda: saying(b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n"),
    "pages without end": lambda: pages,
    "a body dripping": lambda: dripping(JSON + b"\r\n", b" "),
    "headers dripping": lambda: dripping(JSON, b"X-A: b\r\n"),
    "a status line dripping": lambda: dripping(b"HTTP/1.1 200 ", b"O"),
    "a size without end": lambda: saying(body({**LISTING, "siblings": [{**SIBLINGS[0], "size": 10**400}]})),
    "a size of 1e999": lambda: saying(body(json.dumps(LISTING).replace('"size": 3', '"size": 1e999').encode())),
    "a size of half a byte": lambda: saying(body({**LISTING, "siblings": [{**SIBLINGS[0], "size": 2.5}]})),
    "ten thousand lists": lambda: saying(body(b'{"siblings": ' + b"[" * 10_000)),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_hub_that_lies_is_one_line_within_a_bound_and_leaves_nothing(
    kind: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "Bounds", functools.partial(Bounds, seconds=3, size=8 * 2**20, requests=50))
    speak = LIES[kind]()
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with speaking(speak) as (address, asked):
        code, _, err = glmchat(capsys, "pull", "a/b", "--endpoint", address)
    assert code in (1, 3) and len(err.strip().splitlines()) == 2, err
    assert "Traceback" not in err and time.monotonic() - begun < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
    assert len(asked) <= 50
    cache = locations.hf_cache()
    assert not cache.is_dir() or not [path for path in cache.rglob("*") if path.is_file()]


def test_a_next_page_elsewhere_is_not_given_the_token(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Followed by huggingface_hub with the very headers of the first request."""
    with speaking(saying(body([]))) as (elsewhere, there):
        other = elsewhere.replace("127.0.0.1", "localhost")

        def speak(path: str, write: Write) -> None:
            bare = {"id": "a/b", "sha": COMMIT, "siblings": [{"rfilename": "config.json"}]}
            write(body([], Link=f'<{other}/x>; rel="next"') if "/tree/" in path else body(bare))

        with speaking(speak) as (address, here):
            monkeypatch.setenv("HF_ENDPOINT", address)
            monkeypatch.setenv("HF_TOKEN", "hf_secret")
            glmchat(capsys, "pull", "a/b")
    assert here and here[0][1].endswith("hf_secret")
    assert [key for _, key in there] == [""]


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1:1/x", "http://localhost/x", "http://[::1]/", "http://169.254.1.1/"]
)
def test_nothing_leads_from_another_machine_to_this_one(target: str) -> None:
    with pytest.raises(Refused, match="redirects to"):
        fetch._target("https://hub.example/model", target)
    assert fetch._target("http://127.0.0.1:2/model", target) == target, "a mirror of one's own may"

    def elsewhere(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(302, headers={"location": target})

    bounds = Bounds()
    bounds.send(httpx2.Request("GET", "https://hub.example/"), elsewhere)
    with pytest.raises(GlmchatError, match="redirects to this machine"):
        bounds.send(httpx2.Request("GET", target), elsewhere)


@pytest.mark.parametrize(
    ("host", "here"),
    [("localhost", True), ("a.localhost.", True), ("[::1]", True), ("::ffff:127.0.0.1", True), ("0.0.0.0", True),
     ("169.254.169.254", True), ("fe80::1%eth0", True), ("10.0.0.1", False), ("example.com", False), ("", False)],
)  # fmt: skip
def test_what_is_this_machine(host: str, here: bool) -> None:
    assert is_here(host) is here


@pytest.mark.parametrize("coding", ["gzip", "deflate", ""])
def test_an_honest_answer_is_read_as_it_is(coding: str) -> None:
    import zlib

    text = json.dumps(LISTING).encode()
    packed = {"gzip": gzip.compress(text), "deflate": zlib.compress(text), "": text}[coding]
    headers = {"Content_Encoding": coding} if coding else {}
    with speaking(saying(body(packed, **headers))) as (address, _), make_client(bounds=Bounds()) as client:
        assert client.get(address).json() == LISTING


@pytest.mark.parametrize("coding", ["gzip, gzip", "br", "zstd"])
def test_a_file_that_comes_folded_twice_is_refused(coding: str) -> None:
    from glmchat.hub.file_request import Candidate

    with speaking(saying(body(b"x", Content_Encoding=coding))) as (address, _), make_client() as client:
        asked = fetch.open_reply(
            client, Candidate(address + "/f"), 0, size=5, if_range=None, watch=lambda response: nullcontext()
        )
        with pytest.raises(Refused, match="compressed"), asked:
            pass


def test_a_pointer_that_lies_about_its_object_is_not_kept(
    loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", loopback_hub.url)
    loopback_hub.add("a/b", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"w" * 1000})
    loopback_hub.fault("model.safetensors", times=None, content=b"v" * 1000)
    code, _, err = glmchat(capsys, "pull", "a/b", "--all")
    assert code in (1, 3) and "Traceback" not in err
    loopback_hub.heal()
    glmchat(capsys, "pull", "a/b", "--all")
    kept = list(locations.hf_cache().rglob("model.safetensors"))
    assert [path.read_bytes() for path in kept] == [b"w" * 1000]
