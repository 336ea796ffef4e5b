"""An engine whose weights lie on a slow disk: while they are hashed, everything else is answered.

Covers engine/identity.py, core/fingerprints.py, serve/host.py.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fakes import FakeChunk, FakeEngine

from glmchat.core.fingerprints import FilePrint, whole
from glmchat.engine import Engine, identity

SECONDS = 10  # for what does not wait
QUESTION = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "return_token_ids": True}
SHORT = {**QUESTION, "max_tokens": 4, "temperature": 0}


class Disk:
    """Gives the weights to whoever hashes them once `ready` is set."""

    def __init__(self, read: Callable[[Iterable[Path]], tuple[FilePrint, ...]]) -> None:
        self.ready = threading.Event()
        self._read = read

    def fingerprint(self, paths: Iterable[Path]) -> tuple[FilePrint, ...]:
        assert self.ready.wait(120)
        return self._read(paths)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    slow = Disk(identity.fingerprint)
    monkeypatch.setattr(identity, "fingerprint", slow.fingerprint)
    yield slow
    slow.ready.set()


@pytest.fixture
def engine(starter_model: Path, disk: Disk) -> Iterator[Engine]:
    loaded = Engine.load(starter_model, context=256)
    loaded.identify()
    yield loaded
    loaded.close()


def chunks(reply: httpx2.Response) -> Iterator[dict[str, Any]]:
    for line in reply.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def test_models_health_and_the_first_chunk_come_while_the_weights_are_hashed(
    serve: Any, engine: Engine, disk: Disk, starter_model: Path
) -> None:
    running = serve(engine)
    (model,) = running.client.get("/v1/models", timeout=SECONDS).json()["data"]
    assert model["family"] == "llama"
    with running.client.stream("POST", "/v1/chat/completions", json=SHORT, timeout=SECONDS) as reply:
        answer = chunks(reply)
        first = next(chunk for chunk in answer if "glmchat" in chunk)
        assert first["choices"][0]["token_ids"]
        assert first["glmchat"]["weights"] is None
        assert first["glmchat"]["versions"]["glmchat"]
        assert running.another().get("/health", timeout=SECONDS).json() == {"status": "ok"}
        assert not disk.ready.is_set()
        disk.ready.set()
        last = list(answer)[-1]
    assert last["choices"][0]["finish_reason"] == "length"
    ((name, _, _, digest),) = last["glmchat"]["weights"]["files"]
    assert (name, digest) == (starter_model.name, whole(starter_model))


def test_a_second_answer_is_made_while_the_last_words_of_the_first_wait_for_hashes(serve: Any, engine: Engine) -> None:
    running = serve(engine)
    with running.client.stream("POST", "/v1/chat/completions", json=SHORT, timeout=SECONDS) as one:
        assert any("glmchat" in chunk for chunk in chunks(one))
        with running.another().stream("POST", "/v1/chat/completions", json=SHORT, timeout=SECONDS) as two:
            assert any("glmchat" in chunk for chunk in chunks(two))


def test_a_stop_does_not_wait_for_hashes(serve: Any, engine: Engine, disk: Disk) -> None:
    running = serve(engine)
    with running.client.stream("POST", "/v1/chat/completions", json=SHORT, timeout=SECONDS) as reply:
        answer = chunks(reply)
        assert any("glmchat" in chunk for chunk in answer)
        running.server.stop()
        last = list(answer)[-1]
    assert "error" in last or last["glmchat"]["weights"] is None
    running.thread.join(SECONDS)
    assert not running.thread.is_alive()
    assert not disk.ready.is_set()


def test_hashes_that_become_known_in_the_middle_of_an_answer_come_with_its_next_piece(serve: Any) -> None:
    class Hashing(FakeEngine):
        def facts(self) -> dict[str, Any]:
            return {**super().facts(), "weights": {"hash": "aa"} if self.identified else None}

        def stream_ids(self, *given: Any, **named: Any) -> Any:
            for number, chunk in enumerate(super().stream_ids(*given, **named)):
                if number == 3:
                    assert seen.wait(SECONDS)
                    self.identified = True
                facts = chunk.facts if number else {"passes": [[0, 2]]}
                yield FakeChunk(chunk.text, chunk.token_ids, chunk.finish_reason, facts)

    seen = threading.Event()
    fake = Hashing(["one ", "two ", "three ", "four ", "five"])
    fake.identified = False
    running = serve(fake)
    told: list[Any] = []
    text = ""
    with running.client.stream("POST", "/v1/chat/completions", json=QUESTION, timeout=SECONDS) as reply:
        for chunk in chunks(reply):
            if said := chunk["choices"][0]["delta"].get("content"):
                text += said
                told.append(chunk["glmchat"]["weights"] if "glmchat" in chunk else "nothing")
            if "three" in text:
                seen.set()
    assert text == "one two three four five" and told[0] is None
    assert [one for one in told if one != "nothing"] == [None, {"hash": "aa"}]
