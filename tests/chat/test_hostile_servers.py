"""Servers that lie, drip or never end: one line each, in bounded time and memory, and what came stays.

Covers chat/client/reading.py, chat/client/endpoint.py, chat/client/words.py.
"""

from __future__ import annotations

import gzip
import json
import resource
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from foreign_server import Foreign, chunk, deaf, serving
from polling import SECONDS

from glmchat.chat.client import reading
from glmchat.chat.client.endpoint import Endpoint, Stop
from glmchat.chat.client.words import MOST_MODELS
from glmchat.core.errors import GlmchatError, Interrupted
from glmchat.core.messages import Finished, Message, Piece, Sampling
from glmchat.core.text import show_controls

TALK = [Message("user", "hi")]
PACE = 0.05  # seconds between the bytes of a server that drips
DONE = "data: [DONE]\n\n"
Write = Callable[[bytes], int]
Speak = Callable[[Write], None]


@pytest.fixture
def foreign() -> Iterator[Foreign]:
    with serving() as state:
        yield state


@contextmanager
def speaking(speak: Speak, *, models: bool = False) -> Iterator[str]:
    """A server that reads a request and hands the connection to `speak`, until the client hangs up."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            line, length = self.rfile.readline(), 0
            while row := self.rfile.readline().strip():
                if row.lower().startswith(b"content-length:"):
                    length = int(row.partition(b":")[2])
            self.rfile.read(length)
            if b"/models" in line and not models:
                self.wfile.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
                return
            with suppress(OSError):
                speak(self.wfile.write)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
SAID = (chunk("so ") + "\n\n" + chunk("far") + "\n\n").encode()


def heard(endpoint: Endpoint, stop: Stop | None = None) -> tuple[str, Finished | None, GlmchatError | None]:
    text, end = "", None
    try:
        for event in endpoint.stream(TALK, Sampling(), stop=stop):
            if isinstance(event, Piece):
                text += event.text
            elif isinstance(event, Finished):
                end = event
    except GlmchatError as error:
        assert "\n" not in error.message and len(error.message) < 1000 and error.hint
        return text, end, error
    return text, end, None


def endless(piece: bytes, head: bytes = HEAD + SAID) -> Speak:
    def speak(write: Write) -> None:
        write(head)
        block = piece * max(1, 65536 // len(piece))
        while True:
            write(block)

    return speak


CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS: dict[str, Speak] = {
    "a line": endless(b"x", HEAD + SAID + b"data: "),
    "data lines of one event": endless(b"data: x\n"),
    "a chunked body": endless(b"1000\r\n" + b"x" * 4096 + b"\r\n", CHUNKED),
    "an answer": endless((chunk("word ") + "\n\n").encode()),
    "an error": endless(b"x", b"HTTP/1.1 500 No\r\n\r\n"),
    "json": endless(b"[", b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"),
    "header lines": endless(b"X-A: b\r\n", b"HTTP/1.1 200 OK\r\n"),
    "a header": endless(b"a", b"HTTP/1.1 200 OK\r\nX-A: "),
    "a status line": endless(b"a", b"HTTP/1.1 200 "),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_does_not_end_is_ended_within_a_bound_and_what_came_stays(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "STREAM_LIMIT", 8 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with speaking(ENDLESS[kind]) as url:
        text, end, error = heard(Endpoint(url, model="m"))
    assert error is not None and end is None
    assert text.startswith("so far") or kind not in ("a line", "data lines of one event")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


@pytest.mark.parametrize("kind", ["silence", "keep-alives", "a byte now and then", "half a header", "nothing"])
def test_whatever_a_server_does_a_stop_ends_it_within_a_second_and_keeps_what_came(kind: str) -> None:
    came = threading.Event()

    def speak(write: Write) -> None:
        head = {"half a header": b"HTTP/1.1 200 OK\r\nX-A", "nothing": b""}.get(kind, HEAD + SAID)
        write(head)
        came.set()
        drip = {"keep-alives": b": keep-alive\n\n", "a byte now and then": b"d"}.get(kind, b"")
        while True:
            write(drip)
            time.sleep(PACE)

    with speaking(speak) as url:
        stop, result = Stop(), []
        worker = threading.Thread(target=lambda: result.append(heard(Endpoint(url, model="m"), stop)))
        worker.start()
        assert came.wait(SECONDS)
        asked = time.monotonic()
        stop.now()
        worker.join(SECONDS)
        assert time.monotonic() - asked < 1
    text, end, error = result[0]
    assert error is None and end is not None and end.finish_reason == "cancelled"
    assert text in ("", "so ", "so far")


ASK: dict[str, Callable[[Endpoint, Stop], Any]] = {
    "its models": lambda endpoint, stop: endpoint.models(stop),
    "an answer": lambda endpoint, stop: list(endpoint.stream(TALK, Sampling(), stop=stop)),
    "a continuation": lambda endpoint, stop: list(endpoint.complete("and", Sampling(), stop=stop)),
}


@pytest.mark.parametrize("what", ASK)
@pytest.mark.parametrize("kind", ["silence", "header lines", "a byte now and then", "no connection"])
def test_whatever_is_asked_nobody_waits_longer_than_a_second_after_a_stop(kind: str, what: str) -> None:
    """Not even where there is no connection yet that could be closed."""

    def speak(write: Write) -> None:
        write(b"" if kind == "silence" else b"HTTP/1.1 200 OK\r\n")
        while True:
            write({"header lines": b"X-A: b\r\n", "a byte now and then": b"X"}.get(kind, b""))
            time.sleep(PACE)

    with deaf() if kind == "no connection" else speaking(speak, models=True) as url:
        stop, ended = Stop(), []

        def ask() -> None:
            try:
                ended.append(ASK[what](Endpoint(url, model="m"), stop))
            except Interrupted as error:
                ended.append(error)

        worker = threading.Thread(target=ask)
        worker.start()
        worker.join(0.5)
        assert worker.is_alive()
        asked = time.monotonic()
        stop.now()
        worker.join(SECONDS)
        assert time.monotonic() - asked < 1
    end = ended[0]
    assert isinstance(end, Interrupted) or end[-1].finish_reason == "cancelled"


@pytest.mark.parametrize("models", [True, False])
def test_a_question_that_costs_nothing_has_a_time_in_all(models: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmchat.chat.client.endpoint.ASK_SECONDS", 0.5)

    def speak(write: Write) -> None:
        write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + (b"\r\n" if models else b""))
        while True:
            write(b" " if models else b"X-A: b\r\n")
            time.sleep(PACE)

    with speaking(speak, models=True) as url:
        begun = time.monotonic()
        with pytest.raises(GlmchatError, match="stopped sending"):
            Endpoint(url).models()
        assert time.monotonic() - begun < 5


def test_compressed_answers_are_not_unfolded(foreign: Foreign) -> None:
    bomb = gzip.compress(gzip.compress(bytes(50_000_000)))
    for coding in ("gzip", "gzip, gzip", "deflate", "br"):
        endpoint = foreign.says(bomb, headers={"Content-Encoding": coding}, kind="application/json")
        _, _, error = heard(endpoint)
        assert error is not None and "compressed" in error.message
    assert all(headers["accept-encoding"] == "identity" for _, headers, _ in foreign.asked)


DEEP = "[" * 900 + "]" * 900
ODD: dict[str, str] = {
    "a list": 'data: [1, {"choices": []}]',
    "choices of text": 'data: {"choices": "x"}',
    "a choice of null": 'data: {"choices": [null]}',
    "a delta that is a list": 'data: {"choices": [{"delta": [1]}]}',
    "content that is a number": 'data: {"choices": [{"delta": {"content": 5}}]}',
    "content without a floor": 'data: {"choices": [{"delta": {"content": ' + DEEP + "}}]}",
    "a deeper body": "data: " + "[" * 100_000,
    "an end that is an object": 'data: {"choices": [{"delta": {}, "finish_reason": {"a": 1}}]}',
    "half a character": r'data: {"choices": [{"delta": {"content": "\ud800"}}], "model": "\udfff"}',
    "a role that is a list": 'data: {"choices": [{"delta": {"role": [[0]], "content": null}}]}',
    "usage that lies": 'data: {"choices": [], "usage": {"prompt_tokens": %s, "completion_tokens": -5}}' % ("9" * 400),
    "timings that lie": 'data: {"choices": [], "timings": {"predicted_n": %s, "predicted_ms": 1e999}}' % ("9" * 400),
    "facts that lie": 'data: {"choices": [], "glmchat": {"seed": 1e999, "load_ms": "x", "passes": "\\ud800"}}',
    "digits without end": 'data: {"choices": [], "x": %s}' % ("9" * 5000),
    "ids that lie": 'data: {"choices": [], "prompt_token_ids": [-1, "x", %s, null, 1.5]}' % ("9" * 400),
    "bytes that are no text": "data: \udcff\udcfe",
    "an event of many lists": "data: [" + "[]," * 300_000 + "0]",
    "an error that is deep": 'data: {"error": ' + DEEP + "}",
    "progress that lies": ': glmchat {"waiting": "..", "prefill": [], "of": -1}',
}  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_odd_events_are_read_or_refused_and_what_came_stays(foreign: Foreign, kind: str) -> None:
    body = (SAID.decode() + ODD[kind] + "\n\n" + chunk(finish="stop") + "\n\n" + DONE).encode(
        "utf-8", "surrogateescape"
    )
    told: list[Any] = []
    text, end, error = "", None, None
    try:
        for event in foreign.says(body).stream(TALK, Sampling(), on_progress=told.append):
            if isinstance(event, Piece):
                text += event.text
                event.text.encode("utf-8")
            elif isinstance(event, Finished):
                end = event
    except GlmchatError as caught:
        error = caught
        assert len(caught.message) < 1000 and caught.hint
    assert text.startswith("so far") and (end is not None or error is not None)
    if end is not None:
        for count in (end.prompt_tokens, end.completion_tokens, end.seed):
            assert count is None or 0 <= count < 2**63
        json.dumps(dict(end.facts)).encode("utf-8")
    for progress in told:
        assert progress.waiting is None and progress.prefill_total is None


@pytest.mark.parametrize(
    "where", ["http://127.0.0.1:1/v1", "file:///etc/passwd", "gopher://x", "/v1/models", "\x1b]0;x"]
)
def test_a_redirect_is_told_and_not_followed(foreign: Foreign, where: str) -> None:
    endpoint = foreign.says(b"", status="302 Found", headers={"Location": where})
    _, _, error = heard(endpoint)
    assert error is not None and error.code in ("server.moved", "server.network")
    assert "\x1b" not in error.message


def test_a_list_of_a_million_models_is_bounded_and_its_names_draw_nothing(foreign: Foreign) -> None:
    foreign.lists_models = True
    rows = [{"id": f"\x1b]0;x\x07{n}"} for n in range(MOST_MODELS + 5)]
    listed = foreign.says(json.dumps({"data": rows}), kind="application/json").models()
    assert len(listed) == MOST_MODELS
    with pytest.raises(GlmchatError) as refused:
        foreign.says(json.dumps({"data": rows}), kind="application/json").choose_model()
    assert refused.value.message == show_controls(refused.value.message) and len(refused.value.hint) < 2000
    assert refused.value.hint == show_controls(refused.value.hint)
    huge = b'{"data": [' + b'{"id": "x"},' * 1_000_000 + b"0]}"
    assert foreign.says(huge, kind="application/json").models() == []
    with pytest.raises(GlmchatError, match="does not end"):
        foreign.says(b"[" + b" " * (reading.ANSWER_LIMIT + 1), kind="application/json").models()
