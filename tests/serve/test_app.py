"""The API as clients see it: answers whole and streamed, lists, counts, health, errors.

Covers serve/answer.py, serve/render.py, serve/face.py.
"""

from __future__ import annotations

import gzip
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from fakes import FakeEngine
from polling import SECONDS, wait_until
from running import Serve

from glmchat.core.decoding import TokenLogprob
from glmchat.core.errors import Damaged, Usage
from glmchat.serve.answer import PIECE_INTERVAL

Report = Callable[[str, float], None]


def events(text: str) -> list[Any]:
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ") and line != "data: [DONE]"]


def test_an_answer_has_its_text_and_what_is_known_of_it(serve: Serve) -> None:
    running = serve(FakeEngine(["one ", "two"]), revision="abc", quant_label="q4_1")
    answer = running.ask(seed=5, return_token_ids=True).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "one two"}
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["token_ids"] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 2
    assert answer["usage"]["prompt_tokens"] == len(answer["prompt_token_ids"]) == len("<user>hi<assistant>")
    assert set(answer["timings"]) == {"prompt_n", "cache_n", "prompt_ms", "predicted_n", "predicted_ms"}
    facts = answer["glmchat"]
    assert (facts["model"], facts["revision"], facts["quant"], facts["seed"]) == ("fake", "abc", "q4_1", 5)
    assert {"adapters", "cached_n", "threads", "kernel", "load_ms"} <= set(facts)


