"""Answers as foreign servers really send them, cut anywhere; stops, failures, and what is not known.

Covers chat/client/reading.py, chat/client/words.py.
"""

from __future__ import annotations

import json
import socketserver
import threading
from typing import Any

import pytest
from foreign_server import Foreign, chunk
from polling import SECONDS, wait_until

from glmchat.chat.client.endpoint import Endpoint, Stop
from glmchat.chat.client.reading import Comment, EventParser, ServerEvent
from glmchat.core.errors import NetworkFailed, ServerFailed, Usage
from glmchat.core.messages import Finished, Message, Piece, Sampling, Started, StreamEvent

HELLO = [Message("user", "你好")]
PLAIN = Sampling(temperature=1.0, top_p=1.0)


ENDLESS = [(chunk("x") + "\n\n").encode()] * 100_000  # more than the buffers between two sockets hold


def text_of(events: list[Any]) -> str:
    return "".join(e.text for e in events if isinstance(e, Piece))


def ask(endpoint: Endpoint, sampling: Sampling = PLAIN, **options: Any) -> list[Any]:
    return list(endpoint.stream(HELLO, sampling, **options))


FULL = (
    ": keep-alive\r\n\r\n"
    + "\r\n\r\n".join([chunk("", role="x"), chunk("你好"), chunk("，🌍👩‍👩‍👧"), chunk(None, "stop")])
    + "\n\ndata: "
    + json.dumps({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}})
    + "\r\rdata: [DONE]\n\n"
).encode()


def test_events_come_out_the_same_wherever_their_bytes_are_cut() -> None:
    whole = list(EventParser().feed(FULL))
    assert sum(isinstance(e, ServerEvent) for e in whole) == 6 and whole[0] == Comment("keep-alive")
    for cut in range(len(FULL) + 1):
        parser = EventParser()
        assert [*parser.feed(FULL[:cut]), *parser.feed(FULL[cut:]), *parser.end()] == whole
    parser = EventParser()
    assert [e for byte in FULL for e in parser.feed(bytes([byte]))] == whole


def test_an_answer_arrives_whole_from_single_bytes(foreign: Foreign) -> None:
    endpoint = foreign.says(b"")
    foreign.parts = [bytes([b]) for b in FULL]
    events = ask(endpoint)
    assert isinstance(events[0], Started) and events[0].prompt_ids is None
    assert text_of(events) == "你好，🌍👩‍👩‍👧"
    last = events[-1]
    assert (last.finish_reason, last.prompt_tokens, last.completion_tokens) == ("stop", 9, 4)
    assert last.ttft_seconds is not None
    unknown = (
        last.seed,
        last.load_seconds,
        last.decode_tokens_per_second,
        last.prefill_tokens_per_second,
        last.cached_tokens,
    )
    assert unknown == (None,) * 5


@pytest.mark.parametrize(
    "text",
    [
        chunk("a") + "\n\n" + chunk("b", "stop") + "\n\n",  # no [DONE]
        chunk("a") + "\n\n" + chunk("b", "stop"),  # not even a last blank line
        "\ufeff" + chunk("ab", "stop") + "\n\ndata: [DONE]\n\n",
        "event: message\nid: 3\nretry: 5\n" + chunk("ab", "stop") + "\n\n",
        "data:" + chunk("ab", "stop")[6:] + "\n\n",  # no blank behind the colon
        chunk("a") + "\n\n" + chunk(None) + "\n\n" + chunk("b", "eos") + "\n\n",
        'data: {"choices": [{"text": "ab", "finish_reason": "stop"}]}\n\n',
        'data: {"choices": []}\n\ndata: null\n\n' + chunk("ab", "stop") + "\n\n",
    ],
)
def test_small_print_of_servers_is_taken_as_meant(foreign: Foreign, text: str) -> None:
    events = ask(foreign.says(text))
    assert text_of(events) == "ab" and events[-1].finish_reason == "stop"


def test_content_null_is_no_text(foreign: Foreign) -> None:
    text = 'data: {"choices":[{"delta":{"role":"assistant","content":null},"finish_reason":null}]}\n\n'
    assert text_of(ask(foreign.says(text + chunk("x", "length") + "\n\n"))) == "x"


def test_thoughts_are_shown_as_models_write_them(foreign: Foreign) -> None:
    def thought(text: str) -> str:
        return "data: " + json.dumps({"choices": [{"delta": {"reasoning_content": text, "content": None}}]}) + "\n\n"

    events = ask(foreign.says(thought("let ") + thought("me see") + chunk("42", "stop") + "\n\n"))
    assert text_of(events) == "<think>\nlet me see\n</think>\n\n42"


