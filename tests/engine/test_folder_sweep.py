"""Folders drawn at random are what transformers makes of them, or are refused: ids, logits, answers, ends, two turns.

Covers engine/engine.py, engine/loading.py, checkpoints/fit.py, checkpoints/families.py. Of benchmarks: folder_sweep.py,
which runs 2,000 of these draws; `--seed` runs one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from folder_checks import Reference, check, quiet
from folder_draws import FAMILIES, QUANTS, SHARDS, draw

SEEDS = range(60)
RESULTS: list[str] = []


@pytest.fixture(autouse=True, scope="module")
def quietly() -> Iterator[None]:
    with quiet():
        yield


@pytest.mark.parametrize("seed", SEEDS)
def test_a_drawn_folder_is_what_transformers_makes_of_it_or_is_refused(seed: int, tmp_path: Path) -> None:
    outcome = check(seed, tmp_path / "model")
    print(outcome)
    RESULTS.append(outcome.result)
    assert outcome.result in ("equal", "refused"), str(outcome)


def test_most_of_the_draws_run() -> None:
    if len(RESULTS) < len(SEEDS):
        pytest.skip("not all of the draws above were run")
    assert RESULTS.count("equal") > 0.7 * len(SEEDS)


def test_a_difference_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = next(seed for seed in SEEDS if draw(seed).quant == "none" and draw(seed).index == "right")
    right = Reference.logits
    monkeypatch.setattr(Reference, "logits", lambda self, ids: 1.01 * right(self, ids))
    outcome = check(seed, tmp_path / "model")
    assert outcome.result == "differs" and "logits are 9.9e-03 off" in outcome.reason and f"seed {seed}" in str(outcome)


def test_the_draws_come_to_every_kind_of_thing() -> None:
    drawn = [draw(seed) for seed in range(2000)]
    assert {one.family for one in drawn} == set(FAMILIES)
    assert {one.shards for one in drawn} == set(SHARDS)
    assert {one.quant for one in drawn} == {"none", *QUANTS}
