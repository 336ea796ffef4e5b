"""Every field that clients send is heard, harmless or refused by its name, and other programs' words are understood."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from fakes import FakeEngine
from openai.types.chat import ChatCompletionUserMessageParam, completion_create_params
from running import Serve

from glmchat.core.decoding import Grammar
from glmchat.core.errors import FieldError, Usage
from glmchat.serve import fields, wire

USER: ChatCompletionUserMessageParam = {"role": "user", "content": "hi"}


def chat(**given: Any) -> wire.GenerationRequest:
    return wire.parse_chat({"messages": [USER], **given}, {})


def refused(**given: Any) -> fields.FieldError:
    with pytest.raises(fields.FieldError) as error:
        chat(**given)
    return error.value


CHANGES_THE_ANSWER: dict[str, Any] = {
    "tools": [{}], "functions": [{}], "tool_choice": "required", "modalities": ["text", "audio"],
    "audio": {"voice": "x"}, "prediction": {"type": "content"}, "web_search": True, "web_search_options": {},
    "verbosity": "low", "options": {"num_predict": 3}, "format": "json", "chat_template": "x", "use_beam_search": True,
    "mirostat": 2, "dry_multiplier": 0.8, "xtc_probability": 0.1, "typical_p": 0.9, "echo": True, "suffix": "x",
    "bad_words": ["x"], "allowed_token_ids": [1], "include_stop_str_in_output": True, "prompt_logprobs": 1,
    "truncate_prompt_tokens": 5, "skip_special_tokens": False, "do_sample": False, "repeat_last_n": 64,
    "documents": [{}], "logits_processors": ["x"], "top_n_sigma": 1.0, "no_repeat_ngram_size": 3, "prefix": "x",
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES_THE_ANSWER)
def test_a_field_that_would_change_the_answer_and_is_not_done_is_refused_by_its_name(name: str) -> None:
    error = refused(**{name: CHANGES_THE_ANSWER[name]})
    assert error.code == "request.unsupported" and error.param == name and name in error.message and error.hint


def test_the_same_fields_with_values_that_ask_for_nothing_are_passed_over() -> None:
    for name, values in fields._NEUTRAL.items():
        for value in (None, *values):
            assert chat(**{name: value}).sampling == chat().sampling
    with pytest.raises(fields.FieldError):
        chat(mirostat=True)  # not the number that switches it off


def test_who_asks_and_where_it_is_computed_changes_nothing() -> None:
    asked = chat(user="me", metadata={"a": "b"}, store=False, service_tier="auto", parallel_tool_calls=True,
                 safety_identifier="x", prompt_cache_key="y", cache_prompt=True, provider={"order": ["x"]})  # fmt: skip
    assert asked == chat()


def test_every_field_of_the_openai_package_has_its_fate() -> None:
    """The package writes down what the API takes; none of it may be a surprise."""
    known = set(completion_create_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    unheard = {name for name in known if name not in fields._HEARD | fields.HARMLESS | fields._NEUTRAL.keys()}
    assert not unheard


def test_an_unknown_field_is_refused_with_the_one_that_was_meant() -> None:
    error = refused(max_token=5)
    assert error.param == "max_token" and error.hint == "did you mean max_tokens?"
    assert refused(frobnicate=1).hint == "leave the field out"
    assert chat(frobnicate=None) == chat(), "a client that sends null asks for nothing"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_new_tokens", "n_predict", "num_predict"])
def test_every_spelling_of_the_limit_is_heard_and_minus_one_is_no_limit(name: str) -> None:
    assert chat(**{name: 7}).sampling.max_tokens == 7
    assert chat(**{name: -1}).sampling.max_tokens is None
    error = refused(**{name: 0})
    assert error.param == name and "between 1 and" in error.message


def test_the_newer_name_of_the_limit_wins_in_whatever_order_they_come() -> None:
    assert chat(max_completion_tokens=5, max_tokens=3).sampling.max_tokens == 5
    assert chat(max_tokens=3, max_completion_tokens=5).sampling.max_tokens == 5
    assert chat(repeat_penalty=1.5, repetition_penalty=1.2).sampling.repetition_penalty == 1.2


def test_a_limit_out_of_range_is_refused_under_the_name_that_the_client_gave_it() -> None:
    with pytest.raises(FieldError, match=r"^n_predict: .*between 1 and 10,000,000$") as caught:
        chat(n_predict=0)
    assert caught.value.param == "n_predict"


def test_a_completion_without_a_limit_has_sixteen_tokens_as_openais() -> None:
    def limit(**given: Any) -> int | None:
        return wire.parse_completion({"prompt": "a", **given}, {}).sampling.max_tokens

    assert limit() == 16 and limit(max_tokens=3) == 3 and limit(max_tokens=-1) is None
    assert wire.parse_completion({"prompt": "a"}, {"max_tokens": 99}).sampling.max_tokens == 99, "as the server says"


@pytest.mark.parametrize(
    ("given", "variables"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False, "x": 3}}, {"enable_thinking": False, "x": 3}),
        ({"enable_thinking": False}, {"enable_thinking": False}),
        ({"think": True}, {"enable_thinking": True}),
        ({"thinking": {"type": "disabled"}}, {"enable_thinking": False}),
        ({"thinking": {"type": "enabled"}}, {"enable_thinking": True}),
        ({"chat_template_kwargs": {"clear_thinking": False}}, {"clear_thinking": False}),
        (
            {"thinking": {"type": "enabled", "clear_thinking": False}},
            {"enable_thinking": True, "clear_thinking": False},
        ),
        ({"reasoning": {"enabled": False}}, {"enable_thinking": False}),
        ({"reasoning": {"effort": "high"}}, {"reasoning_effort": "high"}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ({"reasoning_effort": "none"}, {"enable_thinking": False}),
        ({}, {}),
    ],
)
def test_every_programs_words_for_thinking_reach_the_template(given: Any, variables: Any) -> None:
    assert chat(**given).sampling.template_variables == variables


@pytest.mark.parametrize("name", ["thinking_budget", "thinking_token_budget", "reasoning_budget"])
def test_a_budget_for_thoughts_is_heard_and_a_negative_one_is_none(name: str) -> None:
    assert chat(**{name: 64}).decoding.thinking_budget == 64
    assert chat(**{name: -1}).decoding.thinking_budget is None
    assert chat(reasoning={"max_tokens": 9}).decoding.thinking_budget == 9


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", {"type": "object"}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
         "json_schema", SCHEMA),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "json_schema", SCHEMA),
        ({"guided_json": SCHEMA}, "json_schema", SCHEMA),
        ({"guided_json": json.dumps(SCHEMA)}, "json_schema", SCHEMA),
        ({"json_schema": SCHEMA}, "json_schema", SCHEMA),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SCHEMA),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", ["a", "b"]),
        ({"guided_choice": ["a", "b"]}, "choice", ["a", "b"]),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"regex": "a+"}, "regex", "a+"),
        ({"grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
        ({"guided_grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
        ({"structured_outputs": {"grammar": "g"}}, "grammar", "g"),
    ],
)  # fmt: skip
def test_every_programs_words_for_the_form_of_an_answer_are_understood(given: Any, kind: str, text: Any) -> None:
    grammar = chat(**given).decoding.grammar
    assert isinstance(grammar, Grammar) and grammar.kind == kind
    assert (json.loads(grammar.text) if not isinstance(text, str) else grammar.text) == text


def test_mistrals_and_deepseeks_prefix_goes_on_with_the_answer() -> None:
    begun = {"role": "assistant", "content": "so f"}
    for mark in ("prefix", "partial"):
        assert wire.parse_chat({"messages": [USER, {**begun, mark: True}]}, {}).continue_final
        assert not wire.parse_chat({"messages": [USER, {**begun, mark: False}]}, {}).continue_final
    with pytest.raises(Usage, match="prefix needs"):
        wire.parse_chat({"messages": [{**USER, "prefix": True}]}, {})


def test_errors_name_the_field_where_openais_package_looks_for_it(serve: Serve) -> None:
    running = serve(tcp=True, key="k")
    with openai.OpenAI(base_url=running.url + "/v1", api_key="k", max_retries=0) as client:
        for given, param in (({"temperature": 9}, "temperature"), ({"tools": [{}]}, "tools"), ({"n": 99}, "n")):
            with pytest.raises(openai.BadRequestError) as error:
                client.chat.completions.create(model="fake", messages=[USER], **given)
            assert error.value.param == param
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="x", messages=[USER])
        assert missing.value.param == "model" and missing.value.code == "model_not_found"


def test_what_is_asked_for_reaches_the_engine_and_n_asks_once_for_each_answer(serve: Serve) -> None:
    running = serve(FakeEngine(["a"]))
    answer = running.ask(n=3, seed=5, logit_bias={"7": -100}, presence_penalty=0.5, min_tokens=2).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [sampling.seed for _, sampling in running.engine.asked] == [5, 6, 7]
    assert answer["usage"]["completion_tokens"] == 3
    asked = running.engine.decoded[-1]
    assert asked is not None and asked.logit_bias == {7: -100} and asked.min_tokens == 2
    running.ask()
    assert running.engine.decoded[-1] is None


def test_several_answers_are_streamed_one_after_the_other_each_with_its_index(serve: Serve) -> None:
    running = serve(FakeEngine(["a", "b"]), tcp=True, key="k")
    with openai.OpenAI(base_url=running.url + "/v1", api_key="k", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="fake",
            messages=[USER],
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    said: dict[int, str] = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            said[choice.index] += choice.delta.content or ""
    assert said == {0: "ab", 1: "ab"} and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 4
    ends = [c.choices[0].index for c in chunks if c.choices and c.choices[0].finish_reason == "stop"]
    assert ends == [0, 1]
