"""The originals' tokens and labels: recorded arrays where there are some, else what their code says.

Covers tuning/recipes.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glmchat.chat.recipe import LIKE
from glmchat.core.errors import Usage
from glmchat.core.messages import Message
from glmchat.jobs.learn import settings_of
from glmchat.tuning.dataset import DataOptions, read_dataset
from glmchat.tuning.examples import Place
from glmchat.tuning.order import steps_of
from glmchat.tuning.prompt_side import PromptSide
from glmchat.tuning.recipes import RECIPES, Recipe, cpm_windows, differences
from glmchat.tuning.rows import Conversation, RowFault, Text
from glmchat.tuning.settings import Settings

Sides = Callable[[str], PromptSide]
HERE = Place("a.json", 1)


def row(*said: str, asked: tuple[str, str] = ("", "")) -> Conversation:
    messages = tuple(Message(("user", "assistant")[n % 2], text) for n, text in enumerate(said))
    return Conversation(messages, tuple(n % 2 == 1 for n in range(len(said))), HERE, asked=asked)


def labels(recipe: str, said: Conversation | Text, side: PromptSide) -> tuple[list[int], list[int]]:
    made = RECIPES[recipe].make(RECIPES[recipe], said, side.prompt)
    assert made.taken == made.was - sum(len(example.ids) for example in made.examples)
    return list(made.examples[0].ids), made.examples[0].labels


@pytest.fixture
def guide(shared: Path) -> Any:
    return json.loads((shared / "reference" / "lora-guide" / "facts.json").read_text())["qa"]


def test_the_lora_guide_has_its_recorded_ids_and_labels(sides: Sides, guide: Any) -> None:
    ids, learned = labels("lora-guide", row(guide["question"], guide["answer"]), sides("chatglm-6b-early"))
    assert ids == guide["input_ids"]
    assert learned == guide["labels"]


def test_the_guides_prompt_keeps_its_first_part_and_is_at_most_202_tokens(sides: Sides, guide: Any) -> None:
    side = sides("chatglm-6b-early")
    ids, learned = labels("lora-guide", row(guide["question"] * 100, "好" * 2000), side)
    begin = ids.index(side.prompt.render([Message("user", "a")])[-1])
    assert begin + 1 == 202
    assert ids[:9] == guide["input_ids"][:9]
    assert learned[: begin + 1] == [-100] * 202 and learned[-1] == ids[-1] == 150005
    assert len(ids) == 702


def test_ptuning_has_one_label_more_than_the_guide_and_it_is_the_beginning(sides: Sides, guide: Any) -> None:
    side = sides("chatglm-6b-early")
    ids, learned = labels("ptuning", row(guide["question"], guide["answer"]), side)
    _, theirs = labels("lora-guide", row(guide["question"], guide["answer"]), side)
    assert sum(label != -100 for label in learned) == 1 + sum(label != -100 for label in theirs)
    first = next(number for number, label in enumerate(learned) if label != -100)
    assert learned[first] == 150004 and ids[first - 1] == 150001
    question = side.tokenizer.encode(guide["question"])
    assert ids == [*question, 150001, 150004, *side.tokenizer.encode(guide["answer"]), 150005]
    long, learned = labels("ptuning", row("问" * 500, "答" * 500), side)
    assert len(long) == 128 and learned[64:] == long[64:] and long[-1] == 150005


def test_ptuning_writes_rounds_from_nought_for_a_chat_even_for_the_first_question(sides: Sides) -> None:
    side = sides("chatglm-6b")
    for said, text in (
        (("一", "二"), "[Round 0]\n问：一\n答："),
        (("一", "二", "三", "四"), "[Round 0]\n问：一\n答：二\n[Round 1]\n问：三\n答："),
    ):
        ids, _ = labels("ptuning-chat", row(*said), side)
        assert ids[: len(side.tokenizer.encode(text))] == side.tokenizer.encode(text)
    with pytest.raises(RowFault):
        labels("ptuning", row("一", "二", "三", "四"), side)


def test_chatglm2_learns_the_answer_and_its_end_alone_and_never_the_id_of_padding(sides: Sides) -> None:
    side = sides("chatglm2")
    said = row("你好", "您好", "再见？", "再见")
    ids, learned = labels("chatglm2-ptuning", said, side)
    prompt = side.prompt.render(said.messages[:-1])
    assert ids[: len(prompt)] == prompt
    assert ids[len(prompt) :] == learned[len(prompt) :] == [*side.tokenizer.encode("再见"), 2]
    assert set(learned[: len(prompt)]) == {-100}
    ids, learned = labels("chatglm2-ptuning", row("长" * 500, "短" * 500), side)
    assert len(ids) == 64 + 128 + 1 and ids[-1] == 2
    strange, learned = labels("chatglm2-ptuning", row("a", "\x00"), side)
    assert all(label == -100 for token, label in zip(strange, learned, strict=True) if token == 0)


def test_chatglm3_learns_what_follows_an_answer_and_no_role_that_begins_one(sides: Sides, tmp_path: Path) -> None:
    """labels[i] = ids[i] exactly where token i - 1 belongs to a message of the assistant."""
    tools = [{"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}]
    said = [
        {"role": "user", "content": "天气？"},
        {"role": "tool", "name": "weather", "parameters": {"city": "北京"}, "observation": "晴"},
        {"role": "assistant", "content": "晴天。"},
        {"role": "user", "content": "谢谢"},
        {"role": "assistant", "content": "不客气"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"conversations": said, "tools": tools}, ensure_ascii=False))
    side = sides("chatglm3")
    dataset = read_dataset([str(path)], DataOptions(like="chatglm3"), side)
    (example,) = dataset.examples
    roles = {token: name for name, token in side.tokenizer.controls.items() if name.startswith("<|")}
    speaker, right = "", []
    for token in example.ids:
        right.append(token if speaker == "<|assistant|>" else -100)
        speaker = roles.get(token, speaker)
    assert example.labels == right
    assert [roles[label] for label in example.labels if label in roles] == ["<|observation|>", "<|user|>"]
    assert example.labels[-1] == 2
    text = "".join(side.tokenizer.decode([t]) for t in example.ids)
    assert "tool_call(city='北京')" in text
    dataset.close()


def test_chatglm_tuning_writes_instruction_and_input_and_loses_its_end_at_384(sides: Sides, tmp_path: Path) -> None:
    side = sides("chatglm-6b-early")
    path = tmp_path / "a.jsonl"
    rows = [
        {"instruction": "Add.", "input": "2 2", "output": "4"},
        {"instruction": "Say", "input": "", "output": "字" * 900},
    ]
    path.write_text("\n".join(json.dumps(item) for item in rows))
    dataset = read_dataset([str(path)], DataOptions(like="chatglm-tuning"), side)
    short, long = dataset.examples
    head = side.tokenizer.encode("Instruction: Add.\nInput: 2 2\nAnswer: ")
    assert list(short.ids) == [*head, 150001, 150004, *side.tokenizer.encode("4"), 150005]
    assert short.labels == [-100] * (len(head) + 1) + list(short.ids[len(head) + 1 :])
    assert len(long.ids) == 384 and long.labels[-1] != 150005
    assert dataset.facts.stopped == 1 and dataset.facts.warned["unstopped"].count == 1
    dataset.close()


@pytest.mark.parametrize("given", ["", "2 2"])
def test_chatglm_tuning_has_the_labels_of_its_collator_on_both_sides_of_its_limit(sides: Sides, given: str) -> None:
    """labels = -100 * (|prompt| - 1) · ids[|prompt| - 1:] of ids[:384], the prompt with the two tokens that end it
    (tokenize_dataset_rows.py and finetune.py, 0b8d327); a row is refused where no token of the answer is left."""
    side = sides("chatglm-6b-early")
    encode, recipe = side.tokenizer.encode, RECIPES["chatglm-tuning"]
    text = "Instruction: Say\n" + (f"Input: {given}\n" if given else "") + "Answer: "
    prompt = [*encode(text), 150001, 150004]
    room = 384 - len(prompt)
    (piece,) = {len(encode("一" * n)) - len(encode("一" * (n - 1))) for n in range(50, 60)}
    assert piece == 1
    for size in (1, room - 2, room - 1, room, room + 1, 900):
        answer = "一" * (size - len(encode("一")) + 1)
        target = encode(answer)
        whole = [*prompt, *target, 150005]
        ids, learned = labels("chatglm-tuning", row("Say", answer, asked=("Say", given)), side)
        assert ids == whole[:384]
        assert learned == ([-100] * (len(prompt) - 1) + whole[len(prompt) - 1 :])[:384]
        assert (learned[-1] == 150005) == (len(whole) <= 384)
    long = row("Say", "好", asked=("一" * 500, given))
    with pytest.raises(RowFault):
        recipe.make(recipe, long, side.prompt)


def test_chatglm_tuning_trains_by_the_numbers_of_its_authors() -> None:
    found = Settings.from_json(RECIPES["chatglm-tuning"].settings)
    assert (found.rank, found.alpha, found.dropout, found.targets) == (8, 32.0, 0.1, ("query_key_value",))
    assert (found.rows_per_step, found.steps, found.learning_rate) == (6, 52000, 1e-4)
    assert (found.save_every, found.keep, found.weight_decay, found.clip) == (1000, 2, 0.0, 1.0)


@pytest.mark.parametrize(
    ("length", "windows", "lost"),
    [(120, 1, 0), (200, 1, 0), (201, 1, 1), (250, 1, 50), (251, 1, 51), (450, 1, 250), (451, 2, 51), (650, 2, 250),
     (651, 3, 51), (1000, 4, 200)],
)  # fmt: skip
def test_cpm_keeps_the_windows_of_the_original_and_loses_what_it_loses(length: int, windows: int, lost: int) -> None:
    kept = list(cpm_windows(length, 200, 200))
    assert len(kept) == windows
    assert length - sum(end - start for start, end in kept) == lost


def test_cpm_loses_the_end_of_long_lines_and_our_own_way_loses_no_token(sides: Sides, tmp_path: Path) -> None:
    side = sides("cpm")
    text = tmp_path / "novel.txt"
    lines = ["今天天气很好。", "我们一起去公园散步，看见了很多花。" * 40, "　　完"]
    text.write_text("\n\n".join(lines), encoding="utf-8")
    tokens = [len(side.tokenizer.encode(line.strip())) + 1 for line in lines]
    theirs = read_dataset([str(text)], DataOptions(like="cpm"), side)
    assert theirs.examples.lengths == [end - start for size in tokens for start, end in cpm_windows(size, 200, 200)]
    assert theirs.facts.stopped == sum(size <= 200 for size in tokens) == 2
    assert theirs.facts.taken == sum(tokens) - sum(theirs.examples.lengths) > 0
    ours = read_dataset([str(text)], DataOptions(max_length=200), side)
    assert sum(ours.examples.lengths) == sum(tokens) and max(ours.examples.lengths) == 200
    assert ours.facts.stopped == 3 and ours.facts.taken == 0
    theirs.close()
    ours.close()


def test_a_run_like_an_original_has_its_numbers_and_what_was_asked_for_wins(sides: Sides, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n' * 20)
    dataset = read_dataset([str(path)], DataOptions(like="lora-guide"), sides("chatglm-6b"))
    found = settings_of({}, dataset, RECIPES["lora-guide"])
    assert (found.rank, found.alpha, found.dropout, found.targets) == (8, 32.0, 0.1, ("query_key_value",))
    assert (found.learning_rate, found.save_every, found.seed) == (1e-4, 500, 0)
    assert len(steps_of(dataset.examples.lengths, found)) == 1500
    found = settings_of({"lr": 1e-3, "epochs": 2}, dataset, RECIPES["lora-guide"])
    assert found.learning_rate == 1e-3 and len(steps_of(dataset.examples.lengths, found)) == 40
    rates = [settings_of(given, dataset, None, width).learning_rate for given, width in (
        ({}, 576), ({}, 4096), ({"lr": 1e-4}, 576), ({"method": "full"}, 576), ({"method": "dpo"}, 576))]  # fmt: skip
    assert rates == [5e-4, 2e-4, 1e-4, 2e-5, 2e-5]
    dataset.close()


def test_the_faces_know_every_recipe_and_which_of_them_is_trained() -> None:
    assert {name: recipe.method for name, recipe in RECIPES.items()} == LIKE


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_a_recipe_says_where_it_differs_and_is_for_one_family(recipe: Recipe, sides: Sides, tmp_path: Path) -> None:
    assert differences(recipe)
    assert Settings.from_json(recipe.settings).learning_rate == recipe.settings["learning_rate"]
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "a", "answer": "b"}')
    with pytest.raises(Usage) as refused:
        read_dataset([str(path)], DataOptions(like=recipe.name), sides("smollm2"))
    assert refused.value.code == "data.recipe_family"
