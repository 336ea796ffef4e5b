"""Over TCP: a key, our own Host, no page of a browser, JSON. Over the private socket: no key."""

from __future__ import annotations

import socket

import pytest
from running import Running, Serve

KEY = "sk-of-this-test"
BEARER = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture
def running(serve: Serve) -> Running:
    return serve(tcp=True, key=KEY, allow_hosts=("gpu-box",))


def test_without_the_right_key_nothing_is_told(running: Running) -> None:
    words = ["", "Bearer", "Bearer x", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY, "Bearer \xe9"]
    for header in (None, *(word.encode("latin-1") for word in words)):
        for path in ("/health", "/v1/models", "/nothing"):
            answer = running.client.get(path, headers={} if header is None else {b"Authorization": header})
            assert answer.status_code == 401, header
            assert answer.json()["error"]["code"] == "serve.key"
            assert answer.headers["www-authenticate"] == "Bearer"
            assert KEY not in answer.text


def test_with_the_key_everything_works(running: Running) -> None:
    assert running.client.get("/health", headers=BEARER).json() == {"status": "ok"}
    assert running.client.get("/health", headers={"Authorization": f"bearer {KEY}"}).status_code == 200


def test_a_foreign_host_is_refused(running: Running) -> None:
    ours = ["localhost:8000", "127.0.0.1", "[::1]:8000", "192.168.1.9:8000", "gpu-box", "GPU-BOX:1"]
    foreign = ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "", "[evil]", "127.0.0.1@evil.example"]
    for host, status in [*((h, 200) for h in ours), *((h, 403) for h in foreign)]:
        assert running.client.get("/health", headers={**BEARER, "Host": host}).status_code == status, host


def test_two_hosts_are_none(running: Running) -> None:
    address = ("127.0.0.1", int(running.url.rpartition(":")[2]))
    with socket.create_connection(address) as raw:
        request = f"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\nAuthorization: Bearer {KEY}\r\n\r\n"
        raw.sendall(request.encode())
        assert b" 200 " not in raw.recv(1000).splitlines()[0]


def test_a_page_of_a_browser_is_refused_whatever_its_origin(running: Running) -> None:
    for origin in ("http://evil.example", "http://localhost:8000", "null", ""):
        answer = running.client.get("/health", headers={**BEARER, "Origin": origin})
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "serve.origin"
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_a_body_that_is_not_json_is_refused_before_it_is_read(running: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", None):
        headers = {**BEARER, **({"Content-Type": kind} if kind is not None else {})}
        answer = running.client.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
        assert answer.status_code == 415 and answer.json()["error"]["code"] == "request.content_type"


def test_the_private_socket_needs_no_key(serve: Serve) -> None:
    assert serve().client.get("/health").status_code == 200