def test_a_stream_carries_the_prompts_ids_first_and_the_facts_last(serve: Serve) -> None:
    running = serve(FakeEngine(["你好", "，world"]))
    text = running.ask(stream=True, return_token_ids=True).text
    chunks = events(text)
    assert text.endswith("data: [DONE]\n\n")
    assert chunks[0]["prompt_token_ids"] == [ord(c) for c in "<user>hi<assistant>"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "你好，world"
    assert [i for c in chunks for i in c["choices"][0]["token_ids"]] == [0, 1]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["completion_tokens"] == 2
    assert chunks[-1]["timings"]["predicted_n"] == 2 and chunks[-1]["glmchat"]["model"] == "fake"
    assert len({c["id"] for c in chunks}) == 1


def test_without_being_asked_a_stream_holds_no_ids_but_still_its_facts(serve: Serve) -> None:
    chunks = events(serve().ask(stream=True).text)
    assert "prompt_token_ids" not in chunks[0]
    assert all("token_ids" not in c["choices"][0] for c in chunks)
    assert chunks[-1]["usage"]["total_tokens"] == len("<user>hi<assistant>") + 2


def test_include_usage_puts_the_usage_into_a_chunk_without_choices(serve: Serve) -> None:
    chunks = events(serve().ask(stream=True, stream_options={"include_usage": True}).text)
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop" and chunks[-2]["usage"] is None
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 2
    assert chunks[-1]["timings"]["predicted_n"] == 2


def test_half_a_character_is_no_chunk_but_its_ids_are_not_lost(serve: Serve) -> None:
    running = serve(FakeEngine(["", "好"]))
    assert [c["choices"][0]["delta"].get("content") for c in events(running.ask(stream=True).text)] == ["", "好", None]
    with_ids = events(running.ask(stream=True, return_token_ids=True).text)
    assert [i for c in with_ids for i in c["choices"][0]["token_ids"]] == [0, 1]


def contents(chunks: list[Any]) -> list[str]:
    return [c["choices"][0]["delta"]["content"] for c in chunks if c["choices"][0]["delta"].get("content")]


def test_pieces_faster_than_a_screen_shows_come_joined_and_none_is_lost(serve: Serve) -> None:
    running = serve(FakeEngine([f"{number} " for number in range(600)]))
    chunks = events(running.ask(stream=True, return_token_ids=True).text)
    texts = contents(chunks)
    assert texts[0] == "0 ", "the first one waits for nobody"
    assert "".join(texts) == "".join(f"{number} " for number in range(600))
    assert [number for c in chunks for number in c["choices"][0].get("token_ids") or ()] == list(range(600))
    assert len(texts) < 300


def test_a_piece_waits_for_the_next_one_no_longer_than_a_picture_of_the_screen(serve: Serve) -> None:
    running = serve(FakeEngine(["a", "b", "c", "d"], seconds_per_token=5 * PIECE_INTERVAL))
    assert contents(events(running.ask(stream=True).text)) == ["a", "b", "c", "d"]


def test_pieces_before_a_failure_arrive(serve: Serve) -> None:
    running = serve(FakeEngine([f"{number} " for number in range(50)], fail_after=40))
    assert "".join(contents([c for c in events(running.ask(stream=True).text) if "choices" in c])) == "".join(
        f"{number} " for number in range(40)
    )


def test_max_tokens_cuts_and_says_length(serve: Serve) -> None:
    answer = serve(FakeEngine(["a"] * 9)).ask(max_completion_tokens=3).json()
    assert answer["choices"][0] | {"logprobs": None} == {
        "index": 0,
        "finish_reason": "length",
        "logprobs": None,
        "message": {"role": "assistant", "content": "aaa"},
    }


def test_a_completion_continues_a_text_or_ids(serve: Serve) -> None:
    running = serve()
    answer = running.client.post("/v1/completions", json={"prompt": "abc"}).json()
    assert answer["object"] == "text_completion" and answer["choices"][0]["text"] == "one two"
    running.client.post("/v1/completions", json={"prompt": [5, 6]})
    streamed = events(running.client.post("/v1/completions", json={"prompt": ["x"], "stream": True}).text)
    assert "".join(c["choices"][0]["text"] for c in streamed) == "one two"
    assert [ids for ids, _ in running.engine.asked] == [[97, 98, 99], [5, 6], [120]]


def test_the_sampling_of_a_request_reaches_the_engine_and_the_rest_comes_from_the_model(serve: Serve) -> None:
    running = serve(sampling={"temperature": 0.5, "top_k": 7})
    running.ask(top_p=0.9, min_p=0.1, repetition_penalty=1.2, seed=3, stop="###", max_tokens=9, ignore_eos=True)
    used = running.engine.asked[-1][1]
    assert (used.temperature, used.top_k, used.top_p, used.min_p) == (0.5, 7, 0.9, 0.1)
    assert (used.repetition_penalty, used.seed, used.stop, used.max_tokens) == (1.2, 3, ("###",), 9)
    assert used.ignore_eos


def test_an_unfinished_answer_is_continued_from_its_last_token(serve: Serve) -> None:
    running = serve()
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "so f"}]
    running.client.post("/v1/chat/completions", json={"messages": messages, "continue_final": True})
    running.client.post(
        "/v1/chat/completions", json={"messages": messages, "continue_final": True, "continue_token_ids": [1, 2]}
    )
    prompt = [ord(c) for c in "<user>q<assistant>"]
    assert running.engine.asked[0][0] == prompt + [ord(c) for c in "so f"]
    assert running.engine.asked[1][0] == [*prompt, 1, 2]


def test_models_lists_the_base_and_the_adapters(serve: Serve, tmp_path: Path) -> None:
    rows = serve(adapters={"poet": tmp_path}).client.get("/v1/models").json()["data"]
    assert [(r["id"], r["parent"]) for r in rows] == [("fake", None), ("poet", "fake")]
    assert rows[0]["max_model_len"] == 4096 and rows[0]["owned_by"] == "glmchat"


def test_an_adapter_is_chosen_by_model_name_or_by_list_and_off_again(serve: Serve, tmp_path: Path) -> None:
    running = serve(adapters={"poet": tmp_path})
    active = []
    for fields in ({"model": "poet"}, {}, {"adapters": [{"name": "poet", "scale": 0.5}]}, {"model": "fake"}):
        answer = running.ask(**fields).json()
        active.append((dict(running.engine.active), answer["glmchat"]["adapters"]))
    assert [a for a, _ in active] == [{"poet": 1.0}, {}, {"poet": 0.5}, {}]
    assert active[2][1] == [{"name": "poet", "scale": 0.5}]


