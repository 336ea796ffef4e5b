"""Which files are read, what their columns are called, what is held out and mixed in.

Covers tuning/sources.py, tuning/formats.py, tuning/gathering.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glmchat.core.errors import GlmchatError, Hostile, Usage
from glmchat.tuning.dataset import DataOptions, Dataset, read_dataset
from glmchat.tuning.prompt_side import PromptSide
from glmchat.tuning.sources import find_sources, share_of

Sides = Callable[[str], PromptSide]


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def said(dataset: Dataset, side: PromptSide) -> list[str]:
    """The learned words of each example."""
    found = [side.tokenizer.decode([t for t in example.labels if t >= 0]) for example in dataset.examples]
    dataset.close()
    return found


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"question": "a", "answer": "b"}, {}),
        ({"instruction": "a", "input": "", "output": "b"}, {}),
        ({"content": "a", "summary": "b"}, {}),
        ({"prompt": "a", "response": "b", "history": []}, {}),
        ({"query": "a", "response": "b"}, {}),
        ({"问题": "a", "答案": "b"}, {}),
        ({"q": "a", "r": "b"}, {"columns": {"prompt": "q", "answer": "r"}}),
        ({"question": "x", "answer": "y", "q": "a", "r": "b"}, {"columns": {"prompt": "q", "answer": "r"}}),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {}),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]},
                       {"role": "assistant", "content": "b"}]}, {}),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {}),
        ({"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {}),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], {}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"columns": {"prompt": "prompt", "answer": "chosen"}}),
        ({"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"},
          "rejected": {"from": "gpt", "value": "c"}},
         {"columns": {"messages": "conversations", "answer": "chosen"}}),
    ],
)  # fmt: skip
def test_one_conversation_is_the_same_example_in_every_format(
    sides: Sides, tmp_path: Path, row: Any, options: dict[str, Any]
) -> None:
    side = sides("smollm2")
    plain = read_dataset([lines(tmp_path / "plain.jsonl", [{"question": "a", "answer": "b"}])], DataOptions(), side)
    found = read_dataset([lines(tmp_path / "a.jsonl", [row])], DataOptions(**options), side)
    assert found.examples[0].ids == plain.examples[0].ids
    assert found.examples[0].learned == plain.examples[0].learned
    plain.close()
    found.close()


def test_history_is_learned_too_and_a_system_text_stands_first(sides: Sides, tmp_path: Path) -> None:
    side = sides("smollm2")
    rows = [{"instruction": "c", "input": "d", "output": "e", "history": [["a", "b"]], "system": "Be brief."}]
    found = read_dataset([lines(tmp_path / "a.jsonl", rows)], DataOptions(system="other"), side)
    text = side.tokenizer.decode(found.examples[0].ids)
    assert "Be brief." in text and "other" not in text and "c\nd" in text
    assert said(found, side) == ["be"]
    found = read_dataset([lines(tmp_path / "a.jsonl", rows)], DataOptions(on="last"), side)
    assert said(found, side) == ["e"]


def test_an_entry_of_dataset_info_tells_columns_and_tags(sides: Sides, tmp_path: Path) -> None:
    side = sides("smollm2")
    lines(tmp_path / "rows.jsonl", [{"talk": [{"who": "me", "what": "a"}, {"who": "it", "what": "b"}]}])
    lines(tmp_path / "two.jsonl", [{"q": "a", "r": "b", "before": [["x", "y"]]}])
    table = tmp_path / "dataset_info.json"
    table.write_text(json.dumps({
        "talks": {"file_name": "rows.jsonl", "formatting": "sharegpt", "columns": {"messages": "talk"},
                  "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "me", "assistant_tag": "it"}},
        "two": {"file_name": "two.jsonl", "columns": {"prompt": "q", "response": "r", "history": "before"}},
        "out": {"file_name": "../rows.jsonl"}, "hub": {"hf_hub_url": "a/b"}, "gone": {"file_name": "gone.json"},
    }))  # fmt: skip
    assert said(read_dataset([f"{table}#talks"], DataOptions(), side), side) == ["b"]
    assert said(read_dataset([f"{table}#two"], DataOptions(), side), side) == ["yb"]
    for name, kind in (("out", Hostile), ("hub", Usage), ("gone", Usage), ("none", Usage)):
        with pytest.raises(kind):
            find_sources([f"{table}#{name}"])


def test_pairs_are_refused_by_name_with_the_way_to_learn_the_better_answers(
    sides: Sides, shared: Path, tmp_path: Path
) -> None:
    data = str(shared / "data" / "llama-factory" / "dpo_zh_demo.json")
    for word in (data, str(shared / "data" / "llama-factory" / "dataset_info.json") + "#dpo_zh_demo"):
        with pytest.raises(Usage) as refused:
            read_dataset([word], DataOptions(), sides("smollm2"))
        assert refused.value.code == "data.pairs"
    columns = dict(item.split("=") for item in refused.value.hint.split("--columns ")[1].split(","))
    options = DataOptions(columns=columns, over_length="cut-answer")
    dataset = read_dataset([data], options, sides("smollm2"))
    assert dataset.facts.read == 300 == dataset.facts.used + dataset.facts.refusals and dataset.facts.used > 290
    dataset.close()


def test_a_share_is_held_out_exactly_and_with_it_all_duplicates(sides: Sides, tmp_path: Path) -> None:
    rows = [{"question": f"q{n % 90}", "answer": "a"} for n in range(100)]
    side, seen = sides("smollm2"), []
    for seed in (0, 0, 1):
        options = DataOptions(evaluation="10%", seed=seed)
        dataset = read_dataset([lines(tmp_path / "a.jsonl", rows)], options, side)
        held = {example.ids for example in dataset.evaluation}
        learned = {example.ids for example in dataset.examples}
        assert not held & learned and len(held | learned) == 90
        assert 10 <= len(dataset.evaluation) <= 12 and len(dataset.examples) + len(dataset.evaluation) == 100
        assert dataset.facts.warned["duplicate"].count == 10 and "leak" not in dataset.facts.warned
        seen.append(held)
        dataset.close()
    assert seen[0] == seen[1] != seen[2]


def test_a_file_to_judge_by_is_held_out_and_what_is_learned_too_is_told(sides: Sides, tmp_path: Path) -> None:
    train = lines(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}])
    held = lines(tmp_path / "e.jsonl", [{"content": "c", "summary": "d"}, {"content": "e", "summary": "f"}])
    dataset = read_dataset([train], DataOptions(evaluation=held), sides("smollm2"))
    assert len(dataset.examples) == len(dataset.evaluation) == 2
    assert dataset.facts.warned["leak"].count == 1
    dataset.close()


def test_what_is_mixed_in_is_its_share_of_all_rows(sides: Sides, tmp_path: Path) -> None:
    own = lines(tmp_path / "a.jsonl", [{"question": f"q{n}", "answer": "a"} for n in range(40)])
    general = lines(tmp_path / "g.jsonl", [{"question": f"g{n}", "answer": "a"} for n in range(100)])
    dataset = read_dataset([own], DataOptions(mixes=(f"{general}:20%",)), sides("smollm2"))
    assert [file.taken for file in dataset.facts.files] == [40, 10]
    assert len(dataset.examples) == 50 and dataset.facts.read == dataset.facts.used == 140
    dataset.close()


def test_more_than_one_row_in_a_hundred_that_is_too_long_is_asked_about(sides: Sides, tmp_path: Path) -> None:
    for count, is_refused in ((1, False), (2, True)):
        rows = [{"question": "w " * 300 if n < count else f"q{n}", "answer": "a"} for n in range(101)]
        data = lines(tmp_path / "a.jsonl", rows)
        if is_refused:
            with pytest.raises(Usage) as refused:
                read_dataset([data], DataOptions(max_length=100), sides("smollm2"))
            assert refused.value.code == "data.long" and f"{data}:1" in refused.value.message
        else:
            dataset = read_dataset([data], DataOptions(max_length=100), sides("smollm2"))
            assert dataset.facts.long == count and dataset.facts.taken > 0
            dataset.close()
        with pytest.raises(Usage):
            read_dataset([data], DataOptions(max_length=100, over_length="refuse"), sides("smollm2"))


@pytest.mark.parametrize(
    "options",
    [
        {"columns": {"prompt": "q"}}, {"columns": {"boss": "q"}}, {"format": "nonsense"}, {"like": "nonsense"},
        {"mixes": ("a.jsonl",)}, {"evaluation": "gone.jsonl"}, {"evaluation": "99%"}, {"on": "text"},
        {"like": "lora-guide", "max_length": 5},
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused_with_a_way_out(
    sides: Sides, tmp_path: Path, options: dict[str, Any]
) -> None:
    data = lines(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])
    with pytest.raises(GlmchatError) as refused:
        read_dataset([data], DataOptions(**options), sides("chatglm-6b"))
    assert refused.value.hint


def test_a_base_model_learns_texts_and_says_that_it_has_no_questions(sides: Sides, tmp_path: Path) -> None:
    side = sides("cpm")
    with pytest.raises(Usage) as refused:
        read_dataset([lines(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])], DataOptions(), side)
    assert refused.value.code == "data.no_chat"
    folder = tmp_path / "novel"
    folder.mkdir()
    for name, text in (("2.txt", "二\n\n三\n"), ("1.txt", "一")):
        (folder / name).write_text(text, encoding="utf-8")
    dataset = read_dataset([str(folder)], DataOptions(), side)
    assert [example.place.line for example in dataset.examples] == [1, 1, 3]
    assert [side.tokenizer.decode(example.ids) for example in dataset.examples] == ["一", "二", "三"]
    assert dataset.facts.on == "text"
    dataset.close()


def test_a_share_is_a_number_of_percent() -> None:
    assert share_of("5%") == 0.05 and share_of("12.5%") == 0.125
    assert share_of("a.jsonl") is None and share_of("100%") is None
