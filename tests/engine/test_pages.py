"""Caches that hold one beginning in the same pages: each says what it would have said with pages of its own.

Covers engine/native/pages.py.
"""

from __future__ import annotations

import gc
import os
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch

from glmchat.engine import Engine, Sampling
from glmchat.engine.decoding.sequences import Sequences, Slot
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.native import pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are shared on Linux alone")
LAYERS, HEADS, WIDTH = 2, 3, 20  # rows of 80, 40 and 24 bytes: no page ends with a row
TYPES = [torch.float32, torch.bfloat16, torch.int8]


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little is shared too."""
    monkeypatch.setattr(pages, "LEAST_BYTES", 1)


def new_cache(dtype: torch.dtype, limit: int = 2000) -> KVCache:
    return KVCache(LAYERS, HEADS, WIDTH, limit, dtype)


def add(cache: KVCache, count: int, noise: torch.Generator) -> None:
    for layer in range(LAYERS):
        cache.append(layer, *(torch.randn(HEADS, count, WIDTH, generator=noise) for _ in range(2)))
    cache.advance(count)


def filled(cache: KVCache) -> list[torch.Tensor]:
    return [rows[:, : cache.length].clone() for rows in (*cache.keys, *cache.values)]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("seed", range(6))
def test_whoever_joins_writes_is_cut_or_leaves_no_other_changes(seed: int, dtype: torch.dtype) -> None:
    chance, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    caches = [new_cache(dtype) for _ in range(5)]
    right = [filled(cache) for cache in caches]
    shared = written_below = 0
    for _ in range(300):
        at = chance.randrange(5)
        cache = caches[at]
        match chance.choice(("add", "add", "add", "add", "cut", "cut", "share", "share", "share", "leave")):
            case "add" if cache.length < 1600:
                written_below += (
                    cache.shared < cache.length and cache.book is not None and cache.book.end > cache.length
                )
                add(cache, chance.randint(1, 400), noise)
                right[at] = [
                    torch.cat((old, new[:, old.shape[1] :]), 1)
                    for old, new in zip(right[at], filled(cache), strict=True)
                ]
            case "cut":
                cache.truncate(chance.randint(cache.length // 2, max(cache.length, 1)))
                right[at] = [rows[:, : cache.length] for rows in right[at]]
            case "share":
                other = chance.choice((chance.randrange(5), max(range(5), key=lambda n: caches[n].length)))
                end = chance.randint(caches[other].length // 2, caches[other].length)
                cache.truncate(0)
                right[at] = [rows[:, :0] for rows in right[at]]
                if pages.share(cache, caches[other], end):
                    shared += 1
                    cache.length = end
                    right[at] = [rows[:, :end] for rows in right[other]]
            case "leave":
                caches[at] = new_cache(dtype)
                right[at] = filled(caches[at])
        for one, wanted in zip(caches, right, strict=True):
            assert equal(filled(one), wanted)
    assert shared > 10 and written_below > 0


@pytest.mark.parametrize("dtype", TYPES)
def test_eight_that_hold_one_beginning_take_the_memory_of_one(dtype: torch.dtype) -> None:
    noise, process = torch.Generator().manual_seed(1), psutil.Process()
    first = KVCache(4, 4, 64, 4000, dtype)
    for layer in range(4):
        first.append(layer, *(torch.randn(4, 3000, 64, generator=noise) for _ in range(2)))
    first.advance(3000)
    one, before = first.nbytes * 3000 // 4000, process.memory_full_info().pss
    others = [KVCache(4, 4, 64, 4000, dtype) for _ in range(7)]
    for other in others:
        assert pages.share(other, first, 2990)
        other.length = 2990
    first.length = 2990
    assert all(equal(filled(other), filled(first)) for other in others)  # whose every page has been read now
    assert len({other.book.file for other in others}) == 1
    assert process.memory_full_info().pss - before < 3 * one
    assert os.fstat(first.book.file).st_blocks * 512 < 1.1 * one


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("glmchat-kv")


@pytest.mark.usefixtures("little")
def test_its_file_is_gone_with_the_last_who_holds_it() -> None:
    gc.collect()
    opened, maps, noise = len(os.listdir("/proc/self/fd")), mapped(), torch.Generator().manual_seed(1)
    first, second, third = (new_cache(torch.float32) for _ in range(3))
    add(first, 500, noise)
    wanted = filled(first)
    assert pages.share(second, first, 500) and pages.share(third, second, 480)
    assert third.book is first.book
    second.length, third.length = 500, 480
    del first
    assert equal(filled(second), wanted) and equal(filled(third), [rows[:, :480] for rows in wanted])
    del second, third
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == opened
    assert mapped() == maps


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("fault", ["no file", "no mapping", "another shape", "itself"])
def test_where_pages_cannot_be_shared_rows_are_copied(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = new_cache(torch.float32), new_cache(torch.float32, 2000 + (fault == "another shape"))
    add(first, 500, torch.Generator().manual_seed(1))
    wanted = filled(first)

    def refuse(*_: Any) -> int:
        raise OSError(24, "too many open files")

    if fault == "no file":
        monkeypatch.setattr(os, "memfd_create", refuse)
    elif fault == "no mapping":
        monkeypatch.setattr(pages, "_map", lambda *_: False)
    assert pages.share(first if fault == "itself" else second, first, 500) == (fault == "no mapping")
    if fault == "no mapping":
        second.length = 500
        assert equal(filled(second), wanted)
    assert equal(filled(first), wanted)


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("cache_type", [None, "int8"])
@pytest.mark.parametrize("seed", range(3))
def test_answers_that_share_a_beginning_say_what_they_say_with_copies(
    seed: int, cache_type: str | None, tmp_path: Path, builders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = builders.write_folder(tmp_path, max_position_embeddings=1024)
    engine = Engine.load(folder, quant=4, threads=1, cache_type=cache_type, parallel=5)
    shared: list[bool] = []

    def noted(*given: Any) -> bool:
        shared.append(pages.share(*given))
        return shared[-1]

    said = []
    for share in (noted, lambda *_: False):
        monkeypatch.setattr(sys.modules[Slot.__module__], "share", share)
        said.append(company(engine, random.Random(seed)))
    assert sum(shared) > 3
    assert said[0] == said[1]
    assert {len(ids) for ids in said[0]} >= {20}


def company(engine: Engine, chance: random.Random) -> list[list[int]]:
    """Answers to twelve prompts, five at once, which have the one or other part of a beginning in common; some stop."""
    beginning, prompts = [(11 * i) % 250 + 4 for i in range(450)], []
    for number in range(12):
        own = [(7 * i + 13 * number) % 250 + 4 for i in range(chance.randint(1, 40))]
        prompts.append([*beginning[: chance.randint(300, 450)], *own])
    engine.sequences = Sequences(engine.model, engine.context, engine.device, most=5)
    waiting = list(range(12))
    said: list[list[int]] = [[] for _ in waiting]
    writing: dict[int, Any] = {}
    while waiting or writing:
        while waiting and len(writing) < 5 and chance.random() < 0.6:
            number = waiting.pop(0)
            sampling = Sampling(temperature=1.0, seed=number, max_tokens=20, ignore_eos=True)
            writing[number] = engine.stream_tokens(prompts[number], sampling)
        engine.step()
        for number, steps in list(writing.items()):
            if chance.random() < 0.02:
                steps.close()
                del writing[number]
                continue
            try:
                if (chunk := next(steps)) is not None:
                    said[number] += chunk.token_ids
            except StopIteration:
                del writing[number]
    return said