TEXT = {"type": "text", "text": "42"}
THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "Let me see"}]}
THOUGHT = "<think>\nLet me see\n</think>\n\n"


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ([[THINKING], "42"], THOUGHT + "42"),
        ([[THINKING], [TEXT]], THOUGHT + "42"),
        ([[THINKING, TEXT]], THOUGHT + "42"),
        ([[{**THINKING, "thinking": "Let me "}], [{**THINKING, "thinking": "see"}], [TEXT], "!"], THOUGHT + "42!"),
        ([[{"type": "thinking", "thinking": ""}], "42"], "42"),
        ([TEXT], "42"),
        ([[TEXT, {"type": "reference", "reference_ids": [1]}, {"type": "text", "text": "!"}]], "42!"),
        ([[{"type": "output_text", "text": "42"}]], "42"),
        ([[{"type": "text", "text": {"value": "42", "annotations": []}}]], "42"),
        ([[{"type": "refusal", "refusal": "No."}]], "No."),
        ([["4", "2"]], "42"),
        ([None, "", [], "42"], "42"),
        ([[THINKING]], THOUGHT),
    ],
)
def test_content_in_parts_is_read_streamed_and_whole(foreign: Foreign, contents: list[Any], said: str) -> None:
    def sse(choice: Any) -> str:
        return "data: " + json.dumps({"choices": [choice]}) + "\n\n"

    chunks = "".join(sse({"index": 0, "delta": {"content": content}}) for content in contents)
    assert text_of(ask(foreign.says(chunks + sse({"index": 0, "delta": {}, "finish_reason": "stop"})))) == said
    parts = [part for content in contents if content for part in (content if isinstance(content, list) else [content])]
    whole = {"choices": [{"message": {"role": "assistant", "content": parts}, "finish_reason": "stop"}]}
    assert text_of(ask(foreign.says(json.dumps(whole), kind="application/json"))) == said


def test_a_refusal_in_a_field_of_its_own_is_shown(foreign: Foreign) -> None:
    refusal = {"choices": [{"delta": {"refusal": "I cannot", "content": None}}]}
    end = chunk(finish="stop")
    assert text_of(ask(foreign.says(f"data: {json.dumps(refusal)}\n\n{end}\n\n"))) == "I cannot"


@pytest.mark.parametrize(
    ("delta", "finish", "word"),
    [
        ({"tool_calls": [{"index": 0, "function": {"name": "f"}}]}, "tool_calls", "tool_calls"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "stop", "image_url"),
        ({"content": ""}, "content_filter", "content_filter"),
    ],
)
def test_an_answer_without_anything_to_show_is_no_empty_answer(
    foreign: Foreign, delta: Any, finish: str, word: str
) -> None:
    said = json.dumps({"choices": [{"delta": delta, "finish_reason": finish}]})
    with pytest.raises(ServerFailed, match=word) as raised:
        ask(foreign.says(f"data: {said}\n\ndata: [DONE]\n\n"))
    assert raised.value.code == "server.no_text"


def test_a_server_that_does_not_stream_is_heard_too(foreign: Foreign) -> None:
    choice = {"message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
    whole = {"choices": [choice], "usage": {"completion_tokens": 1}}
    events = ask(foreign.says(json.dumps(whole), kind="application/json; charset=utf-8"))
    assert text_of(events) == "hi" and events[-1].completion_tokens == 1


def test_llama_servers_timings_become_speeds(foreign: Foreign) -> None:
    timings = {"prompt_n": 10, "prompt_ms": 100.0, "predicted_n": 20, "predicted_ms": 1000.0, "cache_n": 3}
    last = ask(foreign.says(chunk("x", "stop", timings=timings) + "\n\n"))[-1]
    assert (last.prefill_tokens_per_second, last.decode_tokens_per_second, last.cached_tokens) == (100.0, 20.0, 3)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (chunk("half an ans") + "\n\n", "before the answer was complete"),
        ("data: {not json}\n\n", "not JSON"),
        ('data: {"error": {"message": "CUDA out of memory"}}\n\n', "CUDA out of memory"),
        ('data: {"error": "llama runner died"}\n\n', "llama runner died"),
        ("", "before the answer was complete"),
    ],
)
def test_an_answer_that_breaks_off_is_told_and_never_passed_off_as_finished(
    foreign: Foreign, text: str, word: Any
) -> None:
    seen = []
    with pytest.raises(ServerFailed, match=word) as raised:
        for event in foreign.says(text).stream(HELLO, PLAIN):
            seen.append(event)
    assert raised.value.hint and not any(isinstance(e, Finished) for e in seen)
    assert text_of(seen) in ("", "half an ans")


