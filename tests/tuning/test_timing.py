"""What a run is said to take: from two passes of any machine, and everything that is done besides them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from learning import documents, learn, plain
from tiny_checkpoints import build

from glmchat.tuning import timing
from glmchat.tuning.order import steps_of, worst_of
from glmchat.tuning.settings import Settings

LENGTHS = st.lists(st.integers(4, 900), min_size=2, max_size=60)


@given(LENGTHS, st.floats(0, 2), st.floats(1e-4, 0.1), st.integers(1, 4))
def test_a_machine_whose_passes_cost_so_much_and_so_much_a_token_is_predicted_exactly(
    lengths: list[int], each_pass: float, each_token: float, processes: int
) -> None:
    """Unless all its passes are of nearly one size, where one figure tells all that there is to know."""
    settings = Settings(epochs=2, tokens_per_step=1000, row_tokens=500)
    steps = steps_of(lengths, settings)
    now = [0.0]

    def cost(numbers: Sequence[int]) -> float:
        return each_pass + each_token * sum(lengths[number] for number in numbers)

    def run(numbers: Sequence[int]) -> None:
        now[0] += cost(numbers)

    fullest, usual = worst_of(steps, lengths), timing.usual_pass(steps, lengths)
    found = timing.of_passes(run, fullest, usual, lengths, lambda: now[0])
    true = sum(cost(numbers) for step in steps for numbers in step.passes) / processes
    told = found.seconds(steps, lengths, Settings(), processes)
    if sum(lengths[n] for n in usual) > 0.8 * sum(lengths[n] for n in fullest):
        assert told <= true + 1e-6
    else:
        assert told == pytest.approx(true, rel=1e-3)


@given(st.integers(1, 300), st.integers(0, 50))
def test_what_is_done_between_the_steps_counts_as_often_as_it_is_done(steps: int, every: int) -> None:
    costs = timing.Costs(0.0, 0.0, 1.0, update=1e-3, evaluation=10.0, answers=0.0, checkpoint=0.0, ending=3.0)
    run = steps_of([5] * steps, Settings(epochs=1, rows_per_step=1))
    done = [step for step in range(1, steps + 1) if step == steps or (every and step % every == 0)]
    told = costs.seconds(run, [5] * steps, Settings(evaluate_every=every))
    assert told == pytest.approx(10.0 * len(done) + 1e-3 * steps + 3.0)


def test_the_process_that_reads_back_is_part_of_the_time(tmp_path: Path) -> None:
    base, rows = build("llama", tmp_path / "base"), documents("llama", 4)
    told = learn(tmp_path / "run", base, rows, plain(rows_per_step=2), beginning=1000.0)[1][0]["prediction"]
    assert 1000.0 < told["seconds"] < 2000.0


def test_minutes_become_steps_without_a_second_look_at_the_base(tmp_path: Path) -> None:
    """So many that what is predicted fits into them, with the settings of a run of so many steps."""
    asked: list[int] = []

    def settings_of(steps: int) -> Settings:
        asked.append(steps)
        return plain(steps=steps, rows_per_step=2, save_every=max(1, steps // 3))

    events = learn(
        tmp_path / "run", build("llama", tmp_path / "base"), documents("llama", 6), plain(rows_per_step=2),
        within=(0.005, settings_of),
    )[1]  # fmt: skip
    (plan,) = (event for event in events if event["kind"] == "plan")
    done = [event["step"] for event in events if event["kind"] == "step"]
    assert done == list(range(1, asked[-1] + 1))
    assert plan["steps"] == asked[-1]
    assert {event["steps"] for event in events if event["kind"] == "step"} == {asked[-1]}
    assert plan["prediction"]["seconds"] > 0