def test_adapters_are_loaded_by_store_name_and_never_by_path(serve: Serve, tmp_path: Path) -> None:
    running = serve(adapters={"poet": tmp_path})

    def post(what: str, **body: Any) -> int:
        return running.client.post(f"/v1/{what}_lora_adapter", json=body).status_code

    assert post("load", lora_name="poet") == 200 and "poet" in running.engine.attached
    assert post("load", lora_name="poet", lora_path=str(tmp_path)) == 400
    for name in ("../../etc", "/etc", ".", "", "nobody", "a\0b"):
        assert post("load", lora_name=name) in (400, 404)
    assert post("unload", lora_name="poet") == 200 and not running.engine.attached
    assert post("unload", lora_name="poet") == 404


def test_an_adapter_of_the_store_is_found_by_name(serve: Serve) -> None:
    from glmchat.core.locations import adapters_dir

    (adapters_dir() / "haiku").mkdir(parents=True)
    running = serve()
    assert running.ask(model="haiku").status_code == 200
    assert running.engine.active == {"haiku": 1.0}


def test_an_adapter_that_was_replaced_under_its_name_is_read_again_and_a_removed_one_is_forgotten(
    serve: Serve, tmp_path: Path
) -> None:
    store = tmp_path / "store"

    def put(number: int) -> None:
        """As the store does: the folder is whole or absent."""
        (tmp_path / f"new-{number}").mkdir()
        (tmp_path / f"new-{number}" / "adapter_model.safetensors").write_bytes(bytes([number]))
        if store.exists():
            store.rename(tmp_path / f"old-{number}")
        (tmp_path / f"new-{number}").rename(store)

    put(1)
    running = serve(adapters={"poet": store})
    answers = [running.ask(model="poet").json() for _ in range(2)]
    put(2)
    answers += [running.ask(model="poet").json() for _ in range(2)]
    assert running.engine.attachments == ["poet", "poet"] and running.engine.active == {"poet": 1.0}
    hashes = [answer["glmchat"]["adapter_hashes"]["poet"] for answer in answers]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]
    store.rename(tmp_path / "gone")
    assert running.ask(model="poet").status_code == 404
    assert running.ask().status_code == 200 and not running.engine.attached
    assert [row["id"] for row in running.client.get("/v1/models").json()["data"]] == ["fake"]


def test_what_the_chat_template_is_told_reaches_the_prompt(serve: Serve) -> None:
    running, told = serve(), {"chat_template_kwargs": {"enable_thinking": False}}
    running.ask(**told)
    assert "".join(map(chr, running.engine.asked[-1][0])).startswith("{enable_thinking=False}<user>")
    talk = {"messages": [{"role": "user", "content": "hi"}]}
    counts = [running.client.post("/tokenize", json=talk | more).json()["count"] for more in ({}, told)]
    assert counts[1] - counts[0] == len("{enable_thinking=False}")


def test_tokenize_counts_text_and_messages(serve: Serve) -> None:
    client = serve().client
    for body in ({"prompt": "héllo"}, {"text": "héllo"}, {"content": "héllo"}):
        assert client.post("/tokenize", json=body).json() == {
            "count": 5,
            "tokens": [ord(c) for c in "héllo"],
            "max_model_len": 4096,
        }
    rendered = client.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()
    assert rendered["count"] == len("<user>hi<assistant>")


