"""What is chosen of a row on a card: the same tokens as of the same row on the host, for one small copy each.

Covers engine/gpu/choose.py.
"""

from __future__ import annotations

import fake_card
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmchat.core.errors import Damaged
from glmchat.core.messages import Sampling
from glmchat.engine.gpu.choose import TOP
from glmchat.engine.sampling import Sampler, make_sampler

VOCAB = 500


def rows(seed: int, count: int = 12, vocab: int = VOCAB, width: float = 4.0) -> torch.Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * width


def on_card(row: torch.Tensor, token: int | None) -> torch.Tensor:
    """As the decode loop has it: the row, and what the network read last."""
    there = row.to(fake_card.DEVICE)
    if token is not None:
        there.ids = torch.tensor([token]).to(fake_card.DEVICE)  # type: ignore[attr-defined]
    return there


def answer(sample: Sampler, logits: torch.Tensor, *, there: bool) -> list[int]:
    said: list[int] = []
    for row in logits:
        said.append(sample(on_card(row, said[-1] if said else None) if there else row))
    return said


@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.0, 0.3, 0.95, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 63, 64, 200]),
    top_p=st.sampled_from([0.05, 0.7, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
    penalty=st.sampled_from([1.0, 1.3, 0.9]),
    banned=st.sampled_from([(), (7,), (3, 499)]),
)
@settings(max_examples=80, deadline=None)
def test_a_seed_gives_the_tokens_that_it_gives_on_the_host(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, banned: tuple[int, ...]
) -> None:
    sampling = Sampling(temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    logits, context = rows(seed), [1, 2, 3, 250]
    logits[:, list(banned)] += 20
    here = answer(make_sampler(sampling, seed, context, banned), logits, there=False)
    assert answer(make_sampler(sampling, seed, context, banned), logits, there=True) == here
    assert not set(here) & set(banned)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.0),
        Sampling(0.95, top_p=0.7),
        Sampling(0.8, top_k=40, top_p=0.9, repetition_penalty=1.1),
        Sampling(1.0, top_p=1.0, min_p=0.2),
    ],
    ids=["greedy", "top-p", "top-k with a penalty", "min-p"],
)
def test_a_choice_copies_the_candidates_and_nothing_else(sampling: Sampling) -> None:
    sample = make_sampler(sampling, 5, [1, 2, 3], (4,))
    prepared = [on_card(row, 9) for row in rows(3)]
    sample(prepared[0])  # the marks of the context go up with the first
    for row in prepared[1:]:
        with fake_card.record() as log:
            sample(row)
        assert log == [("to host", 1 + 2 * TOP)]


def test_the_whole_row_comes_where_the_candidates_do_not_decide() -> None:
    flat = rows(1, width=0.01)[0]
    there = on_card(flat, None)
    for sampling in (Sampling(1.0, top_p=0.9), Sampling(1.0, top_p=1.0), Sampling(1.0, top_k=100, top_p=1.0)):
        with fake_card.record() as log:
            chosen = make_sampler(sampling, 2)(there)
        assert log == [("to host", 1 + 2 * TOP), ("to host", VOCAB)]
        assert chosen == make_sampler(sampling, 2)(flat)


def test_equals_of_the_last_that_top_k_keeps_stay_in_the_draw() -> None:
    row = torch.zeros(VOCAB)
    row[10:14] = 5.0
    few = {make_sampler(Sampling(1.0, top_k=2, top_p=1.0), seed)(on_card(row, None)) for seed in range(60)}
    assert few == {10, 11, 12, 13}
    many = {make_sampler(Sampling(1.0, top_k=5, top_p=1.0), seed)(on_card(row, None)) for seed in range(60)}
    assert many & {10, 11, 12, 13} and many - {10, 11, 12, 13}  # all of the row are equals of the fifth


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_that_is_no_numbers_is_refused(temperature: float, wrong: float) -> None:
    row = rows(1)[0]
    row[77] = wrong
    with pytest.raises(Damaged, match="not numbers"):
        make_sampler(Sampling(temperature), 1)(on_card(row, None))


def test_a_penalty_knows_what_was_said_though_nobody_tells_what_the_network_read() -> None:
    sampling = Sampling(0.01, repetition_penalty=10.0)
    logits = (rows(4, count=1).abs() + 1).expand(6, -1)
    sample = make_sampler(sampling, 1)
    said = [sample(on_card(row, None)) for row in logits]
    assert said == answer(make_sampler(sampling, 1), logits, there=False)
    assert len(set(said)) == 6
