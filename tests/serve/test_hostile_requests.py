"""The table of hostile requests (`hostile_requests.py`): each is refused by name, and nobody waits for it.

Covers serve/app.py, serve/wire.py, serve/guard.py.
"""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from fakes import FakeEngine
from hostile_requests import REQUESTS, Request
from polling import SECONDS
from running import Running, Serve

CONTROLS = {chr(code) for code in (*range(9), *range(11, 13), *range(14, 32), *range(127, 160))}
WAIT = 2.0  # seconds; of an ordinary client beside hostile ones


def send(running: Running, request: Request) -> str:
    """All that the server says; a body in chunks goes on until it does."""
    address = "127.0.0.1", int(running.url.rpartition(":")[2])
    heard = b""
    with socket.create_connection(address, timeout=SECONDS) as raw:
        with suppress(ConnectionError):
            raw.sendall(request.head())
            raw.sendall(request.body)
            for _ in range(1000 if request.chunked else 0):
                raw.sendall(request.body)
        with suppress(ConnectionError):
            while part := raw.recv(65536):
                heard += part
    return heard.decode("utf-8", "replace")


def fault(heard: str, request: Request) -> str | None:
    status = heard.split()[1] if heard.startswith("HTTP/1.1 ") else "none"
    if status != str(request.status) or request.words not in heard:
        return f"{status} {heard[-400:]}"
    if len(heard) > 4000 or CONTROLS & set(heard) or "Traceback" in heard:
        return f"too much is said: {heard[:400]}"
    return None


def test_every_hostile_request_is_refused_by_name_and_two_clients_wait_for_none(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    running = serve(FakeEngine(["one ", "two"], context=8192), tcp=True)
    clients = [running.another(), running.another()]
    slow = socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=SECONDS)
    wrong, waits = {}, []
    with slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le")
        for request in REQUESTS:
            if said := fault(send(running, request), request):
                wrong[request.name] = said
            for client in clients:
                began = time.monotonic()
                assert client.get("/v1/models").status_code == 200, request.name
                waits.append(time.monotonic() - began)
    assert not wrong, "\n".join(f"{name}: {said}" for name, said in wrong.items())
    assert sorted(waits)[len(waits) * 9 // 10] < WAIT, waits
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert running.ask().json()["choices"][0]["message"]["content"] == "one two"


def test_no_request_makes_a_file(serve: Serve, tmp_path: Path) -> None:
    running = serve(tcp=True)
    before = set(tmp_path.rglob("*"))
    for request in (one for one in REQUESTS if "model" in one.name or "adapter" in one.name):
        send(running, request)
    assert set(tmp_path.rglob("*")) == before


def test_no_two_are_called_the_same() -> None:
    assert Counter(request.name for request in REQUESTS).most_common(1)[0][1] == 1
