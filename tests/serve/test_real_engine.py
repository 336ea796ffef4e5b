"""Small models behind the API: adapters that PEFT computes, adapters that bring words, thoughts that are cut short."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapter_builders as adapters
import pytest
import torch
from peft import PeftModel
from tiny_checkpoints import llamas
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from glmchat.engine import Engine, Sampling
from glmchat.jobs.replay import replay


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny GPT-NeoX that reads and writes bytes."""
    folder = adapters.write_neox(tmp_path / "neox")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}'
    )
    return folder


def test_a_request_chooses_kind_and_scale_and_the_next_one_without_is_the_base_again(
    serve: Any, base: Path, tmp_path: Path
) -> None:
    for name, peft_type in (("poet", "LOHA"), ("sage", "IA3")):
        adapters.write_kind(base, tmp_path / name, peft_type, seed=3)
    engine = Engine.load(base, threads=1, dtype="float32")
    running = serve(engine, adapters={"poet": tmp_path / "poet", "sage": tmp_path / "sage"})
    try:
        settings = {"temperature": 0, "max_tokens": 8, "return_token_ids": True}

        def ids(**fields: Any) -> list[int]:
            reply = running.ask(**settings, **fields)
            assert reply.status_code == 200, reply.text
            return reply.json()["choices"][0]["token_ids"]

        plain = ids()
        poet = ids(adapters=[{"name": "poet", "scale": 1.0}])
        half = ids(adapters=[{"name": "poet", "scale": 0.5}])
        assert len({tuple(plain), tuple(poet), tuple(half)}) == 3
        assert ids() == plain
        assert ids(model="poet") == poet
        refused = running.ask(**settings, adapters=[{"name": "sage", "scale": 0.5}])
        assert refused.status_code == 400 and "IA3" in refused.json()["error"]["message"]
        both = running.ask(**settings, adapters=[{"name": "sage"}, {"name": "poet"}])
        assert both.status_code == 400 and "LoHa + IA3" in both.json()["error"]["message"]
        assert ids() == plain
    finally:
        engine.close()


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return llamas.write_folder(tmp_path / "base")


