"""Rows as several models read them: the same rows for all, the chat's own prompt, and what is refused by its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glmchat.core.errors import Usage
from glmchat.core.messages import Message
from glmchat.tuning.prompt_side import PromptSide
from glmchat.tuning.questions import Reader, read_questions
from glmchat.tuning.sources import find_sources, form_of

Sides = Callable[[str], PromptSide]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_every_model_is_asked_what_its_chat_would_ask(sides: Sides, family: str, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [{"prompt": "你好", "response": "好的", "history": [["a", "b"]]}])
    prompt = sides(family).prompt
    (row,) = read_questions(find_sources([data]), [reader := Reader(prompt, 200)]).rows
    said = [Message("user", "a"), Message("assistant", "b"), Message("user", "你好")]
    assert list(reader.question(row, 0)) == prompt.render(said)
    (document,) = reader.documents(row, 0)
    learned = [token for token, counts in zip(document.ids, document.learned, strict=True) if counts]
    assert prompt.tokenizer.decode(learned[:-1]).strip() == "好的" and learned[-1] == prompt.stop_ids[0]
    assert (row.asked, row.wanted, row.kind) == ("你好", ("好的",), "question")


def test_a_row_that_one_model_cannot_read_is_used_by_none(sides: Sides, tmp_path: Path) -> None:
    long = {"prompt": "a", "response": "上衣材质" * 20}
    data = write(
        tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}, long, "{broken", {"prompt": "c", "response": "d"}]
    )
    readers = [Reader(sides("chatglm3").prompt, 2000), Reader(sides("smollm2").prompt, 60)]
    found = read_questions(find_sources([data]), readers)
    assert [row.number for row in found.rows] == [1, 4] and found.refused == 2
    assert f"{data}:2" in found.first[0] and f"{data}:3" in found.first[1]
    assert [len(reader.store) for reader in readers] == [2, 2]


def test_only_so_many_rows_are_read_as_are_asked_for(sides: Sides, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [{"prompt": str(n), "response": "b"} for n in range(300)])
    reader = Reader(sides("smollm2").prompt, 200)
    found = read_questions(find_sources([data]), [reader], most=7)
    assert [row.number for row in found.rows] == [1, 2, 3, 4, 5, 6, 7] and len(reader.store) == 7


def test_a_text_is_not_answered_and_a_pair_is_judged_by_the_answer_that_columns_name(
    sides: Sides, tmp_path: Path
) -> None:
    reader = Reader(sides("smollm2").prompt, 50)
    text = write(tmp_path / "t.jsonl", [{"text": "a word " * 100}])
    (row,) = read_questions(find_sources([text]), [reader]).rows
    assert row.kind == "text" and len(list(reader.documents(row, 0))) > 1
    pair = write(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "good", "rejected": "bad"}])
    better = form_of(None, {"prompt": "prompt", "answer": "chosen"})
    (row,) = read_questions(find_sources([pair], form=better), [reader]).rows
    assert row.wanted == ("good",) and row.is_answered


def test_a_pair_is_two_documents_behind_what_the_chat_sends(sides: Sides, family: str, tmp_path: Path) -> None:
    prompt = sides(family).prompt
    data = write(tmp_path / "p.jsonl", [{"prompt": "你好", "chosen": "好的", "rejected": "不好"}])
    (row,) = read_questions(find_sources([data]), [reader := Reader(prompt, 200)]).rows
    assert (row.kind, row.asked, row.wanted, row.worse) == ("pair", "你好", ("好的",), "不好") and not row.is_answered
    (example,) = reader.documents(row, 0)
    sent = tuple(prompt.render([Message("user", "你好")]))
    for (ids, learned), wanted in zip(example.documents(), ("好的", "不好"), strict=True):
        assert ids[: len(sent)] == sent and not any(learned[: len(sent)]) and all(learned[len(sent) :])
        assert prompt.tokenizer.decode(ids[len(sent) : -1]).strip() == wanted


def test_a_faulty_pair_is_refused_by_its_line(sides: Sides, tmp_path: Path) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    data = write(tmp_path / "p.jsonl", [good, {**good, "rejected": "b"}, {**good, "rejected": ""}, {"prompt": "a"}])
    found = read_questions(find_sources([data]), [Reader(sides("smollm2").prompt, 200)])
    assert [row.number for row in found.rows] == [1] and found.refused == 3
    assert [f"{data}:{line}" in said for line, said in zip((2, 3, 4), found.first, strict=True)] == [True] * 3


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["{broken"], ":1"),
        ([{"prompt": "a", "response": ""}], ":1"),
        ([{"prompt": "a", "response": 5}], ":1"),
        ([], r"a\.jsonl holds no rows"),
    ],
)
def test_data_without_a_usable_row_are_refused_with_the_line(
    sides: Sides, tmp_path: Path, rows: list[Any], said: str
) -> None:
    data = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(Usage, match=said):
        read_questions(find_sources([data]), [Reader(sides("smollm2").prompt, 200)])


def test_a_model_without_a_chat_format_is_asked_no_questions(sides: Sides, tmp_path: Path) -> None:
    data = write(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}])
    readers = [Reader(sides("smollm2").prompt, 200), Reader(sides("cpm").prompt, 200)]
    with pytest.raises(Usage, match="without a chat format") as refused:
        read_questions(find_sources([data]), readers)
    assert refused.value.code == "data.no_chat"
    text = write(tmp_path / "t.jsonl", [{"text": "春天来了"}])
    assert read_questions(find_sources([text]), readers).rows[0].kind == "text"
