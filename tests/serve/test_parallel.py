"""Several answers at once: who is served together, who waits, and that an answer is its own.

Covers serve/host.py and serve/answer.py where an engine writes more than one answer at a time.
"""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import adapter_builders
import engine_builders
import pytest
from fakes import FakeEngine
from polling import SECONDS, wait_until
from running import QUESTION, Running, Serve

from glmchat.engine import Engine
from glmchat.serve.host import Line

ENDLESS: dict[str, Any] = {"repeat": 100_000, "seconds_per_token": 0.001, "context": 1_000_000}


class Reader(threading.Thread):
    """A client that reads until it is told to leave."""

    def __init__(self, running: Running, **body: Any) -> None:
        super().__init__(daemon=True)
        self.client, self.leave = running.another(), threading.Event()
        self.lines: list[str] = []
        self.body = {
            "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 900_000, **body
        }  # fmt: skip
        self.start()

    def run(self) -> None:
        progress = {"X-Glmchat-Progress": "1"}
        with self.client.stream("POST", "/v1/chat/completions", json=self.body, headers=progress) as answer:
            for line in answer.iter_lines():
                self.lines.append(line)
                if self.leave.is_set():
                    return

    @property
    def begun(self) -> bool:
        return any('"waiting":0' in line for line in list(self.lines))

    @property
    def reads(self) -> bool:
        return any('"content":"x' in line for line in list(self.lines))

    def end(self) -> None:
        self.leave.set()
        self.join(SECONDS)