def peft_says(base: Path, adapter: Path | None, ids: list[int], count: int) -> list[int]:
    """PEFT's greedy ids."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    tuned = model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()
    said: list[int] = []
    for _ in range(count):
        said.append(int(adapters.peft_logits(tuned, [*ids, *said])[-1].argmax()))
    return said


GREEDY = {"temperature": 0, "max_tokens": 5, "return_token_ids": True, "ignore_eos": True}


def test_an_adapters_own_words_are_used_while_it_answers_and_no_longer(serve: Any, llama: Path, tmp_path: Path) -> None:
    folder = adapters.train(llama, tmp_path / "own", None)
    engine = Engine.load(llama, threads=1, dtype="float32")
    running = serve(engine, adapters={"own": folder})
    talk = [{"role": "user", "content": "a zebra"}, {"role": "assistant", "content": "so"},
            {"role": "user", "content": "and then"}]  # fmt: skip
    try:
        for name, place, adapter in (("own", folder, folder), ("fake", llama, None), ("own", folder, folder)):
            tokenizer = AutoTokenizer.from_pretrained(place)
            ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
            right = peft_says(llama, adapter, ids, 5)
            reply = running.client.post("/v1/chat/completions", json={"model": name, "messages": talk, **GREEDY}).json()
            assert reply["choices"][0]["token_ids"] == right and reply["usage"]["prompt_tokens"] == len(ids)
            streamed = running.client.post(
                "/v1/chat/completions", json={"model": name, "messages": talk, "stream": True, **GREEDY}
            )
            events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
            assert events[0]["prompt_token_ids"] == ids
            assert [t for e in events for c in e["choices"] for t in c.get("token_ids") or ()] == right
            told = running.client.post("/tokenize", json={"model": name, "messages": talk}).json()
            assert told["tokens"] == ids
            text = running.client.post("/tokenize", json={"model": name, "prompt": "a zebra"}).json()
            assert text["tokens"] == tokenizer("a zebra", add_special_tokens=False)["input_ids"]
            raw = running.client.post("/v1/completions", json={"model": name, "prompt": "a zebra", **GREEDY}).json()
            assert raw["choices"][0]["token_ids"] == peft_says(llama, adapter, tokenizer("a zebra")["input_ids"], 5)
    finally:
        engine.close()


@pytest.mark.parametrize("first", ["own", "fake"])
def test_ids_are_echoed_in_the_words_of_who_answers_not_of_who_answered_before(
    first: str, serve: Any, llama: Path, tmp_path: Path
) -> None:
    folder = adapters.train(llama, tmp_path / "own", None)
    engine = Engine.load(llama, threads=1, dtype="float32")
    running = serve(engine, adapters={"own": folder})
    zebra = AutoTokenizer.from_pretrained(folder)("a zebra")["input_ids"]
    assert max(zebra) >= len(AutoTokenizer.from_pretrained(llama))
    try:
        running.ask(model=first, max_tokens=1)
        for name, place in (("own", folder), ("fake", llama), ("own", folder)):
            fields = {"model": name, "prompt": zebra, "echo": True, **GREEDY}
            choice = running.client.post("/v1/completions", json=fields).json()["choices"][0]
            right = AutoTokenizer.from_pretrained(place).decode(zebra, clean_up_tokenization_spaces=False)
            assert choice["text"].startswith(right)
            assert choice["text"].startswith("a zebra") is (name == "own")
    finally:
        engine.close()


@pytest.mark.parametrize("limit", [0, 1])
def test_an_echo_with_log_probabilities_tells_those_of_the_prompts_as_openais_legacy_form_has_them(
    limit: int, serve: Any, llama: Path
) -> None:
    """For texts and ids alike; transformers says what the numbers are."""
    engine = Engine.load(llama, threads=1, dtype="float32")
    running = serve(engine)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    texts = ["a zebra", "so it goes, so it went"]
    try:
        for prompt in (texts, [tokenizer(text)["input_ids"] for text in texts]):
            fields = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": limit, "temperature": 0}
            reply = running.client.post("/v1/completions", json=fields)
            assert reply.status_code == 200, reply.text
            assert reply.json()["usage"]["completion_tokens"] == 2 * limit
            for text, choice in zip(texts, reply.json()["choices"], strict=True):
                ids = tokenizer(text)["input_ids"]
                rows = torch.log_softmax(model(torch.tensor([ids])).logits[0].detach(), -1)
                told = choice["logprobs"]
                assert {len(column) for column in told.values()} == {len(ids) + limit}
                assert choice["text"].startswith(text) and choice["text"] == "".join(told["tokens"])
                assert told["tokens"][: len(ids)] == [tokenizer.decode([token]) for token in ids]
                assert told["text_offset"] == [len("".join(told["tokens"][:n])) for n in range(len(ids) + limit)]
                assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
                right = [float(row[token]) for row, token in zip(rows, ids[1:], strict=False)]
                assert told["token_logprobs"][1 : len(ids)] == pytest.approx(right, abs=1e-4)
                for row, likeliest in zip(rows, told["top_logprobs"][1:], strict=False):
                    assert max(likeliest.values()) == pytest.approx(float(row.max()), abs=1e-4)
        many = running.client.post("/v1/completions", json={**fields, "prompt": [[5] * 250] * 250, "logprobs": 20})
        assert many.status_code == 400 and many.json()["error"]["param"] == "prompt"
    finally:
        engine.close()


def test_an_answer_with_echo_and_log_probabilities_is_said_again_by_a_fresh_engine_from_what_it_told(
    serve: Any, llama: Path
) -> None:
    """Prompts that share a beginning, several answers each: some are read whole, some are copied from one another."""
    drawn: dict[str, Any] = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 12}
    engine = Engine.load(llama, threads=1, dtype="float32")
    running = serve(engine)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    texts = ["so it goes", "so it goes, so it went, and so it will go " * 3]
    told = []
    try:
        for echo, logprobs in ((True, 2), (True, None), (False, 3), (False, None)):
            for text in texts:
                asked = {"prompt": text, "echo": echo, "logprobs": logprobs, "n": 2, "seed": 7, **drawn}
                reply = running.client.post("/v1/completions", json={**asked, "return_token_ids": True})
                assert reply.status_code == 200, reply.text
                told += [(text, choice) for choice in reply.json()["choices"]]
    finally:
        engine.close()
    engine = Engine.load(llama, threads=1, dtype="float32")
    try:
        for text, choice in told:
            prompt, facts = tokenizer(text)["input_ids"], choice["glmchat"]
            assert facts["passes"][-1][1] == len(prompt) and len(choice["token_ids"]) > 0
            parting = replay(engine, prompt, facts["passes"], choice["token_ids"], Sampling(**drawn), facts["seed"])
            assert parting is None, (choice, parting)
        # What is told beside an answer changes none of it.
        first = [choice["token_ids"] for text, choice in told if text == texts[0]]
        assert first[0::2] == [first[0]] * 4 and first[0] != first[1]
    finally:
        engine.close()


def test_an_adapter_whose_words_do_not_fit_is_refused_each_time_and_the_base_goes_on(
    serve: Any, tmp_path: Path
) -> None:
    base = llamas.write_folder(tmp_path / "small", vocab_size=262)
    lost = adapters.train(base, tmp_path / "lost", None)  # two words more than rows
    engine = Engine.load(base, threads=1, dtype="float32")
    running = serve(engine, adapters={"lost": lost})
    try:
        plain = running.ask(**GREEDY).json()["choices"][0]["token_ids"]
        for _ in range(2):
            refused = running.ask(model="lost", **GREEDY)
            assert refused.status_code == 400 and "264 words" in refused.json()["error"]["message"]
            loaded = running.client.post("/v1/load_lora_adapter", json={"lora_name": "lost"})
            assert loaded.status_code == 400
            assert running.ask(**GREEDY).json()["choices"][0]["token_ids"] == plain
        assert running.client.post("/v1/unload_lora_adapter", json={"lora_name": "lost"}).status_code == 404
    finally:
        engine.close()


THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}"
    "{% endif %}"
)


# As GLM-4.7's: earlier thoughts are left out unless it is told to keep them.
CLEARS = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "{% if ((clear_thinking is defined and not clear_thinking) or loop.index0 > ns.last) and thought %}"
    "<think>{{ thought.strip() }}</think>{% else %}</think>{% endif %}{{ m.content.split('</think>')[-1].strip() }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{{ '</think>' if (enable_thinking is defined and not enable_thinking) else '<think>' }}{% endif %}"
)


@pytest.fixture
def thinker(tmp_path: Path) -> Path:
    """Its template opens a thought, unless it is told not to."""
    folder = llamas.write_folder(tmp_path / "thinker", template=THINKS, vocab_size=280)
    lower = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lower.add_tokens([AddedToken(word, normalized=False) for word in ("<think>", "</think>")])
    lower.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"enable_thinking": False}, "thinking_budget": 3},
        {"thinking": {"type": "disabled"}},
        {"think": False},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {},
    ],
)
def test_the_template_is_told_whether_to_think(fields: dict[str, Any], serve: Any, thinker: Path) -> None:
    engine = Engine.load(thinker, threads=1, dtype="float32")
    running = serve(engine)
    told = (
        {}
        if not fields or fields.get("chat_template_kwargs") == {"enable_thinking": True}
        else {"enable_thinking": False}
    )
    tokenizer = AutoTokenizer.from_pretrained(thinker)
    talk = [{"role": "user", "content": "hi"}]
    right = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False, **told)
    try:
        streamed = running.ask(stream=True, **GREEDY, **fields)
        first = next(line for line in streamed.text.splitlines() if line.startswith("data: {"))
        assert json.loads(first[6:])["prompt_token_ids"] == right
        counted = running.client.post("/tokenize", json={"messages": talk, **fields}).json()
        assert counted["tokens"] == right
    finally:
        engine.close()


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking_budget": 3},
        {"thinking_token_budget": 3},
        {"reasoning_budget": 3},
        {"reasoning": {"max_tokens": 3}},
        {"thinking": {"type": "enabled", "budget_tokens": 3}},
        {"thinking_budget": 0},
    ],
)
def test_a_thought_ends_where_its_budget_does_and_the_answer_goes_on(
    fields: dict[str, Any], serve: Any, thinker: Path
) -> None:
    engine = Engine.load(thinker, threads=1, dtype="float32")
    running = serve(engine)
    tokenizer = AutoTokenizer.from_pretrained(thinker)
    opens, closes = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    never = {str(token): -100 for token in (0, 1, 2, opens, closes)}
    asked = {**GREEDY, "max_tokens": 12, "logit_bias": never}
    budget = 0 if fields == {"thinking_budget": 0} else 3
    try:
        free = running.ask(**asked).json()["choices"][0]
        cut = running.ask(**asked, **fields).json()["choices"][0]
        assert closes not in free["token_ids"] and cut["finish_reason"] == "length"
        ids = cut["token_ids"]
        assert ids[:budget] == free["token_ids"][:budget]
        close = tokenizer.encode("\n</think>\n\n", add_special_tokens=False)
        assert ids[budget : budget + len(close)] == close and ids.count(closes) == 1 and len(ids) == 12
        streamed = running.ask(**asked, **fields, stream=True).text
        events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        assert [t for e in events for c in e["choices"] for t in c.get("token_ids") or ()] == ids
        text = "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])
        assert text == cut["message"]["content"] and "</think>" in text
        unlimited = {name: -1 for name in fields if not isinstance(fields[name], dict)}
        assert running.ask(**asked, **unlimited).json()["choices"][0]["token_ids"] == free["token_ids"]
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, {}),
        ({"chat_template_kwargs": {"clear_thinking": False}}, {"clear_thinking": False}),
        ({"chat_template_kwargs": {"clear_thinking": True}}, {"clear_thinking": True}),
        (
            {"thinking": {"type": "disabled", "clear_thinking": False}},
            {"enable_thinking": False, "clear_thinking": False},
        ),
    ],
)
def test_whether_earlier_thoughts_stay_is_the_clients_choice(
    fields: dict[str, Any], told: dict[str, Any], serve: Any, tmp_path: Path
) -> None:
    folder = llamas.write_folder(tmp_path / "clears", template=CLEARS, vocab_size=280)
    lower = Tokenizer.from_file(str(folder / "tokenizer.json"))
    lower.add_tokens([AddedToken(word, normalized=False) for word in ("<think>", "</think>", "<|user|>")])
    lower.save(str(folder / "tokenizer.json"))
    thought = "<think>\nlong thought\n</think>\n\nyes"
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": thought},
        {"role": "user", "content": "b"},
    ]
    right = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        talk, add_generation_prompt=True, return_dict=False, **told
    )
    engine = Engine.load(folder, threads=1, dtype="float32")
    try:
        assert serve(engine).client.post("/tokenize", json={"messages": talk, **fields}).json()["tokens"] == right
    finally:
        engine.close()


def test_a_variable_that_the_template_never_reads_is_refused_by_the_field_that_told_it(
    serve: Any, llama: Path, thinker: Path
) -> None:
    for folder, fields, param in (
        (llama, {"thinking": {"type": "enabled"}}, "thinking"),
        (llama, {"think": True}, "think"),
        (llama, {"reasoning": {"effort": "high"}}, "reasoning"),
        (llama, {"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs"),
        (thinker, {"reasoning_effort": "low"}, "reasoning_effort"),
        (thinker, {"thinking": {"type": "enabled", "clear_thinking": True}}, "thinking"),
        (thinker, {"think": True, "chat_template_kwargs": {"depth": 3}}, "chat_template_kwargs"),
    ):
        engine = Engine.load(folder, threads=1, dtype="float32")
        try:
            running = serve(engine)
            talk = {"messages": [{"role": "user", "content": "hi"}], **fields}
            for reply in (running.ask(**GREEDY, **fields), running.client.post("/tokenize", json=talk)):
                assert reply.status_code == 400, reply.text
                error = reply.json()["error"]
                assert (error["code"], error["param"]) == ("template.variable", param)
                assert param in error["message"] or param == "chat_template_kwargs"
        finally:
            engine.close()


def test_a_budget_that_cannot_be_kept_is_refused_by_its_name(serve: Any, llama: Path, thinker: Path) -> None:
    form = {"response_format": {"type": "json_object"}}
    for folder, fields, param in (
        (llama, {"thinking_budget": 3}, "thinking_budget"),
        (llama, {"thinking": {"type": "auto", "budget_tokens": 3}}, "thinking.budget_tokens"),
        (llama, {"reasoning": {"max_tokens": 3}}, "reasoning.max_tokens"),
        (llama, {"reasoning_budget": 3}, "reasoning_budget"),
        (thinker, {"thinking": {"type": "enabled", "budget_tokens": 3}, **form}, "thinking.budget_tokens"),
        (thinker, {"thinking_budget": 3, **form}, "thinking_budget"),
        (thinker, {"thinking_budget": "much"}, "thinking_budget"),
        (thinker, {"thinking_budget": 2.5}, "thinking_budget"),
        (thinker, {"thinking": {"type": "enabled", "depth": 3}}, "thinking"),
    ):
        engine = Engine.load(folder, threads=1, dtype="float32")
        try:
            for stream in (False, True):
                refused = serve(engine).ask(**GREEDY, **fields, stream=stream)
                assert refused.status_code == 400, refused.text
                assert refused.json()["error"]["param"] == param
        finally:
            engine.close()
