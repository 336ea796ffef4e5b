"""Which tokens are learned: the assistant's and what ends them, in every family; and what becomes of long rows.

Covers tuning/rendering.py.
Right labels come from transformers' assistant masks and from the chat's own prompts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vocabulary_kinds import KINDS, THINKING, WINDING, Kind, as_it_is

from glmchat.core.errors import Usage
from glmchat.core.messages import Message
from glmchat.tuning.dataset import DataOptions, read_dataset
from glmchat.tuning.examples import Example, Place, Segment
from glmchat.tuning.prompt_side import PromptSide, load_prompt_side
from glmchat.tuning.rendering import fit, render, windows
from glmchat.tuning.rows import Conversation, RowFault, Text

Sides = Callable[[str], PromptSide]
HERE = Place("a.json", 1)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def talk(*said: str) -> Conversation:
    messages = tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(said))
    return Conversation(messages, tuple(n % 2 == 1 for n in range(len(said))), HERE)


def test_learned_tokens_are_the_assistants_mask_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = Kind("marked", KINDS[0].write, MARKED).build(tmp_path / "model", as_it_is)
    side, theirs = load_prompt_side(folder), AutoTokenizer.from_pretrained(folder)
    for said in (("the cat", "sat"), ("hello", "你好，世界", "and why?", "Be brief.\n", "x", " y ")):
        row = talk(*said)
        (example,) = render(row, side.prompt, "answers")
        right: Any = theirs.apply_chat_template(
            [message.to_json() for message in row.messages], return_dict=True, return_assistant_tokens_mask=True
        )
        size = len(example.ids)
        assert list(example.ids) == right["input_ids"][:size]
        assert [int(learned) for learned in example.learned] == right["assistant_masks"][:size]
        assert not any(right["assistant_masks"][size:])
    side.close()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_with_any_vocabulary_and_template_the_prompts_are_the_chats(kind: Kind, tmp_path: Path) -> None:
    side = load_prompt_side(kind.build(tmp_path / "model", as_it_is))
    row = talk("the cat", "sat on <|im_end|> the mat", "and why? </s>", "你好，世界", "Be", "brief")
    if kind.template == THINKING:  # opens an answer with <think>, which it does not write into the history
        with pytest.raises(Usage) as refused:
            render(row, side.prompt, "answers")
        assert refused.value.code == "template.not_a_prefix"
        side.close()
        return
    answers = [(e, s) for e in render(row, side.prompt, "answers") for s in e.segments if s.part == "answer"]
    assert len(answers) == 3
    for number, (example, segment) in enumerate(answers):
        asked = row.messages[: 2 * number + 1]
        assert list(example.ids[: segment.start]) == side.prompt.render(asked)
        said = side.tokenizer.decode(example.ids[segment.start : segment.end])
        if kind.template != WINDING and kind.name != "WordPiece":  # which write other letters
            assert said.strip().endswith(row.messages[2 * number + 1].content)
        assert example.ids[segment.end] in side.prompt.stop_ids and example.learned[segment.end]
        assert not set(side.prompt.stop_ids) & set(example.ids[segment.start : segment.end])
    side.close()


def test_every_answer_of_a_chatglm3_row_ends_in_a_learned_role_and_no_word_of_a_user_is_learned(sides: Sides) -> None:
    side = sides("chatglm3")
    (example,) = render(talk("一", "二", "三", "四", "五", "六"), side.prompt, "answers")
    names = {token: name for name, token in side.tokenizer.controls.items()}
    assert [names[t] for t in example.labels if t in names] == ["<|user|>", "<|user|>", "</s>"]
    learned = side.tokenizer.decode([token for token in example.labels if token >= 0])
    assert all(word in learned for word in "二四六") and not any(word in learned for word in "一三五")


def test_last_and_all_learn_the_last_answer_and_everything(sides: Sides) -> None:
    side, row = sides("smollm2"), talk("a", "b", "c", "d")
    (last,) = render(row, side.prompt, "last")
    (every,) = render(row, side.prompt, "all")
    (answers,) = render(row, side.prompt, "answers")
    assert last.ids == every.ids == answers.ids
    assert sum(last.learned) == 2 and sum(answers.learned) == 4
    assert every.learned == (False, *[True] * (len(every.ids) - 1))
    with pytest.raises(RowFault):
        render(row, sides("chatglm-6b").prompt, "all")


def test_a_family_that_writes_its_history_otherwise_gives_each_answer_a_document(sides: Sides, family: str) -> None:
    examples = render(talk("a", "b", "c", "d"), sides(family).prompt, "answers")
    assert len(examples) == (2 if family in ("chatglm-6b-early", "chatglm-6b", "chatglm2") else 1)
    for example in examples:
        assert [s.end for s in example.segments][:-1] == [s.start for s in example.segments][1:]
        assert all(any(example.learned[s.start : s.end]) == (s.part != "prompt") for s in example.segments)


@pytest.mark.parametrize("policy", ["cut-question", "cut-answer", "split", "drop"])
def test_no_document_is_longer_than_the_limit_and_what_is_taken_is_counted(
    sides: Sides, family: str, policy: Any
) -> None:
    side = sides(family)
    row = talk("first question " * 30, "b", "the last question " * 30, "an answer of some length " * 3)
    whole = sum(len(example.ids) for example in render(row, side.prompt, "answers"))
    if policy == "drop":
        with pytest.raises(RowFault):
            fit(row, side.prompt, "answers", 80, policy)
        return
    try:
        made = fit(row, side.prompt, "answers", 80, policy)
    except RowFault as fault:
        assert policy == "cut-answer" and fault.reason == "cut"
        return
    assert made.is_long and all(len(example.ids) <= 80 for example in made.examples)
    assert all(any(example.learned) for example in made.examples)
    if policy == "cut-question":
        assert len(made.examples) == 2 and made.unstopped == 0
        assert made.was - made.taken == sum(len(example.ids) for example in made.examples)
        last = made.examples[-1]
        start = next(s.start for s in last.segments if s.part == "answer")
        asked = side.tokenizer.decode(last.ids[:start])
        assert "last question" in asked and "first question" not in asked
        assert last.ids[-1] in side.prompt.stop_ids and last.learned[-1]
    if policy == "split":
        assert sum(sum(example.learned) for example in made.examples) > 0 and made.was == whole


@given(st.lists(st.booleans(), min_size=2, max_size=60), st.integers(3, 20))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_windows_lose_and_double_no_token(learned: list[bool], size: int) -> None:
    ids = tuple(range(100, 100 + len(learned)))
    example = Example(ids, tuple(learned), (Segment("answer", 0, len(ids)),), HERE)
    pieces = list(windows(example, size, (), size))
    assert tuple(token for piece in pieces for token in piece.ids) == ids
    assert all(len(piece.ids) <= size for piece in pieces) and all(len(piece.ids) > 1 for piece in pieces)


def test_a_text_is_learned_whole_behind_what_begins_one(sides: Sides, family: str) -> None:
    side = sides(family)
    (example,) = render(Text("hello </s> [gMASK] <|im_end|>", HERE), side.prompt, "text")
    begin = side.prompt.complete("")
    assert list(example.ids[: len(begin)]) == begin
    assert list(example.ids[len(begin) : -1]) == side.tokenizer.encode("hello </s> [gMASK] <|im_end|>")
    assert example.ids[-1] == side.prompt.stop_ids[0] and example.learned[-1]


def test_tools_are_offered_called_and_answered_as_the_model_knows_them(sides: Sides, shared: Path, family: str) -> None:
    data = str(shared / "data" / "llama-factory" / "glaive_toolcall_zh_demo.json")
    side = sides(family)
    if not side.prompt.takes_tools:
        facts = read_facts(data, side)
        assert facts.read == facts.used + facts.refusals == 300
        assert facts.refused["tools"].count == 200 and facts.refused.keys() <= {"tools", "cut"}
        return
    facts = read_facts(data, side)
    assert facts.read == facts.used + facts.refusals == 300 and facts.used > 270


def read_facts(data: str, side: PromptSide) -> Any:
    dataset = read_dataset([data], DataOptions(over_length="cut-answer"), side)
    dataset.close()
    return dataset.facts


def test_openais_calls_and_sharegpts_are_the_same_example(sides: Sides, tmp_path: Path) -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    openai = {"tools": tools, "messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {**call, "arguments": json.dumps(call["arguments"])}}]},
        {"role": "tool", "content": "2", "tool_call_id": "1"}, {"role": "assistant", "content": "b"}]}  # fmt: skip
    sharegpt = {"tools": json.dumps([tools[0]["function"]]), "conversations": [
        {"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "2"}, {"from": "gpt", "value": "b"}]}  # fmt: skip
    path = tmp_path / "a.jsonl"
    for name in ("chatglm3", "glm4"):
        side, made = sides(name), []
        for row in (openai, sharegpt):
            path.write_text(json.dumps(row))
            dataset = read_dataset([str(path)], DataOptions(), side)
            made.append([(example.ids, example.learned) for example in dataset.examples])
            dataset.close()
        assert made[0] == made[1]
