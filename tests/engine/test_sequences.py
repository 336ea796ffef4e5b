"""Answers that are written at once, token by token in turns: the same as alone, whoever comes, goes or stops meanwhile.

Covers engine/decoding/sequences.py.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from glmchat.engine import Chunk, Engine, Sampling
from glmchat.engine.decoding import sequences
from glmchat.engine.decoding.passes import Pass
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.native.step import CompiledStep

Steps = Generator[Chunk | None, None, None]


def engine_in(
    folder: Path, builders: ModuleType, quant: int | None = 4, most: int = 4, cache_type: str | None = None
) -> Engine:
    model = builders.write_folder(folder, max_position_embeddings=512)
    engine = Engine.load(model, quant=quant, threads=1, cache_type=cache_type)
    engine.sequences.most = most
    return engine


def prompt(number: int, length: int) -> list[int]:
    """Prompts of different numbers have no beginning in common."""
    return [number + 4, *((7 * i + 13 * number) % 250 + 4 for i in range(length - 1))]


def sampled(number: int, tokens: int) -> Sampling:
    return Sampling(temperature=1.0, seed=number, max_tokens=tokens, ignore_eos=True)


def ids_of(chunks: Sequence[Chunk | None]) -> list[int]:
    return [token for chunk in chunks if chunk is not None for token in chunk.token_ids]


def one_pass(row: list[Any]) -> Pass:
    return Pass(row[0], row[1], row[2], tuple(row[3] if len(row) > 3 else ()))


def alone(engine: Engine, ids: Sequence[int], sampling: Sampling) -> list[int]:
    engine.sequences = sequences.Sequences(engine.model, engine.context, engine.device)
    return ids_of(list(engine.stream_ids(ids, sampling)))


@pytest.mark.parametrize(("quant", "cache_type"), [(None, None), (4, None), (4, "int8"), (None, "bfloat16")])
@pytest.mark.parametrize("seed", range(4))
def test_an_answer_is_the_same_alone_and_in_company(
    seed: int, quant: int | None, cache_type: str | None, tmp_path: Path, builders: ModuleType
) -> None:
    engine, chance = engine_in(tmp_path, builders, quant, most=6, cache_type=cache_type), random.Random(seed)
    asked = [(prompt(n, chance.randint(1, 60)), sampled(n, chance.randint(1, 40))) for n in range(14)]
    wanted = [alone(engine, ids, sampling) for ids, sampling in asked]
    engine.sequences = sequences.Sequences(engine.model, engine.context, engine.device, most=6)
    waiting = list(range(14))
    said: dict[int, list[Chunk | None]] = {number: [] for number in waiting}
    writing: dict[int, Steps] = {}
    left: set[int] = set()
    while waiting or writing:
        while waiting and len(writing) < 6 and chance.random() < 0.6:
            number = waiting.pop(chance.randrange(len(waiting)))
            writing[number] = engine.stream_tokens(*asked[number])
        engine.step()
        for number, steps in list(writing.items()):
            if len(writing) > 1 and chance.random() < 0.01:
                steps.close()  # its reader has gone
                left.add(number)
                del writing[number]
                continue
            try:
                said[number].append(next(steps))
            except StopIteration:
                del writing[number]
    for number, ids in enumerate(wanted):
        got = ids_of(said[number])
        assert got == (ids[: len(got)] if number in left else ids)


def test_one_step_computes_a_token_of_all_of_them(tmp_path: Path, builders: ModuleType) -> None:
    engine = engine_in(tmp_path, builders)
    three = [engine.stream_tokens(prompt(n, 5), sampled(n, 8)) for n in range(3)]
    for steps in three:
        next(steps)
    forwards: list[str] = []
    engine.model.register_forward_hook(lambda *_: forwards.append("torch"))
    single = CompiledStep.__call__

    def noted(step: CompiledStep, token: int, cache: KVCache, *positions: int) -> torch.Tensor:
        forwards.append("one row")
        return single(step, token, cache, *positions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledStep, "__call__", noted)
        for _ in range(5):
            engine.step()
            for steps in three:
                next(steps)
    assert not forwards
    assert all(slot.length == 5 + 5 for slot in engine.sequences.slots)


@pytest.mark.parametrize("cache_type", [None, "int8"])
def test_a_beginning_that_another_has_read_is_copied(
    cache_type: str | None, tmp_path: Path, builders: ModuleType
) -> None:
    engine = engine_in(tmp_path, builders, cache_type=cache_type)
    system = prompt(1, 50)
    first, second = [*system, 9, 8, 7], [*system, 5, 6]
    wanted = alone(engine, second, sampled(2, 10))
    engine.sequences = sequences.Sequences(engine.model, engine.context, engine.device, most=2)
    running = engine.stream_tokens(first, sampled(1, 30))
    next(running)
    chunks = list(engine.stream_tokens(second, sampled(2, 10)))
    assert ids_of(chunks) == wanted
    assert chunks[-1] is not None and chunks[-1].facts["cached_n"] == 50
    rest = [*running]
    assert len(ids_of(rest)) >= 28


def test_a_prompt_that_several_read_at_once_is_read_once(tmp_path: Path, builders: ModuleType) -> None:
    engine = engine_in(tmp_path, builders, most=5)
    writing = engine.stream_tokens(prompt(1, 5), sampled(1, 200))
    next(writing)
    rows: list[int] = []
    engine.model.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    system = prompt(2, 400)
    ids = [[*system, n + 4, 9] for n in range(4)]
    reading = {
        n: engine.stream_tokens(ids[n], Sampling(temperature=0, max_tokens=3, ignore_eos=True)) for n in range(4)
    }
    said: dict[int, list[Chunk]] = {n: [] for n in range(4)}
    while reading:
        for number, steps in list(reading.items()):
            try:
                said[number] += [chunk for chunk in (next(steps),) if chunk is not None]
            except StopIteration:
                del reading[number]
    told = [said[n][-1].facts for n in range(4)]
    prefilled = [count for count in rows if count > 1]
    assert 402 <= sum(prefilled) < 402 + 3 * (sequences.WORTH + sequences.SHARED_CHUNK)
    assert sum(facts["prompt_n"] - facts["cached_n"] for facts in told) == sum(prefilled)
    for n, facts in enumerate(told):
        logits = engine.rebuild(ids[n], [one_pass(row) for row in facts["passes"]])
        assert int(logits.argmax()) == ids_of(said[n])[0], "a replay repeats the passes that were told"


def test_what_was_copied_is_what_is_read(tmp_path: Path, builders: ModuleType) -> None:
    engine = engine_in(tmp_path, builders, quant=None, most=3)
    ids = prompt(2, 300)
    wanted = [alone(engine, ids, sampled(n, 12)) for n in range(3)]
    engine.sequences = sequences.Sequences(engine.model, engine.context, engine.device, most=3)
    writing = {n: engine.stream_tokens(ids, sampled(n, 12)) for n in range(3)}
    said: dict[int, list[Chunk | None]] = {n: [] for n in writing}
    while writing:
        engine.step()
        for number, steps in list(writing.items()):
            try:
                said[number].append(next(steps))
            except StopIteration:
                del writing[number]
    assert [ids_of(said[n]) for n in range(3)] == wanted


def test_a_beginning_is_copied_into_a_cache_that_must_grow_for_it(tmp_path: Path, builders: ModuleType) -> None:
    engine = engine_in(tmp_path, builders)
    allocate = sequences.Sequences.allocate

    def short(self: sequences.Sequences) -> KVCache:
        """As on a card, where a cache begins with some positions of its context."""
        cache = allocate(self)
        cache.keys, cache.values = ([one[:, :16].clone() for one in some] for some in (cache.keys, cache.values))
        cache.capacity = 16
        return cache

    ids = prompt(1, 100)
    wanted = alone(engine, ids, sampled(1, 5))
    engine.sequences = sequences.Sequences(engine.model, engine.context, engine.device, most=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences.Sequences, "allocate", short)
        running = engine.stream_tokens(ids, sampled(2, 30))
        next(running)
        chunks = list(engine.stream_tokens(ids, sampled(1, 5)))
    assert ids_of(chunks) == wanted
    assert chunks[-1] is not None and chunks[-1].facts["cached_n"] == 99


def test_another_conversation_keeps_its_cache_while_there_is_room(tmp_path: Path, builders: ModuleType) -> None:
    engine = engine_in(tmp_path, builders, most=2)
    one, two, three = (prompt(n, 40) for n in range(3))
    for ids in (one, two):
        list(engine.stream_ids(ids, sampled(0, 2)))
    assert list(engine.stream_ids([*one, 5, 6], sampled(0, 2)))[-1].facts["cached_n"] >= 40
    assert list(engine.stream_ids([*two, 5, 6], sampled(0, 2)))[-1].facts["cached_n"] >= 40
    list(engine.stream_ids(three, sampled(0, 2)))  # takes the place of the one that was used least recently
    assert list(engine.stream_ids([*two, 5, 6], sampled(0, 2)))[-1].facts["cached_n"] >= 40
    assert len(engine.sequences.slots) == 2


def test_a_long_prompt_lets_the_others_write_meanwhile(tmp_path: Path, builders: ModuleType) -> None:
    engine = engine_in(tmp_path, builders)
    writing = engine.stream_tokens(prompt(1, 5), sampled(1, 200))
    next(writing)
    reading = engine.stream_tokens(prompt(2, 400), sampled(2, 5))
    rounds = 0
    while next(reading) is None:
        engine.step()
        next(writing)
        rounds += 1
    assert rounds >= 400 // sequences.SHARED_CHUNK - 1
