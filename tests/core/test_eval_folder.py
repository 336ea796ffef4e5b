"""Folders of evaluations: one for each question, read by name, and what may be taken away."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmchat.core import locations
from glmchat.core.errors import Usage
from glmchat.core.eval_folder import (
    evaluations,
    evaluations_of,
    find_evaluation,
    open_evaluation,
    unused_answers,
)

KEYS = ["a" * 24, "b" * 24]


def recipe(data: str = "/rows/dev.jsonl", **more: Any) -> dict[str, Any]:
    candidates = [
        {"text": "tiny", "model": "tiny:int4", "adapters": []},
        {"text": "tiny+poet", "model": "tiny", "adapters": [["poet", "/store/poet", 1.0]]},
    ]
    return {"candidates": candidates, "data": [data], "keys": KEYS, **more}


def answers_in(key: str) -> Path:
    folder = locations.private_dir(locations.evals_dir() / key)
    (folder / "answers.jsonl").write_text(json.dumps({"row": 1}) + "\n")
    return folder


def test_the_same_question_has_the_same_folder_and_another_one_has_another() -> None:
    first = open_evaluation(recipe())
    assert open_evaluation(recipe(rows=5)) == first
    others = [open_evaluation(recipe(limit=3)), open_evaluation(recipe(bleu="words")), open_evaluation(recipe(seed=7))]
    assert len({first, *others}) == 4 and {one.id for one in evaluations()} == {one.id for one in (first, *others)}
    assert find_evaluation(first.id) == first
    assert first.folder.stat().st_mode & 0o777 == 0o700


@given(st.text(min_size=1, max_size=80))
def test_data_of_any_name_make_a_folder_inside_the_place_of_evaluations(name: str) -> None:
    found = open_evaluation(recipe(f"/{name}"))
    assert found.folder.parent == locations.data_dir() / "evaluations" and found in evaluations()
    assert found.id.isprintable() and not {"/", "\0", " "} & set(found.id)


def test_a_name_that_is_none_or_the_beginning_of_two_is_refused_with_those_there_are() -> None:
    one, other = open_evaluation(recipe()), open_evaluation(recipe(limit=3))
    for name in ("nobody", "../x", "", "dev-"):
        with pytest.raises(Usage) as error:
            find_evaluation(name)
        assert one.id in error.value.hint and other.id in error.value.hint


def test_a_model_and_an_adapter_find_those_they_took_part_in_and_a_copy_its_model() -> None:
    found = open_evaluation(recipe())
    assert [(one, number) for one, number in evaluations_of("tiny")] == [(found, 0), (found, 1)]
    assert [(one, number) for one, number in evaluations_of("poet")] == [(found, 1)]
    assert not list(evaluations_of("nobody"))


def test_answers_that_a_program_writes_are_not_unused_and_those_of_one_at_work_neither() -> None:
    held, idle = (answers_in(key) for key in KEYS)
    foreign = answers_in("c" * 24)
    found = open_evaluation(recipe())
    found.begin([])
    assert found.state() == "running" and [folder for folder, _ in unused_answers()] == [foreign]
    found.note("done")
    with (held / "answers.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert [folder for folder, _ in unused_answers()] == [idle, foreign]
    assert all(size == len(json.dumps({"row": 1})) + 1 for _, size in unused_answers())


def test_what_is_damaged_in_a_folder_is_read_as_nothing() -> None:
    found = open_evaluation(recipe())
    for name in ("table.json", "rows.jsonl", "state.json", "recipe.json"):
        (found.folder / name).write_text("\x00{[")
    assert (found.table(), found.rows(), found.end(), found.keys, found.candidates) == (None, [], None, [], [])
    assert found.state() == "dead" and found in evaluations()
