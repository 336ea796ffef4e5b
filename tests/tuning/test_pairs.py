"""Pairs of a better and a worse answer: in all their forms, kept or refused whole, each fault named by its line.

Covers tuning/pairs.py, tuning/gathering.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glmchat.core.errors import Usage
from glmchat.tuning.dataset import DataOptions, read_dataset
from glmchat.tuning.page import Facts, lines
from glmchat.tuning.prompt_side import PromptSide

Sides = Callable[[str], PromptSide]
PAIRS = DataOptions(pairs=True)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def gpt(value: str) -> dict[str, str]:
    return {"from": "gpt", "value": value}


def written(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


ASKED = [turn("user", "q")]
BETTER, WORSE = turn("assistant", "good"), turn("assistant", "bad")
HUMAN = [{"from": "human", "value": "q"}]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, {}),
        ({"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"}, {}),
        ({"question": "q", "chosen": "good", "rejected": "bad"}, {}),
        ({"prompt": "q", "chosen": [*ASKED, BETTER], "rejected": [*ASKED, WORSE], "messages": [*ASKED, BETTER],
          "score_chosen": 8.0}, {}),
        ({"prompt": ASKED, "chosen": [BETTER], "rejected": [WORSE]}, {}),
        ({"chosen": [*ASKED, BETTER], "rejected": [*ASKED, WORSE]}, {}),
        ({"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"}, {}),
        ({"conversations": HUMAN, "chosen": gpt("good"), "rejected": gpt("bad")}, {}),
        ({"messages": ASKED, "chosen": BETTER, "rejected": WORSE}, {}),
        ({"messages": ASKED, "chosen": [BETTER], "rejected": [WORSE]}, {}),
        ({"messages": ASKED, "chosen": "good", "rejected": "bad"}, {}),
        ({"input": {"messages": ASKED, "tools": [], "parallel_tool_calls": True}, "preferred_output": [BETTER],
          "non_preferred_output": [WORSE]}, {}),  # platform.openai.com/docs/guides/direct-preference-optimization
        ({"a": "q", "b": "good", "c": "bad"}, {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ],
)  # fmt: skip
def test_one_pair_is_the_same_example_in_every_format(
    sides: Sides, tmp_path: Path, row: Any, columns: dict[str, str]
) -> None:
    """Its two documents are those that the two answers make as rows of their own."""
    side, wanted = sides("smollm2"), []
    for answer in ("good", "bad"):
        single = read_dataset(
            [written(tmp_path / "s.jsonl", [{"question": "q", "answer": answer}])], DataOptions(), side
        )
        wanted.append((single.examples[0].ids, single.examples[0].learned))
        single.close()
    found = read_dataset([written(tmp_path / "a.jsonl", [row])], DataOptions(columns=columns, pairs=True), side)
    assert len(found.examples) == 1 and list(found.examples[0].documents()) == wanted
    assert [part.part for part in found.examples[0].segments] == ["prompt", "answer", "stop"] * 2
    found.close()


def test_the_tools_of_openais_preferences_are_offered_and_its_faults_have_a_place(sides: Sides, tmp_path: Path) -> None:
    side = sides("chatglm3")
    tool = {"type": "function", "function": {"name": "time", "description": "now", "parameters": {}}}
    row = {"input": {"messages": ASKED, "tools": [tool]}, "preferred_output": [BETTER], "non_preferred_output": [WORSE]}
    bad = {**row, "input": {"messages": [{"role": "nobody", "content": "q"}]}}
    found = read_dataset([written(tmp_path / "a.jsonl", [row, bad])], PAIRS, side)
    assert '"name": "time"' in side.tokenizer.decode(list(found.examples[0].ids))
    assert found.facts.files[0].form == "preferences-openai"
    column = json.dumps(bad, ensure_ascii=False).index('"nobody"') + 1
    assert found.facts.refused["role"].first[0].startswith(f"{tmp_path / 'a.jsonl'}:2:{column}: ")
    found.close()
    with pytest.raises(Usage) as refused:
        read_dataset([str(tmp_path / "a.jsonl")], DataOptions(), side)
    assert "--columns messages=input,answer=preferred_output" in refused.value.hint
    better = DataOptions(columns={"messages": "input", "answer": "preferred_output"})
    found = read_dataset([str(tmp_path / "a.jsonl")], better, side)
    assert found.facts.used == 1
    found.close()


def test_the_table_of_llama_factory_names_its_pairs(sides: Sides, tmp_path: Path, shared: Path) -> None:
    written(tmp_path / "talks.jsonl", [{"talk": HUMAN, "yes": gpt("good"), "no": gpt("bad")}])
    written(tmp_path / "rows.jsonl", [{"q": "q", "chosen": "good", "rejected": "bad", "sys": "s"}])
    table = tmp_path / "dataset_info.json"
    talks = {"messages": "talk", "chosen": "yes", "rejected": "no"}
    table.write_text(json.dumps({
        "talks": {"file_name": "talks.jsonl", "ranking": True, "formatting": "sharegpt", "columns": talks},
        "rows": {"file_name": "rows.jsonl", "ranking": True, "columns": {"prompt": "q", "system": "sys"}},
    }))  # fmt: skip
    side = sides("smollm2")
    for name in ("talks", "rows"):
        found = read_dataset([f"{table}#{name}"], PAIRS, side)
        learned = [
            side.tokenizer.decode([t for t, c in zip(*d, strict=True) if c]) for d in found.examples[0].documents()
        ]
        assert [words.split("<")[0] for words in learned] == ["good", "bad"]
        found.close()
    real = str(shared / "data" / "llama-factory" / "dataset_info.json") + "#dpo_zh_demo"
    found = read_dataset([real], DataOptions(pairs=True, over_length="cut-question", max_length=1024), side)
    facts = found.facts
    assert facts.read == 300 == facts.used + facts.refusals and len(found.examples) == facts.used > 200
    assert all(max(example.lengths) <= 1024 and len(example.lengths) == 2 for example in found.examples)
    assert facts.taken > 0 and facts.on == "pairs"
    found.close()


def test_both_sides_stand_behind_what_the_chat_sends(sides: Sides, family: str, tmp_path: Path) -> None:
    from glmchat.core.messages import Message

    side = sides(family)
    talk = [turn("user", "你好"), turn("assistant", "你好！"), turn("user", "天空为什么是蓝色的？")]
    row = {"messages": talk, "chosen": turn("assistant", "散射。"), "rejected": turn("assistant", "不知道。")}
    found = read_dataset([written(tmp_path / "a.jsonl", [row])], PAIRS, side)
    example = found.examples[0]
    sent = tuple(side.prompt.render([Message(each["role"], each["content"]) for each in talk]))
    for ids, learned in example.documents():
        assert ids[: len(sent)] == sent and learned == (False,) * len(sent) + (True,) * (len(ids) - len(sent))
    found.close()


FAULTS: list[tuple[Any, str, str]] = [
    ({"prompt": "q", "chosen": "same", "rejected": "same "}, "pair", "the same answer twice"),
    ({"prompt": "q", "chosen": "", "rejected": "bad"}, "empty", "chosen"),
    ({"prompt": "q", "chosen": "good", "rejected": "  "}, "empty", "rejected"),
    ({"prompt": "q", "chosen": "good"}, "missing", "'rejected'"),
    ({"prompt": "q", "chosen": "good", "rejected": None}, "type", "null"),
    ({"prompt": "q", "chosen": 3, "rejected": "bad"}, "type", "a number"),
    ({"prompt": "", "chosen": "good", "rejected": "bad"}, "empty", "an empty question"),
    ({"prompt": "q", "chosen": [], "rejected": [WORSE]}, "type", "chosen"),
    ({"prompt": "q", "chosen": [BETTER, BETTER], "rejected": [WORSE]}, "pair", "several messages"),
    ({"prompt": "q", "chosen": [*ASKED, BETTER], "rejected": [turn("user", "r"), WORSE]}, "pair", "different"),
    ({"prompt": [*ASKED, BETTER], "chosen": "good", "rejected": "bad"}, "order", "answered already"),
    ({"prompt": "q", "chosen": ASKED, "rejected": ASKED}, "order", "no answer"),
    ({"prompt": "q", "chosen": [turn("wizard", "x")], "rejected": [WORSE]}, "role", "wizard"),
]  # fmt: skip


def test_every_faulty_pair_is_named_by_its_line_and_the_counts_add_up(sides: Sides, tmp_path: Path) -> None:
    good = [{"prompt": f"q{n}", "chosen": "good", "rejected": "bad"} for n in range(4)]
    rows = [*good[:2], *(row for row, _, _ in FAULTS), *good[2:]]
    path = written(tmp_path / "pairs.jsonl", rows)
    found = read_dataset([path], PAIRS, sides("smollm2"))
    facts = found.facts
    assert (facts.read, facts.used, facts.refusals) == (len(rows), 4, len(FAULTS)) and len(found.examples) == 4
    told = {line for what in facts.refused.values() for line in what.first}
    for number, (_, reason, words) in enumerate(FAULTS, 3):
        own = [line for line in facts.refused[reason].first if line.startswith(f"{path}:{number}:")]
        assert len(own) == 1 and words in own[0], (number, reason, told)
    found.close()


def test_a_text_without_its_question_asks_for_the_column(sides: Sides, tmp_path: Path) -> None:
    path = written(tmp_path / "pairs.jsonl", [{"chosen": "good", "rejected": "bad"}])
    with pytest.raises(Usage) as refused:
        read_dataset([path], PAIRS, sides("smollm2"))
    assert "--columns prompt=" in refused.value.message and refused.value.code == "data.nothing"


def test_rows_without_pairs_are_refused_by_name(sides: Sides, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(Usage) as refused:
        read_dataset([path], PAIRS, sides("smollm2"))
    assert refused.value.code == "data.no_pairs" and "--method dpo" in refused.value.hint
    with pytest.raises(Usage) as refused:
        read_dataset([path], DataOptions(columns={"prompt": "question", "chosen": "answer"}), sides("smollm2"))
    assert refused.value.code == "data.columns"


LONG = " ".join(str(n) for n in range(400))


@pytest.mark.parametrize("family", ["smollm2", "chatglm-6b", "chatglm3"])
def test_a_pair_is_cut_on_both_sides_alike_or_refused_whole(sides: Sides, tmp_path: Path, family: str) -> None:
    rows = [
        {"prompt": LONG, "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": f"good {LONG}", "rejected": "bad"},
        {"prompt": "q", "chosen": f"{LONG} good", "rejected": f"{LONG} bad"},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
    ]
    path, side = written(tmp_path / "pairs.jsonl", rows), sides(family)
    whole = read_dataset([path], DataOptions(pairs=True, max_length=2000), side)
    sizes = [sum(example.lengths) for example in whole.examples]
    whole.close()
    for policy, used in (("cut-question", [1, 4]), ("cut-answer", [2, 4]), ("drop", [4])):
        found = read_dataset([path], DataOptions(pairs=True, max_length=100, over_length=policy), side)  # type: ignore[arg-type]
        assert [example.place.line for example in found.examples] == used, policy
        assert all(max(example.lengths) <= 100 for example in found.examples)
        assert found.facts.used + found.facts.refusals == 4
        kept = sum(sizes[line - 1] for line in used) - sum(sum(example.lengths) for example in found.examples)
        assert found.facts.taken == kept
        for example in found.examples:
            (better, learned), (worse, counts) = example.documents()
            start = learned.index(True)
            assert counts.index(True) == start and better[:start] == worse[:start] and better != worse
        found.close()


def test_the_page_marks_both_sides_and_says_pairs(sides: Sides, tmp_path: Path) -> None:
    rows = [{"prompt": f"q\x1b[2J{n}", "chosen": "good", "rejected": "bad"} for n in range(3)]
    found = read_dataset([written(tmp_path / "pairs.jsonl", rows)], PAIRS, sides("smollm2"))
    facts = Facts.from_json(json.loads(json.dumps(found.facts.to_json())))
    page = lines(facts)
    assert "\x1b" not in "".join(page)
    at = page.index("  better:")
    other = page.index("  worse:", at)
    better, worse = " ".join(page[at:other]), " ".join(page[other:])
    assert "[good]" in better and "[bad]" not in better and "[bad]" in worse
    assert any("3 pairs" in line for line in page)
    found.close()


def test_pairs_are_held_out_whole_and_doubled_ones_are_told(sides: Sides, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n % 40}", "chosen": "good", "rejected": "bad"} for n in range(44)]
    options = DataOptions(pairs=True, evaluation="20%")
    found = read_dataset([written(tmp_path / "pairs.jsonl", rows)], options, sides("smollm2"))
    held, learned = ({example.ids for example in part} for part in (found.evaluation, found.examples))
    assert not held & learned and len(held | learned) == 40 and found.facts.warned["duplicate"].count == 4
    assert len(found.examples) + len(found.evaluation) == 44
    found.close()
