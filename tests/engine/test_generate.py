"""The decode loop: cached equals uncached, reuse equals fresh, and a stop anywhere leaves the engine as it was.

Covers engine/generate.py and engine/decoding/answer.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from glmchat.core.errors import Damaged, DoesNotFit, Usage
from glmchat.engine import Engine, Sampling
from glmchat.engine.decoding import sequences

GREEDY = Sampling(temperature=0, max_tokens=16, ignore_eos=True)
PROMPT = [5, 9, 40, 41, 42, 8, 77, 100, 3, 60, 61, 62, 13]


def load(kind: str, where: Path, builders: ModuleType) -> Engine:
    if kind == "folder":
        return Engine.load(builders.write_folder(where), dtype="float32", threads=1)
    return Engine.load(builders.write_gguf(where / "tiny.gguf", kind), dtype="float32", threads=1)


@pytest.fixture(scope="module", params=["folder", "Q4_0", "Q8_0"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, builders: ModuleType) -> Engine:
    return load(request.param, tmp_path_factory.mktemp("tiny"), builders)


@pytest.fixture(scope="module")
def by_transformers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    folder = tmp_path_factory.mktemp("neox")
    torch.manual_seed(1)
    config = GPTNeoXConfig(
        vocab_size=272, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    yield Engine.load(folder, dtype="float32", threads=1)


@pytest.fixture(scope="module", params=["folder", "Q4_0", "Q8_0", "transformers"])
def any_engine(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    builders: ModuleType,
    by_transformers: Engine,
) -> Engine:
    """Models of our own, and one that goes through transformers."""
    if request.param == "transformers":
        return by_transformers
    return load(request.param, tmp_path_factory.mktemp("tiny"), builders)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill in steps of 4, so that a short prompt has several."""
    monkeypatch.setattr(sequences, "CHUNK", 4)


def fresh(engine: Engine, ids: list[int], sampling: Sampling = GREEDY) -> list[int]:
    engine.sequence.forget()
    return list(engine.generate(ids, sampling))


def test_cached_decoding_equals_an_uncached_pass_at_every_split(any_engine: Engine) -> None:
    ids = PROMPT + fresh(any_engine, PROMPT)
    whole = any_engine.logits(ids)
    for split in range(1, len(ids)):
        any_engine.sequence.forget()
        rows = [any_engine.sequence.prefill(ids[:split])]
        rows += [any_engine.sequence.advance(token) for token in ids[split:]]
        assert torch.allclose(torch.stack(rows), whole[split - 1 :], atol=1e-4)


def test_a_reused_prefix_gives_what_a_fresh_prompt_gives(any_engine: Engine) -> None:
    wanted = {length: fresh(any_engine, [*PROMPT[:length], 90, 91]) for length in range(1, len(PROMPT))}
    any_engine.sequence.forget()
    for length, answer in [*wanted.items(), *reversed(wanted.items())]:
        assert list(any_engine.generate([*PROMPT[:length], 90, 91], GREEDY)) == answer
        assert list(any_engine.generate([*PROMPT[:length], 90, 91], GREEDY)) == answer  # all of it is there already


def test_a_stop_between_any_two_layers_leaves_the_next_answer_as_a_fresh_one(any_engine: Engine) -> None:
    wanted = fresh(any_engine, PROMPT)
    other = fresh(any_engine, PROMPT[:6])
    for asked in range(1, 14):
        any_engine.sequence.forget()
        list(any_engine.generate(PROMPT[:3], GREEDY))
        left = asked

        def cancelled() -> bool:
            nonlocal left
            left -= 1
            return left <= 0

        stopped = list(any_engine.generate(PROMPT, GREEDY, cancelled=cancelled))
        assert stopped == wanted[: len(stopped)]
        assert len(stopped) < len(wanted)
        assert list(any_engine.generate(PROMPT, GREEDY)) == wanted
        assert list(any_engine.generate(PROMPT[:6], GREEDY)) == other


@pytest.mark.parametrize("said", [0, 1, 5])
def test_closing_the_generator_leaves_the_next_answer_as_a_fresh_one(engine: Engine, said: int) -> None:
    wanted = fresh(engine, PROMPT)
    steps = engine.generate(PROMPT, GREEDY)
    assert [next(steps) for _ in range(said)] == wanted[:said]
    steps.close()
    assert list(engine.generate(PROMPT, GREEDY)) == wanted