@pytest.mark.parametrize(
    ("status", "kind", "body", "code", "word"),
    [
        ("401 Unauthorized", "application/json", '{"error": {"message": "bad key"}}', "server.auth", "OPENAI_API_KEY"),
        ("403 Forbidden", "text/plain", "no", "server.auth", "key"),
        ("404 Not Found", "application/json", '{"error": {"message": "no model m"}}', "server.not_found", "model m"),
        ("404 Not Found", "application/json", '{"detail": "Not Found"}', "server.not_found", "address"),
        ("429 Too Many Requests", "application/json", "{}", "server.busy", "17 seconds"),
        ("500 Internal Server Error", "text/plain", "boom\x1b[31m", "server.failed", "boom␛"),
        ("503 Service Unavailable", "application/json", '{"error": "loading"}', "server.failed", "loading"),
        ("200 OK", "text/html", "<html>nginx</html>", "server.html", "web page"),
        ("502 Bad Gateway", "text/html", "<html>nginx</html>", "server.html", "502"),
        ("301 Moved", "text/plain", "", "server.moved", "elsewhere"),
        ("400 Bad Request", "application/json", '{"object": "error", "message": "long"}', "server.refused", "long"),
        ("422 Unprocessable", "application/json", '{"detail": [{"msg": "x"}]}', "server.refused", "msg"),
    ],
)  # fmt: skip
def test_what_is_no_answer_has_its_own_words_and_a_hint(
    foreign: Foreign, status: int, kind: str, body: Any, code: str, word: Any
) -> None:
    headers = {"Retry-After": "17", "Location": "http://elsewhere/"}
    with pytest.raises(ServerFailed) as raised:
        ask(foreign.says(body, status=status, kind=kind, headers=headers))
    assert raised.value.code == code and raised.value.hint and raised.value.exit == 1
    assert word in f"{raised.value.message} {raised.value.hint}"
    assert "\x1b" not in raised.value.message


def test_nobody_there_is_one_clear_sentence() -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as server:
        port = server.server_address[1]
    with pytest.raises(NetworkFailed, match=f"nothing is listening at http://127.0.0.1:{port}/v1"):
        ask(Endpoint(f"127.0.0.1:{port}", model="m"))


