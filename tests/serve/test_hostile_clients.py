"""Clients that send nothing, half, too much, a byte at a time, or read nothing: nobody else waits for them.

Covers serve/run.py, serve/host.py (what is done beside an answer).
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest
from fakes import FakeEngine
from polling import SECONDS, wait_until
from running import Running, Serve

from glmchat.serve.run import PatientProtocol

PACE = 0.05  # seconds between the bytes of a client that drips
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
QUESTION = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


def request(body: bytes, *more: bytes) -> bytes:
    return HEAD + b"".join(line + b"\r\n" for line in more) + b"Content-Length: %d\r\n\r\n" % len(body) + body


def address_of(running: Running) -> tuple[str, int]:
    return "127.0.0.1", int(running.url.rpartition(":")[2])


LONG = json.dumps({**QUESTION, "messages": [{"role": "user", "content": "word " * 200_000}]}).encode()
HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "half a head": HEAD,
    "half a body": HEAD + b"Content-Length: 900\r\n\r\n{",
    "headers without end": HEAD + b"X-A: " + b"a" * 60_000,
    "chunks without end": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"5\r\n     \r\n" * 1000,
    "millions of lists": request(b'{"messages": [' + b"[]," * 900_000 + b"0]}"),
    "a deep body": request(b"[" * 1_000_000),
    "numbers": request(b'{"stop_token_ids": [' + b"1," * 1_000_000 + b'"x"]}'),
    "messages": request(json.dumps({"messages": [{"role": "user", "content": ""}] * 50_000}).encode()),
    "a long text": request(LONG),
}


@pytest.fixture
def dripping() -> Iterator[Callable[[socket.socket, bytes], None]]:
    """Sends a byte now and then, in a thread, until the test is over."""
    over = threading.Event()

    def drip(to: socket.socket, data: bytes) -> None:
        def run() -> None:
            with suppress(OSError):
                for byte in data:
                    to.sendall(bytes([byte]))
                    if over.wait(PACE):
                        return

        threading.Thread(target=run, daemon=True).start()

    yield drip
    over.set()


def test_a_first_token_comes_at_once_beside_fifty_hostile_clients(
    serve: Serve, dripping: Callable[[socket.socket, bytes], None]
) -> None:
    running = serve(FakeEngine(["one ", "two"], context=8192), tcp=True)
    with ExitStack() as stack:
        for number in range(50):
            raw = stack.enter_context(socket.create_connection(address_of(running), timeout=SECONDS))
            kind = (*HOSTILE, "drip")[number % (len(HOSTILE) + 1)]
            with suppress(OSError):  # a refusal may close the connection under the rest of what is said
                dripping(raw, request(LONG)) if kind == "drip" else raw.sendall(HOSTILE[kind])
        waits = []
        for _ in range(5):
            with socket.create_connection(address_of(running), timeout=SECONDS) as asking:
                begun = time.monotonic()
                asking.sendall(request(json.dumps(QUESTION).encode(), b"Connection: close"))
                said = b""
                while b'"one "' not in said:
                    part = asking.recv(65536)
                    assert part, said
                    said += part
                waits.append(time.monotonic() - begun)
    assert sorted(waits)[2] < 2, waits
    assert running.client.get("/health").status_code == 200


@pytest.mark.parametrize("said", ["nothing", "half a head", "half a body"])
def test_who_opens_connections_and_asks_nothing_takes_nobodys_place(
    said: str, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PatientProtocol, "most", 20)
    running = serve(FakeEngine(["x"] * 50, seconds_per_token=PACE), tcp=True)
    with ExitStack() as stack:
        working = stack.enter_context(socket.create_connection(address_of(running), timeout=SECONDS))
        working.sendall(request(json.dumps(QUESTION).encode(), b"Connection: close"))
        wait_until(lambda: running.engine.asked)
        idle, open_now = [], running.server.server_state.connections
        for _ in range(60):
            idle.append(stack.enter_context(socket.create_connection(address_of(running), timeout=SECONDS)))
            with suppress(OSError):
                idle[-1].sendall(HOSTILE[said])
            if said == "half a body":  # one by one, each with a request that is begun
                wait_until(lambda: all(getattr(one, "cycle", None) for one in open_now.copy()))
        with suppress(ConnectionResetError):
            assert idle[0].recv(10) == b"", "the first one was hung up on"
        assert running.another().get("/health").status_code == 200
        with working.makefile("rb") as answer:
            assert answer.read().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_a_client_that_reads_nothing_is_hung_up_on_in_the_end(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PatientProtocol, "stalled", 0.2)
    running = serve(FakeEngine(["word " * 20_000], repeat=400, context=100_000), tcp=True)
    with socket.create_connection(address_of(running), timeout=SECONDS) as asking:
        asking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        asking.sendall(request(json.dumps(QUESTION).encode()))
        wait_until(lambda: running.engine.asked and not running.host.line)
        wait_until(lambda: len(running.server.server_state.connections) <= 1)
    assert running.client.get("/health").status_code == 200


def test_half_a_request_that_can_never_be_whole_is_hung_up_on_at_once(serve: Serve) -> None:
    running = serve(tcp=True)
    with socket.create_connection(address_of(running), timeout=SECONDS) as raw:
        raw.sendall(HEAD + b'Content-Length: 900\r\n\r\n{"messages"')
        raw.shutdown(socket.SHUT_WR)
        begun = time.monotonic()
        while raw.recv(1000):
            pass
        assert time.monotonic() - begun < 5
    assert running.client.get("/health").status_code == 200


BODY = json.dumps({**QUESTION, "stream": False}).encode()
SIZE = b"Content-Length: %d\r\n" % len(BODY)
PLAIN = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0")
WIRE: dict[str, tuple[bytes, bytes, int]] = {
    "HTTP/1.0": (PLAIN + SIZE + b"\r\n" + BODY, b"200", 1),
    "Expect": (HEAD + b"Expect: 100-continue\r\nConnection: close\r\n" + SIZE + b"\r\n" + BODY, b"100", 2),
    "one behind the other": (
        (HEAD + SIZE + b"\r\n" + BODY) * 3 + HEAD + b"Connection: close\r\n" + SIZE + b"\r\n" + BODY, b"200", 4),
    "two lengths": (HEAD + b"Content-Length: 5\r\n" + SIZE + b"\r\n" + BODY, b"400", 1),
    "a length below zero": (HEAD + b"Content-Length: -5\r\n\r\n" + BODY, b"400", 1),
    "a length of 400 digits": (HEAD + b"Content-Length: " + b"9" * 400 + b"\r\n\r\n" + BODY, b"400", 1),
    "headers of megabytes": (HEAD + b"X-A: " + b"a" * 2_000_000 + b"\r\n\r\n", b"400", 1),
    "a chunk that is no number": (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"400", 1),
    "chunks packed by gzip": (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", b"400", 1),
    "no HTTP": (b"\x16\x03\x01" * 100 + b"\r\n\r\n", b"400", 1),
    "no host": (b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n", b"400", 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", WIRE)
def test_every_shape_of_http_is_answered_or_refused(serve: Serve, kind: str) -> None:
    said, status, answers = WIRE[kind]
    running = serve(tcp=True)
    heard = b""
    with socket.create_connection(address_of(running), timeout=SECONDS) as raw, suppress(ConnectionResetError):
        with suppress(BrokenPipeError):
            raw.sendall(said)
        while part := raw.recv(65536):
            heard += part
    assert heard.split()[1] == status and heard.count(b"HTTP/1.1 ") == answers, heard[:300]
    assert running.client.get("/health").status_code == 200
