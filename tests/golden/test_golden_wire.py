"""What stands on the wire between the faces and an engine, byte for byte where it is the same every time."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fake_server import fake_command
from golden_files import Golden
from polling import wait_until

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "seed": 5}
JSON = {"Content-Type": "application/json"}
VOLATILE = ("id", "created", "prompt_ms", "predicted_ms", "load_ms")
FIELDS: dict[str, Any] = {  # what a request may say, with a value that changes nothing else of the answer
    "model": "fake", "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1,
    "repeat_penalty": 1.1, "seed": 3, "max_tokens": 1, "max_completion_tokens": 1, "max_new_tokens": 1,
    "stop": ["x"], "ignore_eos": True, "adapters": [{"name": "poet", "scale": 0.5}],
    "n": 1, "tools": [], "logprobs": False, "response_format": {"type": "text"}, "user": "me",
    "logit_bias": {"1": 1}, "presence_penalty": 1, "frequency_penalty": 1, "min_tokens": 2, "stop_token_ids": [1],
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "n": 99, "best_of": 2, "logprobs": "yes", "top_logprobs": 1, "echo": True, "suffix": "x", "tools": [{}],
    "functions": [{}], "logit_bias": {"x": 1}, "presence_penalty": 3, "frequency_penalty": -3, "unknown": 1,
    "response_format": {"type": "x"}, "guided_json": 1, "mirostat": 2,
    "temperature": "hot", "top_k": 1.5, "stop": [""], "stream": "yes",
    "model": "nobody", "messages": [], "adapters": [{"scale": 1}], "continue_final": True,
}  # fmt: skip


@dataclass
class Wire:
    client: httpx2.Client

    def post(self, path: str, body: Any) -> Any:
        return self.client.post(path, json=body)

    def stream(self, path: str = "/v1/chat/completions", *, told: bool = False, **fields: Any) -> list[Any]:
        """The events of a stream: objects, the word at its end, and comments if they are asked for."""
        body = {**(ASK if "messages" not in fields and "prompt" not in fields else {}), **fields, "stream": True}
        headers = {"X-Glmchat-Progress": "1"} if told else {}
        text = self.client.post(path, json=body, headers=headers).text
        return [readable(event) for event in text.strip().split("\n\n")]


def readable(event: str) -> Any:
    if event.startswith("data: {"):
        return steady(json.loads(event.removeprefix("data: ")))
    return event


def steady(value: Any, key: str = "") -> Any:
    """Sentences, hashes and the numbers that differ from run to run by what they are."""
    if isinstance(value, dict):
        return {name: steady(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [steady(item) for item in value]
    if key in ("message", "hint"):  # sentences; their code beside them says what they mean
        return "<sentence>"
    if isinstance(value, str) and value.startswith(("sha256:", "sample:")):
        return f"{str(value).partition(':')[0]}:…"
    if key in VOLATILE and value is not None:
        kind = "number" if isinstance(value, (int, float)) else str(value).partition("-")[0] + "-…"
        return value if key == "id" and value in ("fake", "poet") else f"<{kind}>"
    return value


def told(answer: httpx2.Response) -> list[Any]:
    return [answer.status_code, steady(answer.json())]


@contextmanager
def serving(adapter: Path, **behaviour: Any) -> Iterator[Wire]:
    """The child that a face starts, with a fake engine in it."""
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        socket = Path(folder) / "s"
        arguments = ("--folder", folder, "--model", "fake", "--revision", "abc", "--quant-label", "int4")
        command = (*fake_command(**behaviour), *arguments, "--uds", str(socket), "--adapter", f"poet={adapter}")
        child = subprocess.Popen([*command, "--lifeline"], stdin=subprocess.PIPE, cwd="/", stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: socket.exists() or child.poll() is not None)
            transport = httpx2.HTTPTransport(uds=str(socket), retries=5)
            with httpx2.Client(transport=transport, base_url="http://localhost", timeout=99, trust_env=False) as client:
                yield Wire(client)
        finally:
            assert child.stdin is not None
            child.stdin.close()
            child.wait(60)


def health_until(wire: Wire, statuses: tuple[str, ...]) -> httpx2.Response:
    wait_until(lambda: wire.client.get("/health").json()["status"] in statuses)
    return wire.client.get("/health")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "poet"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 64)
    return folder


@pytest.fixture
def wire(adapter: Path) -> Iterator[Wire]:
    with serving(
        adapter, pieces=["one ", "", "two", "三"], seconds_per_token=0.03
    ) as started:  # faster ones are joined
        health_until(started, ("ok",))
        yield started


def test_streams_and_answers_keep_their_form(golden: Golden, wire: Wire) -> None:
    chat, complete = "/v1/chat/completions", "/v1/completions"
    ids: dict[str, Any] = {"return_token_ids": True}
    golden("wire_answers.json", {
        "chat, streamed": wire.stream(),
        "chat, streamed and told of progress": wire.stream(told=True),
        "chat, streamed with ids": wire.stream(**ids),
        "two chats, streamed": wire.stream(n=2, stream_options={"include_usage": True}),
        "chat, streamed with usage": wire.stream(stream_options={"include_usage": True}),
        "chat, streamed with an adapter": wire.stream(adapters=[{"name": "poet", "scale": 0.5}], max_tokens=1),
        "chat": steady(wire.post(chat, ASK).json()),
        "chat with ids": steady(wire.post(chat, {**ASK, **ids}).json()),
        "chat, continued": steady(wire.post(chat, {
            "messages": [*ASK["messages"], {"role": "assistant", "content": "so f"}], "seed": 5,
            "continue_final": True, "continue_token_ids": [1, 2], "return_token_ids": True,
        }).json()),
        "completion, streamed": wire.stream(complete, prompt="ab", seed=5),
        "completion, streamed with ids": wire.stream(complete, prompt="ab", seed=5, **ids),
        "completion": steady(wire.post(complete, {"prompt": [5, 6], "seed": 5}).json()),
    })  # fmt: skip


def test_what_is_no_answer_keeps_its_form(golden: Golden, wire: Wire) -> None:
    get, post = wire.client.get, wire.post
    golden("wire_routes.json", {
        "models": steady(get("/v1/models").json()),
        "health": steady(get("/health").json()),
        "tokenize a text": post("/tokenize", {"prompt": "né"}).json(),
        "tokenize messages": post("/tokenize", ASK).json(),
        "load an adapter": post("/v1/load_lora_adapter", {"lora_name": "poet"}).text,
        "unload an adapter": post("/v1/unload_lora_adapter", {"lora_name": "poet"}).text,
        "unload an unknown adapter": told(post("/v1/unload_lora_adapter", {"lora_name": "x"})),
        "no such address": told(get("/nothing")),
        "no such method": told(get("/v1/completions")),
        "no JSON": told(wire.client.post("/v1/completions", content=b"{", headers=JSON)),
    })  # fmt: skip


def test_every_field_of_a_request_is_taken_or_refused_as_it_was(golden: Golden, wire: Wire) -> None:
    seen: dict[str, Any] = {"taken": {}, "refused": {}}
    for name, value in FIELDS.items():
        facts = wire.post("/v1/chat/completions", {**ASK, name: value}).json()["glmchat"]
        seen["taken"][name] = {"sampling": facts["sampling"], "adapters": facts["adapters"]}
    for name, value in REFUSED.items():
        answer = wire.post("/v1/chat/completions", {**ASK, name: value})
        seen["refused"][name] = [answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["type"]]
    golden("wire_fields.json", seen)


def test_a_load_is_told_while_it_lasts_and_when_it_fails(golden: Golden, adapter: Path) -> None:
    seen: dict[str, Any] = {}
    with serving(adapter, seconds_to_load=60) as loading:
        seen["loading"] = told(loading.client.get("/health"))
        early = loading.post("/v1/chat/completions", ASK)
        seen["asked too early"] = [*told(early), early.headers["retry-after"]]
    failure = {"code": "gguf.cut", "message": "w is cut", "hint": "pull it", "exit": 3}
    with serving(adapter, load_failure=failure) as failed:
        seen["failed"] = told(health_until(failed, ("failed",)))
        seen["asked too late"] = told(failed.post("/v1/chat/completions", ASK))
    golden("wire_health.json", seen)


def test_an_answer_that_breaks_or_does_not_fit_is_told_in_the_same_form(golden: Golden, adapter: Path) -> None:
    seen: dict[str, Any] = {}
    with serving(adapter, pieces=["a", "b"], fail_after=1, context=30) as broken:
        health_until(broken, ("ok",))
        seen["broken stream"] = broken.stream()
        seen["broken answer"] = broken.post("/v1/chat/completions", ASK).status_code
        long = [{"role": "user", "content": "x" * 90}]
        seen["full"] = told(broken.post("/v1/chat/completions", {"messages": long}))
    golden("wire_failures.json", seen)
