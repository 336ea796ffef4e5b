"""A client that does not say its request is hung up on; one that waits for its answer is not."""

from __future__ import annotations

import json
import socket

import pytest
from fakes import FakeEngine, GatedEngine
from polling import SECONDS, wait_until
from running import Serve

from glmchat.serve.run import PatientProtocol

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
QUESTION = {"messages": [{"role": "user", "content": "hi"}]}
ASKED = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "said",
    [b"", b"GET /hea", HEAD, HEAD + b'Content-Length: 900\r\n\r\n{"messages": ['],
    ids=["nothing", "a word", "a head", "half a body"],
)
@pytest.mark.parametrize("before", [b"", ASKED], ids=["first", "second"])
def test_half_a_request_is_hung_up_on(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, said: bytes, before: bytes
) -> None:
    running = serve(tcp=True)
    port = int(running.url.rpartition(":")[2])
    if not before:
        monkeypatch.setattr(PatientProtocol, "seconds", 0.1)
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as raw:
        if before:  # a whole request may come as slowly as a busy machine sends it
            raw.sendall(before)
            assert b" 200 " in raw.recv(1000)
            monkeypatch.setattr(PatientProtocol, "seconds", 0.1)
            said = said or b"G"  # between two requests a client may be silent for longer
        raw.sendall(said)
        while raw.recv(1000):  # what may come before the end is a refusal
            pass
    monkeypatch.undo()
    assert running.client.get("/health").status_code == 200


def test_an_answer_may_take_longer_than_its_question(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = GatedEngine()
    running = serve(engine, tcp=True)
    address = ("127.0.0.1", int(running.url.rpartition(":")[2]))
    body = json.dumps(QUESTION).encode()
    monkeypatch.setattr(PatientProtocol, "seconds", 0.1)
    with socket.create_connection(address, timeout=SECONDS) as asking:
        asking.sendall(HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        wait_until(lambda: running.host.line)
        with socket.create_connection(address, timeout=SECONDS) as silent:
            assert silent.recv(1000) == b"", "one that came after the question has been hung up on"
        engine.gate.set()
        with asking.makefile("rb") as answer:
            assert b'"content":"one two"' in answer.read()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_its_half_behind_the_question_is_answered(serve: Serve, stream: bool) -> None:
    engine = GatedEngine()
    running = serve(engine, tcp=True)
    body = json.dumps({**QUESTION, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=SECONDS) as asking:
        asking.sendall(HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        asking.shutdown(socket.SHUT_WR)
        wait_until(lambda: running.host.line)
        engine.gate.set()
        with asking.makefile("rb") as answer:
            said = answer.read()  # to the end: the connection is closed behind the answer
    assert b" 200 OK" in said and (b'"one "' if stream else b'"content":"one two"') in said


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tcp", [False, True])
def test_a_client_that_closes_both_halves_is_found_out(serve: Serve, stream: bool, tcp: bool) -> None:
    running = serve(FakeEngine(seconds_per_prefill=600, prefill_steps=60_000), tcp=tcp)
    body = json.dumps({**QUESTION, "stream": stream}).encode()
    address: object = running.uds or ("127.0.0.1", int(running.url.rpartition(":")[2]))
    with socket.socket(socket.AF_INET if tcp else socket.AF_UNIX) as asking:
        asking.connect(address)  # type: ignore[arg-type]
        asking.sendall(HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        wait_until(lambda: running.engine.asked)
    wait_until(lambda: running.engine.stopped == 1)
    assert running.client.get("/health").status_code == 200