def connect(running: Running, **body: Any) -> socket.socket:
    """A client that has asked for a stream and reads nothing of it."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(running.uds or "")
    content = json.dumps({**QUESTION, "stream": True, **body}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
    return connection


def test_as_many_are_served_at_once_as_the_engine_writes_and_the_next_waits(serve: Serve) -> None:
    running = serve(FakeEngine(["x"], parallel=3, **ENDLESS))
    served = [Reader(running) for _ in range(3)]
    wait_until(lambda: all(reader.reads for reader in served))
    fourth = Reader(running)
    wait_until(lambda: "glmchat_requests_waiting 1\n" in running.client.get("/metrics").text)
    assert not fourth.reads and running.engine.steps > 0
    served[1].end()
    wait_until(lambda: fourth.reads)
    for reader in (served[0], served[2], fourth):
        reader.end()
    wait_until(lambda: running.host.writing == 0 and not running.host.line)


def test_where_adapters_are_not_mixed_who_asks_for_others_waits_for_them_to_end(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    running = serve(FakeEngine(["x"], parallel=3, mixes=False, **ENDLESS), adapters=(("lora", tmp_path / "lora"),))
    plain = Reader(running)
    wait_until(lambda: plain.reads)
    adapted = Reader(running, model="lora")
    late = Reader(running)
    wait_until(lambda: len(running.host.line) == 3)
    assert not running.engine.active and not adapted.reads
    assert not adapted.begun, "it is not its turn yet"
    told = running.client.get("/metrics").text
    assert "glmchat_requests_running 1\n" in told and "glmchat_requests_waiting 2\n" in told
    plain.end()
    wait_until(lambda: adapted.reads)
    assert adapted.begun
    assert running.engine.active == {"lora": 1.0} and not late.reads, "whoever came later does not overtake"
    adapted.end()
    wait_until(lambda: late.reads)
    assert not running.engine.active
    late.end()


def test_who_asks_for_other_adapters_is_answered_beside_the_others(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    running = serve(FakeEngine(["x"], parallel=3, **ENDLESS), adapters=(("lora", tmp_path / "lora"),))
    readers = [Reader(running), Reader(running, model="lora"), Reader(running)]
    wait_until(lambda: all(reader.reads for reader in readers))
    assert running.host.running == 3
    for reader in readers:
        reader.end()


def test_each_answer_tells_the_adapters_that_it_began_with(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")

    class Told(FakeEngine):
        def facts(self) -> Mapping[str, Any]:
            of_adapters = ("own", "c") if not self.active else ("brought", "torch")
            return {**super().facts(), **dict(zip(("template", "kernel"), of_adapters, strict=True))}

    running = serve(Told(["x"], parallel=3, **ENDLESS), adapters=(("lora", folder),))
    first = Reader(running, model="lora", max_tokens=400)
    wait_until(lambda: first.reads)
    (folder / "adapter_config.json").write_text('{"r": 2}')  # other numbers under the same name
    second, plain = Reader(running, model="lora", max_tokens=400), Reader(running, max_tokens=400)
    for reader in (first, second, plain):
        reader.join(SECONDS)
    told = [
        next(line["glmchat"] for line in reversed(events(reader)) if line.get("usage"))
        for reader in (first, second, plain)
    ]
    assert [[row["name"] for row in one["adapters"]] for one in told] == [["lora"], ["lora"], []]
    assert [one["template"] for one in told] == ["brought", "brought", "own"]
    assert [one["kernel"] for one in told] == ["torch", "torch", "c"]
    assert told[0]["adapter_hashes"]["lora"] != told[1]["adapter_hashes"]["lora"]


def events(reader: Reader) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in reader.lines if line.startswith("data: {")]


def test_adapters_are_changed_while_nobody_is_being_answered(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    running = serve(FakeEngine(["x"], parallel=4, **ENDLESS), adapters=(("lora", tmp_path / "lora"),))
    reader = Reader(running)
    wait_until(lambda: reader.reads)
    with ThreadPoolExecutor(1) as pool:
        client = running.another()
        loading = pool.submit(client.post, "/v1/load_lora_adapter", json={"lora_name": "lora"})
        wait_until(lambda: len(running.host.line) == 2)
        assert not running.engine.attached
        reader.end()
        assert loading.result(SECONDS).status_code == 200 and "lora" in running.engine.attached


def test_the_answers_of_one_request_are_written_together(serve: Serve) -> None:
    running = serve(FakeEngine(["one ", "two"], parallel=4))
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 3, "seed": 5}
    answer = running.client.post("/v1/chat/completions", json=body).json()
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["one two"] * 3
    assert answer["usage"]["completion_tokens"] == 6
    assert [sampling.seed for _, sampling in running.engine.asked] == [5, 6, 7]
    assert running.engine.steps > 0


@pytest.mark.parametrize("stream", [True, False])
def test_each_answer_of_a_request_tells_its_own_facts_and_the_request_their_sums(serve: Serve, stream: bool) -> None:
    running = serve(FakeEngine(["one ", "two"], parallel=4))
    body = {"messages": [{"role": "user", "content": "hi"}], "n": 3, "seed": 5, "stream": stream}
    answer = running.client.post("/v1/chat/completions", json=body)
    if stream:
        told = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    else:
        told = [answer.json()]
    ends = [choice for event in told for choice in event["choices"] if choice["finish_reason"]]
    assert {choice["index"]: choice["glmchat"]["seed"] for choice in ends} == {0: 5, 1: 6, 2: 7}
    assert told[-1]["usage"]["completion_tokens"] == told[-1]["timings"]["predicted_n"] == 6
    assert told[-1]["glmchat"]["seed"] == 5


def test_an_answer_that_was_given_up_says_nothing_of_how_long_one_takes(serve: Serve) -> None:
    running = serve(FakeEngine(["x"], parallel=2, **ENDLESS))
    reader = Reader(running)
    wait_until(lambda: reader.reads)
    reader.end()
    wait_until(lambda: not len(running.host.line))
    assert running.host.line.seconds_per_turn == 0
    running.ask(max_tokens=3)
    assert running.host.line.seconds_per_turn > 0


def test_one_that_fails_ends_alone(serve: Serve) -> None:
    class Failing(FakeEngine):
        def stream_tokens(self, *given: Any, **options: Any) -> Any:
            for number, chunk in enumerate(super().stream_tokens(*given, **options)):
                if given[1].seed == 13 and number == 3:
                    raise RuntimeError("it was this one")
                yield chunk

    running = serve(Failing(["x"], parallel=3, **ENDLESS))
    other = Reader(running)
    wait_until(lambda: other.reads)
    failed = running.ask(seed=13)
    assert failed.status_code == 500
    before = len(other.lines)
    wait_until(lambda: len(other.lines) > before + 3)
    other.end()


def test_a_request_of_several_answers_leaves_no_room_that_two_others_take_at_once(serve: Serve) -> None:
    class Watched(FakeEngine):
        most = 0
        gate = threading.Event()

        def step(self) -> None:
            super().step()
            self.most = max(self.most, running.host.writing)
            self.gate.wait(SECONDS)

    engine = Watched(["x"], parallel=4, **ENDLESS)
    running = serve(engine)
    readers = [Reader(running, n=3)]
    wait_until(lambda: engine.steps > 0)  # it stands in a step: whoever comes now joins together
    readers += [Reader(running) for _ in range(4)]
    wait_until(lambda: running.host._jobs.qsize() == 3)
    engine.gate.set()
    wait_until(lambda: sum(reader.reads for reader in readers) > 1 and engine.steps > 5)
    assert engine.most == 4
    readers.pop(0).end()
    wait_until(lambda: all(reader.reads for reader in readers))
    for reader in readers:
        reader.end()
    assert engine.most == 4


def test_who_has_more_answers_to_write_than_places_gives_none_away_twice(serve: Serve) -> None:
    class Watched(FakeEngine):
        most = 0

        def step(self) -> None:
            self.most = max(self.most, running.host.writing)

    engine = Watched(["x"] * 7, parallel=3, seconds_per_token=0.001)
    running = serve(engine)
    with ThreadPoolExecutor(6) as pool:
        clients = [running.another() for _ in range(6)]
        answers = list(pool.map(lambda client: client.post("/v1/chat/completions", json={**QUESTION, "n": 5}), clients))
    assert [len(answer.json()["choices"]) for answer in answers] == [5] * 6
    assert engine.most == 3


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("a bug")])
def test_where_no_step_computes_them_together_each_is_computed_alone(serve: Serve, failure: Exception) -> None:
    class Failing(FakeEngine):
        def step(self) -> None:
            super().step()
            raise failure

    running = serve(Failing(["one ", "two"] * 20, parallel=2))
    body = {**QUESTION, "n": 2}
    answer = running.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200 and running.engine.steps > 0
    assert [choice["message"]["content"] for choice in answer.json()["choices"]] == ["one two" * 20] * 2


def test_what_the_engine_never_expected_is_told_in_words(serve: Serve) -> None:
    class Failing(FakeEngine):
        def stream_tokens(self, *given: Any, **options: Any) -> Any:
            raise MemoryError

    running = serve(Failing())
    assert running.ask().json()["error"]["code"] == "memory"


def test_who_leaves_while_others_with_other_adapters_are_answered_keeps_no_place(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    running = serve(FakeEngine(["x"], parallel=3, mixes=False, **ENDLESS), adapters=(("lora", tmp_path / "lora"),))
    plain = Reader(running)
    wait_until(lambda: plain.reads)
    left = [connect(running, model="lora") for _ in range(3)]
    wait_until(lambda: len(running.host.line) == 4)
    for connection in left:
        connection.close()
    wait_until(lambda: len(running.host.line) == 1)
    before = len(plain.lines)
    wait_until(lambda: len(plain.lines) > before + 3)
    plain.end()


@pytest.mark.parametrize("stream", [True, False])
def test_who_waits_while_the_server_stops_is_told_so(serve: Serve, stream: bool) -> None:
    running = serve(FakeEngine(["x"], parallel=2, seconds_per_prefill=0.2, **ENDLESS))
    body = {**QUESTION, "stream": stream, "max_tokens": 900_000}
    with ThreadPoolExecutor(5) as pool:
        clients = [running.another() for _ in range(5)]
        asked = [pool.submit(client.post, "/v1/chat/completions", json=body) for client in clients]
        wait_until(lambda: len(running.host.line) == 5 and running.engine.steps > 0)
        running.server.stop()
        for answer in (one.result(SECONDS) for one in asked):
            assert answer.text.count('"code":"server.stopping"') == 1
            assert answer.text.count("[DONE]") == stream and "cancelled" not in answer.text


def test_places_are_counted_from_those_that_are_served() -> None:
    line = Line(waiting=2, parallel=3)
    places = [line.join() for _ in range(5)]
    assert [place.number for place in places] == [0, 0, 0, 1, 2]
    line.leave(places[0])
    assert [place.number for place in places[1:]] == [0, 0, 0, 1]


def test_a_real_engine_says_in_company_what_it_says_alone(tmp_path: Path, serve: Serve) -> None:
    folder = engine_builders.write_folder(tmp_path / "tiny", max_position_embeddings=512)
    engine = Engine.load(folder, quant=4, threads=1, parallel=8)
    running = serve(engine)
    bodies = [
        {"prompt": [n + 4, *range(20, 20 + 3 * n)], "max_tokens": 30, "seed": n, "temperature": 1.0, "ignore_eos": True}
        for n in range(8)
    ]

    def ask(body: dict[str, Any]) -> list[str]:
        answer = running.another().post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return [choice["text"] for choice in answer.json()["choices"]]

    alone = [ask(body) for body in bodies]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, bodies))
    assert together == alone
    text = running.client.get("/metrics").text
    assert "glmchat_answers_total 16\n" in text and "glmchat_answer_tokens_total 480\n" in text


def test_answers_with_different_adapters_are_what_they_are_alone_whoever_comes_and_goes(
    tmp_path: Path, serve: Serve
) -> None:
    """Threads ask at once, some leave in the middle, and the adapters change from one request to the next."""
    folder = engine_builders.write_folder(tmp_path / "tiny", max_position_embeddings=512)
    for number, name in enumerate(("small", "wide")):
        settings = {"target_modules": "all-linear", "r": 8} if number else {}
        adapter_builders.write_peft(folder, tmp_path / name, seed=number, **settings)
    engine = Engine.load(folder, quant=4, threads=1, parallel=5)
    running = serve(engine, adapters=tuple((name, tmp_path / name) for name in ("small", "wide")))
    weights = [(), (("small", 1.0),), (("wide", 1.0),), (("small", 0.5), ("wide", 0.5))]
    bodies = [
        {
            "prompt": [n + 4, *range(20, 20 + 2 * n)], "max_tokens": 20, "seed": n, "temperature": 1.0,
            "ignore_eos": True, "adapters": [{"name": name, "scale": scale} for name, scale in weights[n % 4]],
        }
        for n in range(12)
    ]  # fmt: skip
    chance = random.Random(1)

    def ask(body: dict[str, Any]) -> tuple[str, Any, Any]:
        answer = running.another().post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        told = answer.json()
        return told["choices"][0]["text"], told["glmchat"]["adapters"], told["glmchat"]["adapter_hashes"]

    def leave(body: dict[str, Any]) -> None:
        with running.another().stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            next(answer.iter_lines())

    alone = [ask(body) for body in bodies]
    assert len({text for text, _, _ in alone}) == len(bodies)
    order = chance.sample(range(12), 12)
    with ThreadPoolExecutor(8) as pool:  # as many as are served or may wait
        gone = [pool.submit(leave, bodies[n]) for n in chance.sample(range(12), 6)]
        together = dict(zip(order, pool.map(lambda n: ask(bodies[n]), order), strict=True))
        for one in gone:
            one.result(SECONDS)
    assert [together[n] for n in range(12)] == alone
    wait_until(lambda: running.host.writing == 0 and not running.host.line)
