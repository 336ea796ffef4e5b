"""Bodies that are no requests: one clear 400 each, and the server serves on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from running import Serve

from glmchat.core.decoding import PLAIN
from glmchat.core.errors import FieldError, Usage
from glmchat.serve import wire

USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("{", "not JSON"),
        ("[]", "object"),
        ("", "not JSON"),
        ("[" * 100_000, "nested|not JSON"),
        ("[" + "[]," * 1_000_000 + "0]", "too many lists"),
    ],
)
def test_what_is_no_json_object_is_refused(body: Any, word: Any) -> None:
    with pytest.raises(Usage, match=word) as refused:
        wire.parse_json(body.encode())
    assert refused.value.code == "request.invalid" and refused.value.hint


@pytest.mark.parametrize(
    ("body", "param", "word"),
    [
        ('{"messages": [{"content": NaN}]}', "messages[0].content", "no finite number"),
        ('{"messages": Infinity}', "messages", "no finite number"),
        ('{"temperature": -1e999}', "temperature", "no finite number"),
        ('{"seed": ' + "9" * 5000 + "}", "seed", "no finite number"),
        (r'{"messages": [{"role": "user", "content": "a\ud800"}]}', "messages[0].content", "surrogate"),
        (r'{"x": {"\udfff": 1}}', "x.␦", "surrogate"),
        ('{"a": 1, "tools": ' + "[" * 300 + "]" * 300 + "}", "tools", "nested"),
        ('{"a": "[[", "stop": ' + '{"b":' * 9000 + "1" + "}" * 9000 + "}", "stop", "nested"),
    ],
)
def test_a_value_that_no_field_may_have_is_found_by_its_path(body: str, param: str, word: str) -> None:
    with pytest.raises(FieldError, match=word) as refused:
        wire.parse_json(body.encode())
    assert str(refused.value.param).startswith(param.partition("␦")[0]) and refused.value.hint
    assert json.dumps(refused.value.to_json()).isascii()


def test_what_looks_like_a_fault_in_a_text_is_none() -> None:
    text = {"prompt": "1e999 NaN \\ud800 😀 " + "[{" * 500, "x": [[["y"]]]}
    assert wire.parse_json(json.dumps(text).encode()) == text


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, r"messages\[0\]"),
        ({"messages": [USER, {"role": "root", "content": "x"}]}, r"messages\[1\].role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [USER | {"name": 5}]}, r"messages\[0\].name"),
        ({"messages": [USER | {"tools": ["python"]}]}, r"messages\[0\].tools"),
        ({"messages": [{"role": "user", "content": 3}]}, "content"),
        ({"messages": [{"role": [], "content": "x"}]}, r"messages\[0\].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"messages": [{"role": "user", "content": "x", "name": 4}]}, "name"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 9}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "messages"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": 1}, "stream_options"),
        ({"n": 0}, "n is 0"),
        ({"n": 2, "best_of": 3}, "best_of is not supported"),
        ({"tools": [{}]}, "tools"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema is missing"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a", "guided_json": {}}, "both"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"stop_token_ids": ["x"]}, "stop_token_ids"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "messages"),
        ({"thinking": {"kind": 3}}, "thinking"),
        ({"messages": [USER | {"tool_calls": [{}]}]}, r"messages\[0\].tool_calls"),
        ({"messages": [USER | {"prefix": True}, USER]}, r"messages\[0\].prefix"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"model": 3}, "model"),
        ({"adapters": {}}, "adapters"),
        ({"adapters": [{"scale": 1}]}, "adapters"),
        ({"adapters": [{"name": "a", "scale": "x"}]}, "scale"),
        ({"adapters": [{"name": "a"}, {"name": "a"}]}, "twice"),
        ({"continue_final": True}, "continue_final"),
        ({"messages": [USER, {"role": "assistant", "content": "x"}], "continue_final": True,
          "continue_token_ids": [-1]}, "continue_token_ids"),
    ],
)  # fmt: skip
def test_a_field_that_is_wrong_is_named(fields: Any, word: Any) -> None:
    with pytest.raises(Usage, match=word) as refused:
        wire.parse_chat({"messages": [USER], **fields}, {})
    assert refused.value.hint


def test_what_clients_send_by_habit_is_harmless() -> None:
    request = wire.parse_chat(
        {
            "messages": [{"role": "developer", "content": [{"type": "text", "text": t} for t in "ab"]}],
            "n": 1, "logprobs": False, "tools": [], "logit_bias": {}, "presence_penalty": 0.0, "user": "me",
            "response_format": {"type": "text"}, "top_k": -1, "seed": -1, "max_tokens": 5.0, "temperature": None,
        },
        {},
    )  # fmt: skip
    assert request.messages is not None
    assert request.messages[0].role == "system" and request.messages[0].content == "ab"
    assert request.decoding == PLAIN
    assert request.sampling.top_k == 0 and request.sampling.seed is None and request.sampling.max_tokens == 5


@pytest.mark.parametrize("prompt", [None, [], {}, [1, "a"], ["a", None], [[]], [[1], [-1]], [-1], [2**31], ["a"] * 257])
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(FieldError) as refused:
        wire.parse_completion({"prompt": prompt}, {})
    assert refused.value.param == "prompt"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ("a",)), ([1, 2], ((1, 2),)), (["a", "b"], ("a", "b")), ([[1], [2, 3]], ((1,), (2, 3)))],
)  # fmt: skip
def test_a_completion_takes_the_prompts_that_openais_takes(prompt: Any, prompts: Any) -> None:
    assert wire.parse_completion({"prompt": prompt}, {}).prompts == prompts


def test_best_of_and_what_is_no_echo_are_refused_by_name() -> None:
    for given, param in (({"best_of": 3}, "best_of"), ({"echo": 1}, "echo"), ({"echo": "yes", "logprobs": 1}, "echo")):
        with pytest.raises(FieldError) as refused:
            wire.parse_completion({"prompt": "a", **given}, {})
        assert refused.value.param == param


def test_a_prompts_log_probabilities_are_asked_for_by_echo_and_logprobs_and_it_alone_by_no_tokens() -> None:
    for given, of_prompt, only_reads in (
        ({"echo": True, "logprobs": 1, "max_tokens": 1}, True, False),
        ({"echo": True, "logprobs": 0, "max_tokens": 0}, True, True),
        ({"echo": True, "max_tokens": 0}, False, True),
        ({"echo": True}, False, False),
        ({"logprobs": 1}, False, False),
    ):
        decoding = wire.parse_completion({"prompt": "a", **given}, {}).decoding
        assert (decoding.of_prompt, decoding.only_reads) == (of_prompt, only_reads)
    for no_echo in ({}, {"echo": False}, {"logprobs": 1}):
        with pytest.raises(FieldError) as refused:
            wire.parse_completion({"prompt": "a", "max_tokens": 0, **no_echo}, {})
        assert refused.value.param == "max_tokens"


def test_over_http_each_of_them_is_one_400_and_the_server_serves_on(serve: Serve) -> None:
    running = serve()
    for body in (b"{", b"\xff", b'{"messages": 3}', json.dumps({"messages": [USER], "n": 99}).encode()):
        answer = running.client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["message"] and error["hint"] and error["type"] == "invalid_request_error"
    assert running.ask().status_code == 200


def test_a_body_over_the_limit_is_refused_whether_its_length_is_declared_or_not(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "BODY_LIMIT", 1000)
    running = serve()

    def parts() -> Iterator[bytes]:
        for _ in range(100):
            yield b" " * 100

    headers = {"Content-Type": "application/json"}
    for content in (b" " * 2000, parts()):
        assert running.another().post("/v1/completions", content=content, headers=headers).status_code == 413
    assert running.ask().status_code == 200


def test_a_message_brings_its_tools_and_the_name_of_its_call() -> None:
    tool = {"type": "function", "function": {"name": "weather"}}
    said = [{"role": "system", "content": "", "tools": [tool]}, {"role": "assistant", "content": "{}", "metadata": "f"}]
    system, call = wire.parse_messages({"messages": said})
    assert system.tools == (tool,) and call.name == "f"