def test_a_key_is_sent_as_given_and_never_shown(foreign: Foreign) -> None:
    endpoint = Endpoint(foreign.url, key="sk-secret", model="m")
    foreign.says(chunk("x", "stop") + "\n\n")
    ask(endpoint)
    assert foreign.asked[-1][1]["authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in repr(endpoint)
    ask(Endpoint(foreign.url, key=" sk-file\n", model="m"))
    assert foreign.asked[-1][1]["authorization"] == "Bearer sk-file"
    for bad in ("ключ", "two\nlines", "a b"):
        with pytest.raises(Usage, match="key") as refused:
            Endpoint(foreign.url, key=bad)
        assert bad not in str(refused.value)


def test_a_foreign_server_is_sent_openais_fields_and_no_more_unless_asked(foreign: Foreign) -> None:
    endpoint = foreign.says(chunk("x", "stop") + "\n\n")
    ask(endpoint, Sampling(temperature=0.5, top_p=0.9, max_tokens=7, stop=("#",)))
    body = foreign.asked[-1][2]
    assert set(body) == {"stream", "stream_options", "temperature", "top_p", "model", "max_tokens", "stop", "messages"}
    assert body["messages"] == [{"role": "user", "content": "你好"}]
    ask(endpoint, Sampling(top_k=40, seed=3))
    assert foreign.asked[-1][2]["top_k"] == 40 and foreign.asked[-1][2]["seed"] == 3


def test_a_foreign_server_keeps_its_own_defaults_for_what_nobody_set(foreign: Foreign) -> None:
    endpoint = foreign.says(chunk("x", "stop") + "\n\n")
    ask(endpoint, Sampling(temperature=0.95, top_k=0), asked={"top_k"})
    body = foreign.asked[-1][2]
    assert set(body) == {"stream", "stream_options", "model", "messages", "top_k"} and body["top_k"] == 0
    list(endpoint.complete("a", Sampling(), asked=()))
    assert set(foreign.asked[-1][2]) == {"stream", "stream_options", "model", "prompt"}


def test_a_server_that_cannot_continue_an_answer_is_told_apart_from_a_bad_request(foreign: Foreign) -> None:
    detail = json.dumps({"detail": "Unexpected fields: {'continue_final_message'}"}).encode()
    endpoint = foreign.says("", answer_with=lambda path, body: ("422 No", "application/json", detail) if body else None)
    with pytest.raises(ServerFailed, match="cannot resume") as raised:
        ask(endpoint, continue_final=True)
    assert raised.value.code == "server.cannot_continue" and "/regen" in raised.value.hint


def test_a_setting_that_the_server_does_not_know_is_left_out_and_said(foreign: Foreign) -> None:
    def strict(path: str, body: Any) -> tuple[str, str, bytes] | None:
        extra = {"top_k", "min_p", "stream_options"} & set(body or {})
        detail = json.dumps({"detail": f"Unexpected fields in the request: {extra}"}).encode()
        return ("422 Unprocessable", "application/json", detail) if extra else None

    endpoint = foreign.says(chunk("x", "stop") + "\n\n", answer_with=strict)
    events = ask(endpoint, Sampling(top_k=40, min_p=0.1))
    assert text_of(events) == "x" and sorted(events[-1].facts["ignored"]) == ["min_p", "top_k"]


def test_closing_the_generator_closes_the_connection(foreign: Foreign) -> None:
    endpoint = foreign.says(b"")
    foreign.parts = ENDLESS
    answer = endpoint.stream(HELLO, PLAIN)
    assert [type(next(answer)) for _ in range(3)] == [Started, Piece, Piece]
    answer.close()
    assert foreign.hung_up.wait(SECONDS)


@pytest.mark.parametrize("silent", [True, False])
def test_a_stop_from_another_thread_ends_it_even_while_nothing_comes(foreign: Foreign, silent: bool) -> None:
    endpoint = foreign.says(b": hello\n\n", silent=silent)
    if not silent:
        foreign.parts = ENDLESS
    stop = Stop()
    events: list[StreamEvent] = []

    def stop_it() -> None:
        wait_until(lambda: foreign.asked if silent else events)
        stop.now()

    threading.Thread(target=stop_it).start()
    for event in endpoint.stream(HELLO, PLAIN, stop=stop):
        events.append(event)
    (finished,) = (e for e in events if isinstance(e, Finished))
    assert finished is events[-1] and finished.finish_reason == "cancelled"


def test_a_stop_before_the_start_is_a_stop_too(foreign: Foreign) -> None:
    endpoint = foreign.says(b"", silent=True)
    stop = Stop()
    stop.now()
    assert [type(e) for e in ask(endpoint, stop=stop)] == [Finished]


def test_half_a_surrogate_from_a_terminal_is_replaced_before_it_is_sent(foreign: Foreign) -> None:
    endpoint = foreign.says(chunk("x", "stop") + "\n\n")
    list(endpoint.stream([Message("user", "a\udce4b")], PLAIN))
    assert foreign.asked[-1][2]["messages"][0]["content"] == "a?b"


def test_a_line_without_an_end_is_refused(foreign: Foreign, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glmchat.chat.client.reading.LINE_LIMIT", 1000)
    with pytest.raises(ServerFailed, match="does not end"):
        ask(foreign.says("data: " + "x" * 5000))


def test_the_only_model_is_taken_and_among_several_one_must_be_named(foreign: Foreign) -> None:
    def listing(names: list[str]) -> bytes:
        return json.dumps({"object": "list", "data": [{"id": n} for n in names]}).encode()

    foreign.kind, foreign.lists_models = "application/json", True
    endpoint = Endpoint(foreign.url)
    foreign.parts = [listing(["only"])]
    assert endpoint.choose_model() == endpoint.model == "only"
    foreign.parts = [listing(["a", "b\x1b[0m"])]
    with pytest.raises(Usage, match="2 models") as raised:
        endpoint.choose_model()
    assert "a, b␛[0m" in raised.value.hint
    assert endpoint.choose_model("a:latest") == "a:latest"


def test_proxies_are_not_asked_for_loopback(foreign: Foreign, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "socks://127.0.0.1:1")
    assert text_of(ask(foreign.says(chunk("x", "stop") + "\n\n"))) == "x"


def test_an_adapter_of_a_foreign_server_is_asked_for_as_vllm_has_it_by_the_name_of_a_model(foreign: Foreign) -> None:
    piece = {"choices": [{"delta": {"content": "x"}, "finish_reason": "stop"}]}
    endpoint = foreign.says(f"data: {json.dumps(piece)}\n\ndata: [DONE]\n\n")
    list(endpoint.stream([Message("user", "hi")], Sampling(), (("poet", 1.0),)))
    [body] = [body for path, _, body in foreign.asked if path.endswith("/chat/completions")]
    assert body["model"] == "poet" and "adapters" not in body
    for adapters in ((("poet", 0.5),), (("poet", 1.0), ("medical", 1.0))):
        with pytest.raises(Usage, match="one adapter"):
            list(endpoint.stream([Message("user", "hi")], Sampling(), adapters))
    assert len([path for path, _, _ in foreign.asked if path.endswith("/chat/completions")]) == 1
