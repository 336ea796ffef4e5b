"""The sampler: filters as they are defined, seeds that hold, and numbers that are no numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmchat.core.errors import Damaged
from glmchat.core.messages import Sampling
from glmchat.engine.sampling import filter_logits, make_sampler, penalise


def kept(logits: torch.Tensor, sampling: Sampling) -> set[int]:
    return set(torch.isfinite(filter_logits(logits, sampling)).nonzero()[:, 0].tolist())


def defined(logits: torch.Tensor, sampling: Sampling) -> set[int]:
    """The filters, written down as slowly and plainly as they are defined."""
    scores = logits.double() / sampling.temperature
    order = scores.argsort(descending=True, stable=True).tolist()
    if sampling.top_k:
        order = order[: sampling.top_k]
    chances = torch.softmax(scores[order], 0).tolist()
    if sampling.top_p < 1:
        total, cut = 0.0, []
        for token, chance in zip(order, chances, strict=True):
            cut.append(token)
            total += chance
            if total >= sampling.top_p:
                break
        order = cut
    least = max(chances) * sampling.min_p
    return {token for token, chance in zip(order, chances, strict=False) if chance >= least}


@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([3, 50, 700, 5000]),
    width=st.sampled_from([0.5, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 600]),
    top_p=st.sampled_from([0.05, 0.7, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=150, deadline=None)
def test_filters_keep_what_their_definition_keeps(
    seed: int, size: int, width: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * width
    sampling = Sampling(temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)
    wrong = kept(logits, sampling) ^ defined(logits, sampling)
    assert len(wrong) <= 1  # a sum that meets top_p to the last bit may fall either way


def test_filters_keep_as_many_as_the_original_models_did(shared: Path) -> None:
    from safetensors.torch import load_file

    folder = shared / "reference" / "chatglm" / "sampling"
    recorded, tensors = json.loads((folder / "sampling.json").read_text()), load_file(folder / "sampling.safetensors")
    logits = next(t for name, t in tensors.items() if name.endswith("logits"))
    for name in ("v1_chat", "v2_v3_chat", "greedyish"):
        case = recorded[name]
        for row, count, without in zip(logits, case["kept_per_row"], case["kept_per_row_without_top_k"], strict=True):
            asked = {"temperature": case["temperature"], "top_p": case["top_p"]}
            # transformers keeps every token that ties with the last of top-k; rows that are flat have hundreds of them.
            if count <= case["top_k"]:
                assert len(kept(row, Sampling(**asked, top_k=case["top_k"]))) == count
            assert len(kept(row, Sampling(**asked))) == without


def test_temperature_zero_is_argmax_and_nothing_else_is_looked_at() -> None:
    logits = torch.tensor([0.1, 3.0, 2.9])
    sample = make_sampler(Sampling(temperature=0, repetition_penalty=5.0, top_k=1, min_p=1.0), 1, [1, 1, 1])
    assert [sample(logits) for _ in range(3)] == [1, 1, 1]


def test_a_seed_draws_the_same_ids_whatever_else_draws() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    wild = Sampling(temperature=2.0, top_p=1.0)
    first = make_sampler(wild, 42)
    one = [first(logits) for _ in range(50)]
    second = make_sampler(wild, 42)
    two = []
    for _ in range(50):
        torch.rand(3)
        two.append(second(logits))
    other = make_sampler(wild, 43)
    assert one == two
    assert one != [other(logits) for _ in range(50)]


def test_what_is_drawn_follows_the_probabilities() -> None:
    chances = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for sampling in (Sampling(temperature=1.0, top_p=1.0), Sampling(temperature=1.0, top_p=1.0, top_k=3)):
        sample = make_sampler(sampling, 7)
        counts = torch.bincount(torch.tensor([sample(chances.log()) for _ in range(4000)]), minlength=4) / 4000
        wanted = chances if not sampling.top_k else torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95
        assert (counts - wanted).abs().max() < 0.03


def test_the_penalty_looks_at_the_context_and_at_what_was_said() -> None:
    assert penalise(torch.tensor([2.0, -2.0, 2.0]), [0, 1], 2.0).tolist() == [1.0, -4.0, 2.0]
    sample = make_sampler(Sampling(temperature=0.01, repetition_penalty=10.0), 1, [0])
    logits = torch.tensor([5.0, 4.0, 3.0, 2.0])
    assert [sample(logits) for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_no_numbers_are_refused_in_words(bad: float, temperature: float) -> None:
    logits = torch.tensor([1.0, bad, 2.0])
    with pytest.raises(Damaged) as caught:
        make_sampler(Sampling(temperature=temperature), 1)(logits)
    assert caught.value.exit == 3


def test_banned_tokens_at_minus_infinity_are_never_drawn() -> None:
    logits = torch.full((500,), -math.inf)
    logits[[3, 400]] = 1.0
    sample = make_sampler(Sampling(temperature=1.0, top_p=0.99), 5)
    assert {sample(logits) for _ in range(60)} == {3, 400}
