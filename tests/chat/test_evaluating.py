"""What is asked for in a conversation, the order of rows, and the cells of the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import model_in
from hypothesis import given
from hypothesis import strategies as st

from glmchat.chat.evaluating import difference_cells, measures, ordered, request_in_chat, value_cells
from glmchat.chat.launch import LaunchOptions
from glmchat.core.engine_options import EngineOptions
from glmchat.core.errors import GlmchatError, Usage
from glmchat.hub import adapters


@pytest.fixture
def launch(tmp_path: Path) -> LaunchOptions:
    folder = model_in(tmp_path / "tiny")
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"x" * 1200)
    facts = {"kind": "lora", "form": "peft", "rank": 8, "shapes": {"q_proj": [64, 64]}, "layers": 3}
    adapters.keep("poet", [weights], facts, adapters.Origin("here"), base=None)
    (tmp_path / "dev set.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    (tmp_path / "dev.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    return LaunchOptions(EngineOptions(folder=folder, model=str(folder)))


def test_data_alone_are_answered_by_the_model_and_by_it_with_its_adapters(
    launch: LaunchOptions, tmp_path: Path
) -> None:
    name, data, plain = launch.engine.model, str(tmp_path / "dev set.jsonl"), str(tmp_path / "dev.jsonl")

    def texts(words: str, *chosen: tuple[str, float]) -> list[str]:
        asked = request_in_chat(words, launch, chosen)
        assert asked is not None and asked["data"] == [
            data if " " in words.rpartition("/")[2] else str(tmp_path / "dev.jsonl")
        ]
        assert all(one["sampling"]["temperature"] == 0 for one in asked["candidates"] if ",temp" not in one["text"])
        return [one["text"] for one in asked["candidates"]]

    assert texts(data) == [name]
    assert texts(data, ("poet", 1.0)) == [name, f"{name}+poet"]
    assert texts(data, ("poet", 0.5)) == [name, f"{name}+poet:0.5"]
    assert texts(f"+poet ,temp=1 {plain}") == [f"{name}+poet", f"{name},temp=1"]


def test_words_that_name_no_data_name_an_evaluation_and_candidates_without_data_are_refused(
    launch: LaunchOptions,
) -> None:
    assert request_in_chat("dev-1a2b3c", launch, ()) is None
    with pytest.raises(Usage, match="no file"):
        request_in_chat("+poet dev-1a2b3c", launch, ())


def test_a_model_of_a_server_is_not_evaluated_here(launch: LaunchOptions, tmp_path: Path) -> None:
    for elsewhere in (LaunchOptions(server="http://127.0.0.1:1/v1"), LaunchOptions()):
        with pytest.raises(GlmchatError) as error:
            request_in_chat(str(tmp_path / "dev.jsonl"), elsewhere, ())
        assert error.value.code == "eval.server"


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), max_size=20))
def test_rows_stand_by_how_far_the_last_candidate_is_ahead_and_without_worth_as_in_the_data(
    worth: list[tuple[float, float]],
) -> None:
    rows = [{"number": n, "worth": list(pair)} for n, pair in enumerate(worth)]
    ahead = [row["worth"][1] - row["worth"][0] for row in ordered(rows)]
    assert ahead == sorted(ahead) and {row["number"] for row in ordered(rows)} == set(range(len(worth)))
    bare: list[dict[str, Any]] = [{"number": n} for n in range(len(worth))]
    assert ordered(bare) == bare


def test_a_difference_is_marked_where_its_interval_holds_nothing_and_a_minus_is_one() -> None:
    def told(mean: float, *, shown: bool) -> dict[str, Any]:
        return {"mean": mean, "low": mean - 1, "high": mean + 1, "shown": shown}

    values = dict.fromkeys(measures("characters"), 12.345)
    second = {"values": values, "differences": {"loss": told(-2.0, shown=True), "exact": told(0.5, shown=False)}}
    result = {"bleu": "characters", "candidates": [{"values": values, "differences": {}}, second]}
    assert value_cells(result)[0] == ("loss per learned token", "12.3450", "12.3450")
    loss, exact = difference_cells(result, 1)
    assert loss == ("loss per learned token", "−2.0000", "−3.0000 … −1.0000", "")
    assert exact == ("exact match", "+0.5 %", "−0.5 … +1.5", "no difference shown")
