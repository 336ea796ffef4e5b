"""One generation at a time, eight wait in order, the ninth is told to come back; who leaves is forgotten.

Covers serve/host.py.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fakes import FakeEngine, GatedEngine
from polling import SECONDS, wait_until
from running import Running, Serve

from glmchat.chat.client.endpoint import PROGRESS
from glmchat.serve import answer as answer_module
from glmchat.serve import app as app_module
from glmchat.serve.host import Busy, Line

QUESTION = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
TOLD = {PROGRESS: "1"}


class Asking(threading.Thread):
    """One streaming client. `comments` and `text` are what it has received so far."""

    def __init__(self, running: Running, name: str) -> None:
        super().__init__(daemon=True)
        self.client = running.another()
        self.body = {**QUESTION, "messages": [{"role": "user", "content": name}]}
        self.lines: list[str] = []
        self.status = 0
        self.leave = threading.Event()
        self.start()

    def run(self) -> None:
        with self.client.stream("POST", "/v1/chat/completions", json=self.body, headers=TOLD) as answer:
            self.status = answer.status_code
            for line in answer.iter_lines():
                self.lines.append(line)
                if self.leave.is_set():
                    return

    def sees(self, text: str) -> None:
        """Wait for a line with this text."""
        wait_until(lambda: any(text in line for line in list(self.lines)), else_=lambda: self.lines)


@contextmanager
def asked_and_unread(running: Running, question: dict[str, object]) -> Iterator[None]:
    """A connection over which a question was sent and no answer is read."""
    body = json.dumps(question).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        yield


def test_requests_wait_in_order_and_see_their_place(serve: Serve) -> None:
    engine = GatedEngine()
    running = serve(engine)
    askers = []
    for name in "abc":
        askers.append(Asking(running, name))
        wait_until(lambda: len(running.host.line) == len(askers))
    askers[1].sees(': glmchat {"waiting":1}')
    askers[2].sees(': glmchat {"waiting":2}')
    engine.gate.set()
    for asker in askers:
        asker.join(SECONDS)
        assert any("[DONE]" in line for line in asker.lines)
    for ahead in (1, 0):
        assert any(f': glmchat {{"waiting":{ahead}}}' in line for line in askers[2].lines)
    assert [chr(ids[6]) for ids, _ in engine.asked] == ["a", "b", "c"]


def test_the_tenth_request_is_told_when_to_come_back(serve: Serve) -> None:
    engine = GatedEngine()
    running = serve(engine)
    askers = [Asking(running, str(n)) for n in range(9)]
    wait_until(lambda: len(running.host.line) == 9)
    refused = running.ask()
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
    error = refused.json()["error"]
    assert error["code"] == "server.busy" and error["type"] == "rate_limit_error" and error["hint"]
    assert running.client.get("/health").status_code == 200, "health is answered while all places are taken"
    engine.gate.set()
    for asker in askers:
        asker.join(SECONDS)
    assert running.ask().status_code == 200


def test_a_client_that_leaves_the_line_makes_room(serve: Serve) -> None:
    engine = GatedEngine()
    running = serve(engine)
    first = Asking(running, "1")
    wait_until(lambda: len(running.host.line) == 1)
    second = Asking(running, "2")
    wait_until(lambda: len(running.host.line) == 2)
    third = Asking(running, "3")
    third.sees('"waiting":2')
    second.leave.set()  # it reads a heartbeat, then closes its connection
    wait_until(lambda: len(running.host.line) == 2)
    third.sees('"waiting":1')
    engine.gate.set()
    first.join(SECONDS)
    third.join(SECONDS)
    assert [chr(ids[6]) for ids, _ in engine.asked] == ["1", "3"]


def test_a_closed_connection_stops_the_answer_and_the_next_is_served(serve: Serve) -> None:
    running = serve(FakeEngine(["x"] * 100_000, seconds_per_token=0.005))
    with running.another().stream("POST", "/v1/chat/completions", json=QUESTION) as answer:
        assert any('"content":"x"' in line for line in answer.iter_lines())  # the engine is speaking
    wait_until(lambda: running.engine.stopped == 1)
    wait_until(lambda: len(running.host.line) == 0)
    assert running.ask(max_tokens=1).status_code == 200


def test_a_client_that_leaves_during_the_prefill_stops_it(serve: Serve) -> None:
    running = serve(FakeEngine(seconds_per_prefill=60, prefill_steps=6000))
    with running.another().stream("POST", "/v1/chat/completions", json=QUESTION, headers=TOLD) as answer:
        for line in answer.iter_lines():
            if '"prefill":' in line:
                break
    wait_until(lambda: running.engine.stopped == 1)


def test_a_client_that_does_not_stream_and_leaves_stops_its_answer_too(serve: Serve) -> None:
    running = serve(FakeEngine(["x"] * 100_000, seconds_per_token=0.005), tcp=True)
    with asked_and_unread(running, {**QUESTION, "stream": False}):
        wait_until(lambda: running.engine.asked)
    wait_until(lambda: running.engine.stopped == 1)


def test_a_long_prompts_progress_comes_as_comments_to_a_client_that_asks_for_them(serve: Serve) -> None:
    running = serve(FakeEngine(seconds_per_prefill=0.6, prefill_steps=4))
    text = running.client.post("/v1/chat/completions", json=QUESTION, headers=TOLD).text
    shown = [line for line in text.splitlines() if line.startswith(": glmchat") and "prefill" in line]
    assert shown[-1] == ': glmchat {"prefill":19,"of":19}' and len(shown) == 4


def test_any_other_client_is_sent_nothing_but_events_that_hold_json(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_module, "HEARTBEAT", 0.05)
    monkeypatch.setattr(app_module, "PATIENCE", 0.1)
    running = serve(FakeEngine(["x"], seconds_per_prefill=0.6, prefill_steps=4))
    for path, body in (("chat/completions", QUESTION), ("completions", {"prompt": "hi", "stream": True})):
        events = running.client.post(f"/v1/{path}", json=body).text.removesuffix("\n\n").split("\n\n")
        assert events.pop() == "data: [DONE]"
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        assert all(event.startswith("data: {") for event in events)
        said = [c["choices"][0].get("delta", {"content": c["choices"][0].get("text")}).get("content") for c in chunks]
        assert said.count("") > 2, "a long silence is filled by chunks that say nothing"
        assert "".join(text or "" for text in said) == "x"


def test_who_is_refused_is_told_when_all_that_wait_have_been_served() -> None:
    line = Line(waiting=2)
    for _ in range(3):
        line.join()
    line.took(4.0)
    with pytest.raises(Busy) as refused:
        line.join()
    assert refused.value.retry_after == 12, "three turns of four seconds"


def test_the_server_ends_while_an_answer_runs_and_says_so(serve: Serve) -> None:
    running = serve(FakeEngine(["x"] * 100_000, seconds_per_token=0.005))
    asker = Asking(running, "a")
    asker.sees('"content":"x"')
    running.server.stop()
    asker.join(SECONDS)
    assert any("server.stopping" in line for line in asker.lines)
    wait_until(lambda: not running.thread.is_alive())


def test_a_client_that_does_not_read_keeps_nobody_waiting(serve: Serve) -> None:
    running = serve(FakeEngine(["x" * 20_000], repeat=500), tcp=True)
    with asked_and_unread(running, {**QUESTION, "stream": True}):
        wait_until(lambda: len(running.engine.asked) == 1)
        assert running.ask(max_tokens=1).status_code == 200
