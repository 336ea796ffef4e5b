"""A client that does not say its request is hung up on; one that waits for its answer is not."""

from __future__ import annotations

import socket

import pytest

from glmchat.serve.patience import PatientProtocol

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
ASKED = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def running(serve, monkeypatch):
    running = serve(tcp=True)
    monkeypatch.setattr(PatientProtocol, "seconds", 0.1)
    return running


@pytest.mark.parametrize(
    "said",
    [b"", b"GET /hea", HEAD, HEAD + b'Content-Length: 900\r\n\r\n{"messages": ['],
    ids=["nothing", "a word", "a head", "half a body"],
)
@pytest.mark.parametrize("before", [b"", ASKED], ids=["first", "second"])
def test_half_a_request_is_hung_up_on(running, said, before):
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=20) as raw:
        if before:
            raw.sendall(before)
            assert b" 200 " in raw.recv(1000)
            said = said or b"G"  # between two requests a client may be silent for longer
        raw.sendall(said)
        while raw.recv(1000):  # what may come before the end is a refusal
            pass
    assert running.client.get("/health").status_code == 200


def test_an_answer_may_take_longer_than_its_question(running):
    running.engine.seconds_per_token = 0.3
    assert running.ask().json()["choices"][0]["message"]["content"] == "".join(running.engine.pieces)