def test_a_cancelled_stream_says_so_and_keeps_what_was_said(engine: Engine) -> None:
    talk = [{"role": "user", "content": "the he the"}]
    wanted = list(engine.stream(talk, GREEDY))
    left = 12

    def cancelled() -> bool:
        nonlocal left
        left -= 1
        return left <= 0

    chunks = list(engine.stream(talk, GREEDY, cancelled=cancelled))
    assert chunks[-1].finish_reason == "cancelled"
    ids = [token for chunk in chunks for token in chunk.token_ids]
    assert ids == [token for chunk in wanted for token in chunk.token_ids][: len(ids)]
    assert [c.text for c in engine.stream(talk, GREEDY)] == [c.text for c in wanted]


def test_prefill_tells_how_far_it_is(engine: Engine) -> None:
    engine.sequence.forget()
    told: list[tuple[int, int]] = []
    list(engine.stream_ids(PROMPT, GREEDY, on_prefill=lambda done, total: told.append((done, total))))
    assert told == sorted(told)
    assert told[-1] == (len(PROMPT), len(PROMPT))
    assert len(told) > 4


def test_a_prompt_longer_than_the_context_is_refused(engine: Engine) -> None:
    with pytest.raises(DoesNotFit) as caught:
        list(engine.generate([5] * 256, GREEDY))
    assert caught.value.exit == 4
    assert "256" in caught.value.message
    assert list(engine.generate(PROMPT, GREEDY)) == fresh(engine, PROMPT)


def test_an_answer_ends_where_the_context_does(engine: Engine) -> None:
    ids = (PROMPT * 20)[:250]
    last = list(engine.stream_ids(ids, Sampling(temperature=0, ignore_eos=True)))[-1]
    assert (last.finish_reason, last.facts["stopped_by"], last.facts["predicted_n"]) == ("length", "context", 6)


def test_ids_that_the_model_does_not_know_are_refused(engine: Engine) -> None:
    for ids in ([], [-1], [272]):
        with pytest.raises(Usage):
            list(engine.generate(ids, GREEDY))


def test_a_seed_gives_the_same_answer_again(engine: Engine) -> None:
    wild = Sampling(temperature=1.5, top_p=1.0, seed=11, max_tokens=20, ignore_eos=True)
    assert list(engine.generate(PROMPT, wild)) == fresh(engine, PROMPT, wild)
    last = list(engine.stream_ids(PROMPT, Sampling(temperature=1.5, max_tokens=3)))[-1]
    assert isinstance(last.facts["seed"], int)


def test_an_answer_is_continued_where_it_was_cut_off(engine: Engine) -> None:
    talk = [{"role": "user", "content": "he"}, {"role": "assistant", "content": "the t"}]
    chunks = list(engine.stream(talk, GREEDY, continue_final=True))
    ids = engine.render(talk[:1]) + engine.tokenizer.encode("the t")
    assert [t for c in chunks for t in c.token_ids] == list(engine.generate(ids, GREEDY))


def test_weights_that_are_no_numbers_are_an_error_in_words(tmp_path: Path, builders: ModuleType) -> None:
    broken = Engine.load(builders.write_folder(tmp_path), dtype="float32", threads=1)
    broken.model.model.norm.weight.data.fill_(float("nan"))  # type: ignore[union-attr,operator]
    for sampling in (GREEDY, Sampling()):
        with pytest.raises(Damaged, match="not numbers"):
            list(broken.generate(PROMPT, sampling))


def test_quantising_in_memory_keeps_the_answer_close(tmp_path: Path, builders: ModuleType) -> None:
    folder = builders.write_folder(tmp_path)
    full = Engine.load(folder, dtype="float32", threads=1).logits(PROMPT)
    for bits, error in ((8, 0.05), (4, 0.5)):
        found = Engine.load(folder, quant=bits, dtype="float32", threads=1).logits(PROMPT)
        assert (found - full).abs().mean() < error * full.abs().mean()


def test_a_quantised_model_through_transformers_computes_in_the_type_it_was_settled_on(by_transformers: Engine) -> None:
    engine = Engine.load(by_transformers.checkpoint.path, quant=8, dtype="bfloat16", threads=1)
    for dtype in (torch.bfloat16, torch.float32):
        engine.use_dtype(dtype)
        cache: Any = engine.model.new_cache(16)
        engine.model(torch.tensor(PROMPT), cache)
        assert {layer.keys.dtype for layer in cache.inner.layers} == {dtype}