def test_a_harness_finds_the_tokenizer_and_gets_its_text_back(serve: Serve) -> None:
    """vLLM's /tokenizer_info and /detokenize, as lm-eval's RemoteTokenizer asks for them."""
    client = serve().client
    info = client.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"], info["chat_template"]) == ("<end>", None, None)
    asked: Any = {"prompt": "<end>", "add_special_tokens": False}
    assert client.post("/tokenize", json=asked).json()["tokens"] == [1]
    plain: tuple[dict[str, Any], ...] = ({"prompt": "<end>"}, {"prompt": "<end> ", "add_special_tokens": False})
    for each in plain:
        assert client.post("/tokenize", json=each).json()["tokens"] == [ord(c) for c in each["prompt"]]
    ids = client.post("/tokenize", json={"prompt": "héllo 你", "add_special_tokens": False}).json()["tokens"]
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "héllo 你"}
    refusals: tuple[Any, ...] = ("a", [1, "a"], [-1], [[1]])
    for wrong in refusals:
        refused = client.post("/detokenize", json={"tokens": wrong})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "tokens"


def test_health_goes_from_loading_to_ok(serve: Serve) -> None:
    gate = threading.Event()

    def load(report: Report) -> FakeEngine:
        report("weights", 0.42)
        assert gate.wait(SECONDS)
        return FakeEngine()

    running = serve(load=load)
    wait_until(lambda: running.client.get("/health").json().get("stage") == "weights")
    seen = running.client.get("/health")
    assert seen.status_code == 503 and seen.json() == {"status": "loading", "stage": "weights", "done": 0.42}
    early = running.ask()
    assert early.status_code == 503 and early.json()["error"]["code"] == "server.loading"
    assert early.headers["retry-after"] == "1"
    gate.set()
    wait_until(lambda: running.client.get("/health").status_code != 503)
    assert running.client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("failure", [Damaged("w is cut", hint="pull it", code="gguf.cut"), RuntimeError("odd")])
def test_health_tells_why_the_load_failed(serve: Serve, failure: Any) -> None:
    def load(report: Report) -> FakeEngine:
        raise failure

    running = serve(load=load)
    wait_until(lambda: running.client.get("/health").status_code != 503)
    answer = running.client.get("/health")
    error = answer.json()["error"]
    assert answer.status_code == 500 and answer.json()["status"] == "failed"
    assert set(error) >= {"code", "message", "hint"} and str(failure.args[0]) in error["message"]
    assert running.ask().status_code == 500


def test_an_engine_that_fails_in_the_middle_is_told_and_serves_the_next(serve: Serve) -> None:
    engine = FakeEngine(["a", "b", "c"], fail_after=1)
    running = serve(engine)
    chunks = events(running.ask(stream=True).text)
    assert chunks[-1]["error"]["code"] == "engine.failed" and "told to fail" in chunks[-1]["error"]["message"]
    assert running.ask().status_code == 500
    engine.fail_after = None
    assert running.ask().json()["choices"][0]["message"]["content"] == "abc"


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(serve: Serve) -> None:
    answer = serve(FakeEngine(context=10)).ask(stream=True)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["code"] == "context.full"
    assert "19" in error["message"] and "10" in error["message"] and error["exit"] == 4


