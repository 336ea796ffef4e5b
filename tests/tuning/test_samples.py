"""Answers while it learns are those that the engine would give greedily; events carry what a view shows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from learning import documents, learn, plain
from tiny_checkpoints import build

from glmchat.core.messages import Sampling
from glmchat.engine.engine import Engine
from glmchat.tuning.samples import Question


@pytest.mark.parametrize("family", ["llama", "gguf"])
def test_samples_are_the_greedy_answers_of_the_model_with_its_adapter(tmp_path: Path, family: str) -> None:
    folder, data = build(family, tmp_path / "base"), documents(family, 8)
    ids = data[0].ids[:8]
    settings = plain(steps=6, rows_per_step=4, learning_rate=1e-2, sample_every=3, sample_tokens=6)
    result, events = learn(tmp_path / "run", folder, data, settings, questions=[Question("why", ids)])
    samples = [event for event in events if event["kind"] == "sample"]
    assert [(sample["step"], sample["question"]) for sample in samples] == [(3, "why"), (6, "why")]
    engine = Engine.load(folder, dtype="float32", threads=1)
    engine.attach(result.adapter, name="a")
    engine.activate({"a": 1.0})
    expected = list(engine.generate(list(ids), Sampling(temperature=0, max_tokens=6)))
    stopped = expected[-1] in engine.stop_ids
    assert samples[-1]["answer"] == engine.detokenize(expected[:-1] if stopped else expected)
    assert samples[-1]["stopped"] == stopped


def test_every_step_tells_what_a_view_shows(tmp_path: Path) -> None:
    folder, data = build("llama", tmp_path / "base"), documents("llama", 9)
    settings = plain(epochs=2, rows_per_step=3, evaluate_every=4, save_every=3, schedule="cosine", warmup=2)
    result, events = learn(tmp_path / "run", folder, data, settings, evaluation=documents("llama", 4, seed=8))
    steps = [event for event in events if event["kind"] == "step"]
    for event in steps:
        assert {"step", "steps", "epoch", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "memory",
                "seconds_left", "worst"} <= event.keys()  # fmt: skip
        assert all(math.isfinite(value) for key, value in event.items() if key != "kind")
    assert [event["epoch"] for event in steps] == [1, 1, 1, 2, 2, 2]
    assert [event["lr"] for event in steps][:2] == [0.0, pytest.approx(1e-4)] and steps[-1]["seconds_left"] == 0
    assert [event["step"] for event in events if event["kind"] == "evaluation"] == [4, 6]
    assert [event["step"] for event in events if event["kind"] == "checkpoint"] == [3, 6]
    found = [event for event in events if event["kind"] == "evaluation"][-1]
    assert found["loss"] == result.evaluation and found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    engine = Engine.load(folder, dtype="float32", threads=1)
    engine.attach(result.adapter, name="a")
    engine.activate({"a": 1.0})
    rows = documents("llama", 4, seed=8)
    counts = [sum(row.learned[1:]) for row in rows]
    total = sum(engine.loss(row.ids, row.labels) * count for row, count in zip(rows, counts, strict=True))
    assert total / sum(counts) == pytest.approx(found["loss"], rel=1e-4)
    assert torch.isfinite(torch.tensor(result.loss))
