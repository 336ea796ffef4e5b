"""How many steps a run has: as many as were asked, each document once an epoch, whatever a step gathers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glmchat.core.errors import Usage
from glmchat.tuning.order import enough, fullness, steps_of
from glmchat.tuning.settings import EPOCHS, Settings

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=30)


@given(LENGTHS, st.integers(1, 90), st.integers(1, 500))
def test_steps_alone_go_through_as_many_epochs_as_they_take(lengths: list[int], steps: int, tokens: int) -> None:
    found = steps_of(lengths, Settings(steps=steps, tokens_per_step=tokens))
    assert [step.number for step in found] == list(range(1, steps + 1))
    for epoch in range(1, found[-1].epoch):
        assert Counter(n for step in found if step.epoch == epoch for n in step.documents) == Counter(
            range(len(lengths))
        )


@given(LENGTHS, st.integers(1, 5), st.integers(1, 90))
def test_with_both_whichever_ends_first_ends_the_run(lengths: list[int], epochs: int, steps: int) -> None:
    alone = steps_of(lengths, Settings(epochs=epochs, rows_per_step=2))
    both = steps_of(lengths, Settings(epochs=epochs, steps=steps, rows_per_step=2))
    assert both == alone[:steps]


def test_without_either_there_are_three_epochs_and_without_documents_no_step() -> None:
    assert steps_of([5, 5], Settings())[-1].epoch == EPOCHS
    assert steps_of([], Settings()) == steps_of([], Settings(steps=5)) == []


@example([5, 1], 7)  # a later epoch has fewer steps than the first
@given(LENGTHS, st.integers(1, 400))
def test_few_rows_still_make_many_steps_and_many_rows_the_steps_that_were_set(lengths: list[int], times: int) -> None:
    lengths = lengths * times
    settings = enough(lengths, Settings())
    steps = steps_of(lengths, settings)
    assert settings.tokens_per_step <= Settings().tokens_per_step
    assert len(steps) >= 3 * 20 or settings.epochs == 20
    assert max(sum(lengths[n] for n in step.documents) for step in steps) <= max(settings.tokens_per_step, *lengths)
    if sum(lengths) >= 20 * Settings().tokens_per_step:
        assert settings == Settings(epochs=3)


@given(LENGTHS, st.integers(1, 400), st.integers(1, 3))
def test_passes_are_as_full_as_their_tokens_say(lengths: list[int], most: int, epochs: int) -> None:
    steps = steps_of(lengths, Settings(epochs=epochs, row_tokens=most))
    passes = [each for step in steps for each in step.passes]
    beyond = epochs * sum(max(0, length - most) for length in lengths)
    whole = fullness(steps, lengths, most) * len(passes) * most
    assert whole == pytest.approx(epochs * sum(lengths) - beyond)
    assert fullness(steps_of([most] * 7, Settings(row_tokens=most)), [most] * 7, most) == 1.0


def test_what_was_asked_for_stays() -> None:
    assert enough([50] * 4, Settings(epochs=2)).epochs == 2
    assert enough([50] * 4, Settings(steps=7)).epochs == 0
    assert enough([50] * 4, Settings(rows_per_step=2)).tokens_per_step == Settings().tokens_per_step


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"steps": 10**9}, {"epochs": -1}, {"epochs": 10**9}])
def test_no_number_of_steps_takes_all_memory(wrong: dict[str, Any]) -> None:
    with pytest.raises(Usage):
        Settings(**wrong)