@pytest.mark.parametrize("size", [5_000_000, 15_000_000])
def test_a_prompt_of_any_size_is_too_long_and_no_fault_of_the_model(serve: Serve, size: int) -> None:
    engine = FakeEngine(context=100)
    engine.render = engine.complete = lambda *given: pytest.fail("it is refused before it is rendered")  # type: ignore
    running = serve(engine)
    body = {"messages": [{"role": "user", "content": "word " * (size // 5)}]}
    for path, asked in (("chat/completions", body), ("completions", {"prompt": "word " * (size // 5)})):
        answer = running.client.post(f"/v1/{path}", json=asked)
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "context.full"
        assert str(size // 1000) in answer.json()["error"]["message"], "the fake engine's tokens are characters"


def test_an_unknown_model_is_refused_with_those_that_are_there(serve: Serve) -> None:
    answer = serve().ask(model="gpt-4")
    assert answer.status_code == 404 and "fake" in answer.json()["error"]["hint"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/v1/completions", 405)])
def test_wrong_addresses_are_told_in_the_apis_own_form(serve: Serve, method: str, path: str, status: int) -> None:
    answer = serve().client.request(method, path)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_model_is_found_by_its_name_as_the_openai_package_asks_for_it(serve: Serve, tmp_path: Path) -> None:
    running = serve(model="org/fake:int4", revision="abc", adapters={"poet": tmp_path}, tcp=True, key="k")
    with openai.OpenAI(base_url=running.url + "/v1", api_key="k", max_retries=0) as client:
        rows = {row.id: row for row in client.models.list()}
        assert {name: client.models.retrieve(name) for name in rows} == rows and set(rows) == {"org/fake:int4", "poet"}
        assert client.models.retrieve("org/fake:int4@abc") == rows["org/fake:int4"]
        with pytest.raises(openai.NotFoundError, match="not served here") as missing:
            client.models.retrieve("nobody/else")
        assert missing.value.code == "model_not_found" and "org/fake:int4" in str(missing.value.body)
    bearer = {"Authorization": "Bearer k"}
    for path in ("org/fake:int4", "org%2Ffake%3Aint4", "org%2Ffake:int4%40abc", "poet"):
        assert running.client.get(f"/v1/models/{path}", headers=bearer).status_code == 200
        assert running.client.head(f"/v1/models/{path}", headers=bearer).status_code == 200


def test_a_base_address_with_a_slash_at_its_end_is_the_same_address(serve: Serve) -> None:
    running = serve(tcp=True)
    address = ("127.0.0.1", int(running.url.rpartition(":")[2]))
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    post = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    for line, rest in (
        *((f"GET {path}", "\r\n") for path in ("/v1//models", "//v1/models", "/v1/models/", "/v1//models//fake/")),
        *(
            (f"POST {path}", post)
            for path in ("/v1//chat/completions", "/v1/chat/completions/", "//v1//chat//completions")
        ),
    ):
        with socket.create_connection(address, timeout=SECONDS) as raw:
            raw.sendall(f"{line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{rest}".encode())
            assert raw.makefile("rb").readline().split()[1] == b"200", line


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/responses", "/v1/moderations", "/v1/images/generations"])
def test_what_of_openais_api_is_not_there_is_refused_by_its_name(serve: Serve, path: str) -> None:
    answer = serve().client.post(path, json={"input": "x"})
    error = answer.json()["error"]
    assert answer.status_code == 404 and "not served" in error["message"] and "/v1/chat/completions" in error["hint"]


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_have_their_answers_in_order_with_the_prompt_before_each(serve: Serve, stream: bool) -> None:
    """`prompt` and `echo` as https://platform.openai.com/docs/api-reference/completions has them."""
    running = serve(FakeEngine(["x"]), tcp=True, key="k")
    with openai.OpenAI(base_url=running.url + "/v1", api_key="k", max_retries=0) as client:
        said: dict[int, str] = {}
        usage = None
        for prompt in (["ab", "c"], [[97, 98], [99]]):
            asked: Any = {"model": "fake", "prompt": prompt, "n": 2, "echo": True, "seed": 5}
            if stream:
                for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
                    usage = chunk.usage or usage
                    for choice in chunk.choices:
                        said[choice.index] = said.get(choice.index, "") + choice.text
            else:
                answer = client.completions.create(**asked)
                said, usage = {choice.index: choice.text for choice in answer.choices}, answer.usage
            assert said == {0: "abx", 1: "abx", 2: "cx", 3: "cx"}
            assert usage is not None and (usage.prompt_tokens, usage.completion_tokens) == (3, 4)
            said = {}
    assert [(ids, sampling.seed) for ids, sampling in running.engine.asked[:4]] == [
        ([97, 98], 5),
        ([97, 98], 6),
        ([99], 5),
        ([99], 6),
    ]


@pytest.mark.parametrize("coding", ["gzip", "br", "identity, gzip", "GZIP"])
def test_a_compressed_body_is_refused_as_one(serve: Serve, coding: str) -> None:
    headers = {"Content-Encoding": coding, "Content-Type": "application/json"}
    answer = serve().client.post("/v1/chat/completions", content=gzip.compress(b"{}"), headers=headers)
    assert answer.status_code == 415 and answer.headers["accept-encoding"] == "identity"  # RFC 9110, 15.5.16
    assert "compressed" in answer.json()["error"]["message"]


def test_a_mistake_of_ours_is_a_500_without_its_traceback_which_is_logged_once(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine()
    engine.render = lambda *given: 1 // 0  # type: ignore
    running = serve(engine)
    answer = running.ask()
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "server.bug"
    assert "Traceback" not in answer.text and "division" not in answer.text
    wait_until(lambda: any(record.exc_info for record in caplog.records))
    assert running.client.post("/v1/completions", json={"prompt": "a"}).status_code == 200, "its place was left"
    assert caplog.text.count("Traceback") == 1 and "1 // 0" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_ids_of_another_vocabulary_are_refused_before_a_stream_begins(serve: Serve, stream: bool) -> None:
    def refuse(*given: Any) -> None:
        raise Usage("an id is outside the vocabulary", hint="other ids", code="prompt.ids")

    engine = FakeEngine()
    engine.decoder = refuse  # type: ignore
    running = serve(engine)
    answer = running.client.post("/v1/completions", json={"prompt": [5], "stream": stream})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    asked = {"messages": messages, "continue_final": True, "continue_token_ids": [5], "stream": stream}
    answer = running.client.post("/v1/chat/completions", json=asked)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "continue_token_ids"


def test_more_messages_than_the_context_has_tokens_are_too_long(serve: Serve) -> None:
    engine = FakeEngine(context=1000)
    engine.render = lambda *given: pytest.fail("it is refused before it is rendered")  # type: ignore
    messages = [{"role": "user", "content": ""}] * 200_000
    answer = serve(engine).client.post("/v1/chat/completions", json={"messages": messages})
    error = answer.json()["error"]
    assert answer.status_code == 400 and (error["code"], error["param"]) == ("context.full", "messages")


def test_log_probabilities_have_the_form_of_each_kind_of_answer(serve: Serve) -> None:
    told = [TokenLogprob("é".encode(), -0.5, (("é".encode(), -0.5), (b"\xc3", -1.5))), TokenLogprob(b"b", -2.0)]

    class Telling(FakeEngine):
        def stream_ids(self, *given: Any, **options: Any) -> Any:
            for chunk in super().stream_ids(*given, **options):
                yield (
                    replace(chunk, logprobs=told[len(chunk.token_ids) and chunk.token_ids[0] :][:1])
                    if chunk.text
                    else chunk
                )

    running = serve(Telling(["é", "b"]), tcp=True, key="k")
    with openai.OpenAI(base_url=running.url + "/v1", api_key="k", max_retries=0) as client:
        chat = client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=2
        )
        assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
        first, second = chat.choices[0].logprobs.content
        assert (first.token, first.bytes, first.logprob, second.token) == ("é", [0xC3, 0xA9], -0.5, "b")
        assert [(top.bytes, top.logprob) for top in first.top_logprobs] == [([0xC3, 0xA9], -0.5), ([0xC3], -1.5)]
        text = client.completions.create(model="fake", prompt="hi", logprobs=2).choices[0].logprobs
        assert text is not None and text.tokens == ["é", "b"] and text.text_offset == [0, 1]
        assert text.token_logprobs == [-0.5, -2.0] and text.top_logprobs is not None
        stream = client.completions.create(model="fake", prompt="hi", logprobs=2, stream=True)
        parts = [part.choices[0].logprobs for part in stream if part.choices and part.choices[0].text]
        assert [part.text_offset for part in parts if part is not None] == [[0], [1]]
