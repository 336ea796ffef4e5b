"""Real clients against the real server: the `openai` package, our own endpoint, `glmchat serve` as a process.

Covers serve/run.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fakes import FakeEngine
from polling import wait_until
from running import Running, Serve

from glmchat.chat.client.endpoint import Endpoint, Progress
from glmchat.core.errors import DoesNotFit, ServerFailed
from glmchat.core.messages import Finished, Message, Piece, Sampling, Started

KEY = "sk-test"
QUESTION: list[Any] = [{"role": "user", "content": "hi"}]
HELLO = [Message("user", "hi")]


def client_of(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=running.url + "/v1", api_key=KEY, max_retries=0)


def test_the_openai_package_streams_lists_and_is_told_of_errors(serve: Serve) -> None:
    running = serve(FakeEngine(["你好，", "🌍", "!"], seconds_per_prefill=0.3), tcp=True, key=KEY)
    with client_of(running) as client:
        assert [m.id for m in client.models.list()] == ["fake"]
        stream = client.chat.completions.create(
            model="fake",
            messages=QUESTION,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"top_k": 4},
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "你好，🌍!"
        usage = chunks[-1].usage
        assert usage is not None and usage.completion_tokens == 3
        whole = client.chat.completions.create(model="fake", messages=QUESTION, max_tokens=2)
        assert whole.choices[0].message.content == "你好，🌍" and whole.choices[0].finish_reason == "length"
        text = client.completions.create(model="fake", prompt="abc")
        assert text.choices[0].text == "你好，🌍!"
        with pytest.raises(openai.NotFoundError, match="not served here"):
            client.chat.completions.create(model="gpt-4", messages=QUESTION)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="fake", messages=QUESTION, temperature=99)
    stranger = openai.OpenAI(base_url=running.url + "/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_a_stream_that_the_openai_package_closes_stops_the_engine(serve: Serve) -> None:
    running = serve(FakeEngine(["x"], repeat=100_000, seconds_per_token=0.005), tcp=True, key=KEY)
    with client_of(running) as client:
        stream = client.chat.completions.create(model="fake", messages=QUESTION, stream=True)
        assert any(c.choices[0].delta.content for c in stream)  # the engine is speaking
        stream.close()
    wait_until(lambda: running.engine.stopped)
    assert running.engine.stopped == 1


def test_our_own_endpoint_finds_all_that_our_server_says(serve: Serve, tmp_path: Path) -> None:
    engine = FakeEngine(["one ", "two"], seconds_per_prefill=0.5)
    running = serve(engine, tcp=True, key=KEY, adapters={"poet": tmp_path}, revision="r1")
    endpoint = Endpoint(running.url, key=KEY)
    assert endpoint.choose_model() == "fake" and endpoint.is_glmchat and not endpoint.is_local
    assert endpoint.health().status == "ok"
    assert [(m.name, m.parent, m.context) for m in endpoint.models()] == [("fake", None, 4096), ("poet", "fake", 4096)]
    assert len(endpoint.tokenize("hé")) == 2
    assert len(endpoint.tokenize(HELLO)) == len("<user>hi<assistant>")
    seen: list[Progress] = []
    sampling = Sampling(top_k=3, min_p=0.25, repetition_penalty=1.5, seed=11, max_tokens=9)
    events = list(endpoint.stream(HELLO, sampling, [("poet", 0.5)], on_progress=seen.append))
    first, last = events[0], events[-1]
    assert isinstance(first, Started) and first.prompt_tokens == len("<user>hi<assistant>") and first.model == "fake"
    assert [(e.text, e.token_ids) for e in events if isinstance(e, Piece)] == [("one ", (0,)), ("two", (1,))]
    assert isinstance(last, Finished) and last.finish_reason == "stop" and last.seed == 11
    assert last.cached_tokens == 0 and last.prefill_tokens_per_second and last.load_seconds is not None
    assert last.facts["revision"] == "r1" and last.facts["adapters"] == [{"name": "poet", "scale": 0.5}]
    assert engine.asked[-1][1] == sampling
    assert Progress(waiting=0) in seen and Progress(prefill_done=19, prefill_total=19) in seen
    list(endpoint.complete("abc", Sampling()))
    assert engine.asked[-1][1].max_tokens is None, "a completion of our own is not cut after 16 tokens"
    list(endpoint.complete("abc", sampling))
    assert engine.asked[-1][0] == [97, 98, 99]
    so_far = [*HELLO, Message("assistant", "so")]
    list(endpoint.stream(so_far, sampling, continue_final=True, continue_ids=(4, 5)))
    assert engine.asked[-1][0][-2:] == [4, 5]
    endpoint.load_adapter("poet")
    endpoint.unload_adapter("poet")


def test_our_servers_errors_come_back_as_they_were_raised(serve: Serve) -> None:
    running = serve(FakeEngine(context=10), tcp=True, key=KEY)
    with pytest.raises(DoesNotFit) as raised:
        list(Endpoint(running.url, key=KEY).stream(HELLO, Sampling()))
    assert raised.value.code == "context.full" and raised.value.exit == 4
    with pytest.raises(ServerFailed) as refused:
        Endpoint(running.url, key="wrong").models()
    assert refused.value.code == "server.auth" and "OPENAI_API_KEY" in refused.value.hint
    assert "rejected the key: this key is wrong" in refused.value.message
    with pytest.raises(ServerFailed, match="wants a key: a key is needed") as missing:
        Endpoint(running.url).models()
    assert missing.value.code == "server.auth" and "put it in OPENAI_API_KEY" in missing.value.hint


@pytest.fixture
def glmchat_serve(starter_model: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`glmchat serve` with the real starter model; gives (process, url)."""
    command = [sys.executable, "-P", "-m", "glmchat", "serve", str(starter_model), "--port", "0", "--json"]
    environment = {**os.environ, "GLMCHAT_API_KEY": KEY}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/", env=environment
    ) as process:
        assert process.stdout is not None
        listening = json.loads(process.stdout.readline())
        assert listening["event"] == "listening" and listening["key_needed"]
        assert json.loads(process.stdout.readline())["event"] == "ready"
        yield process, listening["url"]
        process.kill()


def test_the_openai_package_streams_from_glmchat_serve_with_a_real_model(
    glmchat_serve: tuple[subprocess.Popen[str], str],
) -> None:
    process, url = glmchat_serve
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        model = client.models.list().data[0].id
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    assert "Paris" in "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens >= 3
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert process.stderr is not None and KEY not in process.stderr.read()
