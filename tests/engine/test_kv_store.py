"""Caches of conversations on the disk: the same bits as in memory, and never a wrong one, whatever happens to a file.

Covers engine/decoding/kv_store.py.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import adapter_builders as adapters
import pytest
import torch
from polling import wait_until
from safetensors import safe_open
from safetensors.torch import save_file

from glmchat.core import kv_files, locations
from glmchat.engine import Engine, Sampling
from glmchat.engine.decoding import kv_store
from glmchat.engine.decoding.passes import Pass
from glmchat.engine.native.self_test import coarse_fault

ENDED = object()
ONE, TWO = "1" * 32, "2" * 32
PLENTY = 10**9


@pytest.fixture
def model(tmp_path: Path, builders: ModuleType) -> Path:
    folder: Path = builders.write_folder(tmp_path / "model", max_position_embeddings=2048)
    return folder


LOADED: list[Engine] = []


@pytest.fixture(autouse=True)
def at_rest() -> Iterator[None]:
    """No engine of a test writes into the home of the next one."""
    yield
    while LOADED:
        LOADED.pop().close()


def load(folder: Path, limit: int = PLENTY, **options: Any) -> Engine:
    engine = Engine.load(folder, **{"threads": 1, "quant": 4, **options})
    engine.keep_caches(limit, idle_seconds=0.0)
    LOADED.append(engine)
    return engine


def prompt(number: int, length: int) -> list[int]:
    return [number + 4, *((7 * i + 13 * number) % 250 + 4 for i in range(length - 1))]


def ask(engine: Engine, ids: Sequence[int], conversation: str | None = ONE, tokens: int = 6, seed: int = 1) -> Any:
    """The ids of an answer, and its facts."""
    sampling = Sampling(temperature=1.0, seed=seed, max_tokens=tokens, ignore_eos=True)
    chunks = [c for c in engine.stream_tokens(ids, sampling, conversation=conversation) if c is not None]
    return [token for chunk in chunks for token in chunk.token_ids], chunks[-1].facts


def written(conversation: str = ONE, ids: int = 0) -> Path:
    """Waits for its file, which holds at least so many ids."""

    def there() -> bool:
        return any(f.conversation == conversation and held(f.path) >= ids for f in kv_files.kv_files())

    wait_until(there)
    return next(file.path for file in kv_files.kv_files() if file.conversation == conversation)


def held(path: Path) -> int:
    with safe_open(path, "pt") as file:
        return int(file.get_slice("ids").get_shape()[0])


def bits(engine: Engine, length: int | None = None) -> list[torch.Tensor]:
    """What its last cache holds, or the beginning of it, as whole numbers."""
    cache = engine.sequence.cache
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32}[cache.keys[0].element_size()]
    return [rows[:, : length or cache.length].clone().view(width) for rows in (*cache.keys, *cache.values)]


def same(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("quant", [None, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None, "int8"])
@pytest.mark.parametrize("seed", range(3))
def test_an_answer_after_a_cache_from_the_disk_has_the_bits_of_one_after_a_cache_in_memory(
    model: Path, quant: int | None, dtype: str | None, seed: int
) -> None:
    chance = random.Random(seed)
    options: dict[str, Any] = {"quant": quant, **({"cache_type": dtype} if dtype == "int8" else {"dtype": dtype})}
    first = load(model, **options)
    ids = prompt(seed, chance.randint(kv_store.LEAST, 900))
    ids += ask(first, ids, tokens=chance.randint(2, 40))[0]
    written(ids=len(ids) - 1)
    keep = chance.randint(len(ids) // 2, len(ids))
    question = [*ids[:keep], *prompt(seed + 50, chance.randint(1, 60))]
    right, facts = ask(first, question, conversation=None)  # which writes nothing
    again = load(model, **options)
    got, its = ask(again, question)
    assert got == right and its["cached_n"] == facts["cached_n"] == its["disk"]["ids"] > 0
    assert its["passes"] == facts["passes"]
    assert same(bits(first), bits(again))
    # And they are those of its passes, computed in another engine that keeps nothing.
    alone = Engine.load(model, threads=1, **options)
    passes = [Pass(*one[:3], *(tuple(rest) for rest in one[3:])) for one in its["passes"]]
    alone.rebuild(question, passes)
    assert same(bits(alone, len(question)), bits(again, len(question)))


def test_the_file_is_what_the_library_of_its_format_reads(model: Path) -> None:
    engine = load(model)
    ids = prompt(1, 600)
    answer, _ = ask(engine, ids)
    path = written()
    cache = engine.sequence.cache
    with safe_open(path, "pt") as file:
        assert file.get_tensor("ids").tolist() == [*ids, *answer][: cache.length]
        rows = torch.cat([file.get_tensor(str(start)) for start in range(0, cache.length, kv_store.BLOCK)], 3)
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        assert torch.equal(rows[layer, 0], keys[:, : cache.length])
        assert torch.equal(rows[layer, 1], values[:, : cache.length])
    assert path.stat().st_mode & 0o777 == 0o600
    assert locations.kv_dir().stat().st_mode & 0o777 == 0o700


def test_another_conversation_takes_a_common_beginning_and_has_a_file_of_its_own(model: Path) -> None:
    system = prompt(3, 300)
    ask(load(model), [*system, 9, 8, 7])
    written()
    engine = load(model)
    right, _ = ask(Engine.load(model, quant=4, threads=1), [*system, 5, 6], conversation=None)
    got, facts = ask(engine, [*system, 5, 6], TWO)
    assert got == right and facts["disk"]["ids"] == 300
    told = facts["ttft_ms"] - 1000 * facts["disk"]["seconds"]
    assert facts["prompt_ms"] == pytest.approx(told), "what a file brought was not read by the model"
    written(TWO)
    assert len(kv_files.kv_files()) == 2


def test_what_has_no_name_is_neither_written_nor_answered_from_the_disk(model: Path) -> None:
    first = load(model)
    ask(first, prompt(1, 200), conversation=None)
    first.close()  # would have written it
    assert not kv_files.kv_files()
    ask(load(model), prompt(1, 200))
    written()
    assert "disk" not in ask(load(model), prompt(1, 200), conversation=None)[1]


def test_a_private_prompt_in_the_place_of_a_conversation_is_not_written_with_it(model: Path) -> None:
    engine = load(model)
    ids, secret = prompt(1, 200), [77] * 40
    ask(engine, ids)
    written()
    ask(engine, [*ids, *secret], conversation=None)
    ask(engine, [*ids, *prompt(5, 60)])
    engine.close()
    with safe_open(written(), "pt") as file:
        kept = file.get_tensor("ids").tolist()
    assert len(kept) >= 260 and 77 not in kept[200:]


NO_BYTES = pytest.mark.skipif(coarse_fault() is not None, reason=f"no products of 8 bits here: {coarse_fault()}")


@pytest.mark.parametrize(
    "change",
    ["weights", "rope", "quant", "dtype", "threads", "scope", "cache_type", pytest.param("products", marks=NO_BYTES)],
)
def test_what_another_engine_computed_is_not_used(change: str, model: Path, builders: ModuleType) -> None:
    ask(load(model), prompt(1, 300))
    written()
    options: dict[str, Any] = {}
    if change == "weights":
        weights = model / "model.safetensors"
        before = weights.stat()
        save_file(builders.weights({**builders.CONFIG, "max_position_embeddings": 2048}, seed=8), weights)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert weights.stat().st_size == before.st_size
    elif change == "rope":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "rope_theta": 20000.0}))
    elif change != "scope":
        options = {
            change: {"quant": 8, "dtype": "bfloat16", "threads": 2, "cache_type": "int8", "products": "int8"}[change]
        }
    engine = load(model, **options)
    if change == "scope":
        engine.keep_caches(PLENTY, "serve", idle_seconds=0.0)
    assert "disk" not in ask(engine, prompt(1, 300))[1]


def test_a_cache_belongs_to_the_adapter_its_weight_and_its_content(model: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for number, folder in enumerate(folders):
        adapters.write_peft(model, folder, number)
    ids = prompt(1, 300)

    def asked(folder: Path, weight: float) -> bool:
        engine = load(model)
        engine.attach(folder, "poet", force=True)
        engine.activate({"poet": weight})
        brought = "disk" in ask(engine, ids)[1]
        engine.close()
        return brought

    assert not asked(folders[0], 1.0)
    assert asked(folders[0], 1.0)
    assert not asked(folders[0], 0.5)
    assert not asked(folders[1], 1.0)
    assert "disk" not in ask(load(model), ids)[1]


def damages(size: int) -> Iterator[tuple[str, Any]]:
    """What may become of the bytes of a file."""
    chance = random.Random(1)
    for at in [0, 3, 7, 8, 40, size - 1, size - 33, *(chance.randrange(size) for _ in range(24))]:
        yield f"bit {at}", lambda data, at=at: data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :]
    for length in (0, 5, 8, 100, size // 2, size - 1):
        yield f"cut to {length}", lambda data, length=length: data[:length]
    yield "longer", lambda data: data + bytes(32)
    yield "zeros", lambda data: bytes(len(data))
    yield "a header of exabytes", lambda data: b"\xff" * 8 + data[8:]


def test_a_damaged_file_costs_a_prompt_read_again_and_one_line(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = prompt(1, 700)
    right, _ = ask(load(model), ids)
    path = written()
    whole = path.read_bytes()
    engine = load(model)
    for what, damage in damages(len(whole)):
        engine.sequences.slots.clear()
        engine.sequences.current = engine.sequences._new()
        path.write_bytes(damage(whole))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            got, facts = ask(engine, ids)
        assert got == right and "disk" not in facts, what
        assert [r.levelname for r in caplog.records] == ["WARNING"] and str(path) in caplog.text, what
        wait_until(path.exists)  # it was taken away, and written anew behind the answer
        wait_until(lambda: path.stat().st_size == len(whole))


def test_only_what_the_question_needs_is_read(model: Path) -> None:
    ids = prompt(1, 1500)
    ask(load(model), ids)
    size = written().stat().st_size
    _, facts = ask(load(model), [*ids[:300], *prompt(9, 30)], TWO)
    assert facts["disk"]["ids"] == 300 and facts["disk"]["bytes"] < size / 2


def test_a_file_waits_for_the_answers_and_a_changed_cache_is_not_written(model: Path) -> None:
    engine = load(model)
    ids = prompt(1, 600)
    cache = engine.sequences.take(ids, ONE).cache  # an answer is being written
    store = engine.sequences.store
    assert store is not None
    contents = kv_store.Contents(tuple(ids), (Pass(0, 600, "prefill"),))
    cache.length = 600
    job = store.keep((), ONE, cache, contents)
    assert job is not None and not job.done
    cache.truncate(500)  # and goes on in the same cache
    engine.sequences.give_back(engine.sequences.current)
    wait_until(lambda: not store._jobs)
    assert not job.done and not kv_files.everything()


def test_whoever_takes_the_only_place_leaves_the_cache_before_to_be_written(model: Path) -> None:
    engine = load(model)
    engine.keep_caches(PLENTY, idle_seconds=600)  # nothing is written of itself
    ids = prompt(1, 300)
    ask(engine, ids)
    ask(engine, prompt(2, 300), TWO)
    written(ONE)
    assert not [file for file in kv_files.kv_files() if file.conversation == TWO]
    engine.leave()
    written(TWO)
    assert ask(load(model), [*ids, 5])[1]["disk"]["ids"] >= 300


def test_at_the_end_of_an_engine_everything_is_written_or_nothing(model: Path) -> None:
    engine = load(model)
    engine.keep_caches(PLENTY, idle_seconds=600)
    ask(engine, prompt(1, 300))
    engine.close()
    assert held(written()) >= 300 and len(kv_files.everything()) == 1


def test_the_least_recently_used_go_when_the_limit_is_reached(model: Path) -> None:
    engine = load(model)
    ask(engine, prompt(0, 200), "0" * 32)
    size = written("0" * 32).stat().st_size
    engine = load(model, limit=3 * size + size // 2)
    for number in (1, 2):
        ask(engine, prompt(number, 200), str(number) * 32)
        written(str(number) * 32)
    assert "disk" in ask(load(model), prompt(0, 200), "0" * 32)[1]  # which was used now
    ask(engine, prompt(3, 200), "3" * 32)
    written("3" * 32)
    assert {file.conversation[0] for file in kv_files.kv_files()} == set("023")
    small = load(model, limit=size // 2)
    ask(small, prompt(4, 200), "4" * 32)
    small.close()
    assert {file.conversation[0] for file in kv_files.kv_files()} == set("023")


def test_of_a_conversation_that_was_deleted_nothing_is_written_any_more(model: Path) -> None:
    engine = load(model)
    engine.keep_caches(PLENTY, idle_seconds=600)
    ids = prompt(1, 300)
    ask(engine, ids)
    kv_files.forget(ONE)
    engine.leave(5.0)
    assert not kv_files.kv_files()
    os.utime(locations.kv_dir() / f"{ONE}.gone", (1, 1))  # it was restored, and somebody asked in it
    ask(engine, [*ids, 5, 6])
    engine.leave(5.0)
    assert kv_files.kv_files()


def cache_of(number: int, length: int = 700) -> tuple[kv_store.KVCache, kv_store.Contents]:
    """A cache whose numbers are all `number`, as its ids are."""
    cache = kv_store.KVCache(3, 2, 16, 1024, torch.float32)
    for rows in (*cache.keys, *cache.values):
        rows.fill_(float(number))
    cache.length = length
    return cache, kv_store.Contents((number,) * length, (Pass(0, length, "prefill"),))


def number_in(path: Path) -> int:
    """Of which cache a file is, all of it. Raises Unusable."""
    cache, _ = cache_of(0)
    reader = kv_store.KVReader(path, "key", cache)
    for _ in reader.read(len(reader.ids)):
        pass
    reader.close()
    numbers = {
        *reader.ids.tolist(),
        *(int(v) for rows in (*cache.keys, *cache.values) for v in (rows[:, :700].min(), rows[:, :700].max())),
    }
    assert len(numbers) == 1
    return int(numbers.pop())


def test_a_kill_while_a_cache_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    path, chance = tmp_path / "a.safetensors", random.Random(2)
    caches = [cache_of(number) for number in range(1, 8)]
    kv_store.write(path, "key", *caches[0])
    size = path.stat().st_size
    seen: set[int] = set()
    for turn in range(40):
        child = os.fork()
        if not child:
            try:
                for number in count(turn):
                    kv_store.write(path, "key", *caches[number % 7])
            finally:
                os._exit(1)
        wait_until(partial(has_written, tmp_path, child, chance.randrange(size)))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        seen.add(number_in(path))
    assert len(seen) > 1 and any(one.name.endswith(kv_files.PARTIAL) for one in tmp_path.iterdir())


def has_written(folder: Path, process: int, size: int) -> bool:
    """Whether it is at a file and so far."""
    for path in folder.glob(f"*.{process}-*"):
        with suppress(FileNotFoundError):
            if path.stat().st_size >= size:
                return True
    return False


def test_engines_that_write_the_same_file_leave_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    caches = [cache_of(number) for number in (1, 2, 3)]

    def write(number: int) -> None:
        for _ in range(15):
            kv_store.write(path, "key", *caches[number])
            assert number_in(path) in (1, 2, 3)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert number_in(path) in (1, 2, 3) and list(tmp_path.iterdir()) == [path]


def mounted(folder: Path, options: str) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.fixture
def disk(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The folder of the files as a disk of its own, mounted with the options that the test names."""
    folder = locations.kv_dir()
    if not mounted(folder, request.param):
        pytest.skip("only root may mount a small disk, and not in every container")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("disk", ["size=100k,mode=700", "ro,mode=700"], indirect=True)
def test_on_a_disk_that_takes_nothing_answers_come_and_a_line_says_why(
    disk: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = load(model)
    with caplog.at_level(logging.WARNING):
        got, _ = ask(engine, prompt(1, 700))
        wait_until(lambda: caplog.records)
        engine.close()
    assert got == ask(Engine.load(model, quant=4, threads=1), prompt(1, 700), None)[0]
    assert len(caplog.records) == 1 and "not kept" in caplog.text and not list(disk.iterdir())


@pytest.mark.parametrize("disk", ["size=200k,mode=700"], indirect=True)
def test_a_disk_that_fills_while_a_cache_is_written_keeps_nothing_of_it(disk: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        kv_store.write(disk / "a.safetensors", "key", *cache_of(1))
    assert not list(disk.iterdir())


def test_a_file_in_the_place_of_the_folder_costs_a_line(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    locations.cache_dir().mkdir(parents=True, exist_ok=True)
    locations.kv_dir().write_text("mine")
    engine = load(model)
    with caplog.at_level(logging.WARNING):
        ask(engine, prompt(1, 300))
        engine.close()
    assert len(caplog.records) == 1 and "not kept" in caplog.text and locations.kv_dir().read_text() == "mine"


def test_clients_without_a_name_have_one_file_for_each_conversation_that_grows(model: Path) -> None:
    one, two = prompt(1, 200), prompt(2, 200)
    engine = load(model)
    engine.sequences.most = 2
    for turn in range(3):
        for ids in (one, two):
            ids += ask(engine, ids, kv_files.UNNAMED)[0] + prompt(turn, 30)
    engine.close()
    assert len(kv_files.kv_files()) == 2
    again = load(model)
    for ids in (one, two):
        assert ask(again, ids, kv_files.UNNAMED)[1]["disk"]["ids"] >= 250
    again.close()
    assert len(kv_files.kv_files()) == 2


@pytest.mark.parametrize("seed", range(3))
def test_whoever_comes_goes_or_stops_meanwhile_each_file_holds_what_its_passes_compute(seed: int, model: Path) -> None:
    engine, chance = load(model), random.Random(seed)
    engine.sequences.most = 3
    talks = {str(number) * 32: prompt(number, chance.randint(20, 300)) for number in range(1, 7)}
    writing: dict[str, Any] = {}
    chunk: Any
    for _ in range(150):
        free = [name for name in talks if name not in writing]
        if len(writing) < 3 and free and chance.random() < 0.3:
            name = chance.choice(free)
            ids = talks[name] = [*talks[name][: chance.randint(20, 300)], chance.randint(4, 250)]
            named = name if chance.random() < 0.8 else None
            sampling = Sampling(temperature=1.0, seed=seed, max_tokens=chance.randint(1, 30), ignore_eos=True)
            writing[name] = engine.stream_tokens(ids, sampling, conversation=named)
        engine.step()
        for name, steps in list(writing.items()):
            chunk = next(steps, ENDED)
            if chunk is ENDED or chance.random() < 0.02:  # its reader has gone
                steps.close()
                del writing[name]
            elif chunk is not None:
                talks[name] = talks[name] + list(chunk.token_ids)
    for steps in writing.values():
        steps.close()
    engine.leave(30.0)
    files = kv_files.kv_files()
    assert files
    plain = Engine.load(model, quant=4, threads=1)
    for file in files:
        read, computed = plain.sequences.allocate(), plain.sequences.current
        reader = kv_store.KVReader(file.path, file.key, read)
        for _ in reader.read(len(reader.ids)):
            pass
        reader.close()
        computed.rebuild(reader.ids.tolist(), reader.passes)
        length = len(reader.ids)
        for name in ("keys", "values"):
            for ours, theirs in zip(getattr(read, name), getattr(computed.cache, name), strict=True):
                assert torch.equal(ours[:, :length], theirs[:, :length])


def test_of_several_answers_to_one_question_one_is_written(model: Path) -> None:
    engine = load(model)
    engine.keep_caches(PLENTY, idle_seconds=600)
    engine.sequences.most = 4
    ids = prompt(1, 200)
    writing = [
        engine.stream_tokens(ids, Sampling(temperature=1.0, seed=seed, max_tokens=5, ignore_eos=True), conversation=ONE)
        for seed in range(4)
    ]
    while writing:
        engine.step()
        writing = [steps for steps in writing if next(steps, ENDED) is not ENDED]
    store = engine.sequences.store
    assert store is not None and len(store._jobs) == 1


def test_a_server_that_never_rests_does_not_hold_the_caches_of_everybody(model: Path) -> None:
    engine = load(model)
    engine.keep_caches(PLENTY, idle_seconds=600)
    engine.sequences.most = 2
    busy = engine.stream_tokens(prompt(0, 20), Sampling(temperature=1.0, seed=1, max_tokens=500, ignore_eos=True))
    next(busy)
    for number in range(1, 9):
        ask(engine, prompt(number, 200), str(number) * 32)
    store = engine.sequences.store
    assert store is not None and len(store._jobs) <= 3  # two that wait, and the one that is still in its place
    busy.close()


def test_a_disk_that_only_reads_gives_what_it_has(model: Path) -> None:
    ids = prompt(1, 300)
    ask(load(model), ids)
    path = written()
    if not mounted(path.parent.parent / "other", "size=10m,mode=700"):
        pytest.skip("only root may mount a small disk, and not in every container")
    other = path.parent.parent / "other"
    try:
        (other / path.name).write_bytes(path.read_bytes())
        path.unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(other)], check=True)
        subprocess.run(["mount", "--bind", str(other), str(path.parent)], check=True)
        engine = load(model)
        assert ask(engine, [*ids, 9])[1]["disk"]["ids"] >= 300
        engine.close()
        LOADED.clear()
        subprocess.run(["umount", "-l", str(path.parent)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(other)], check=True)


def test_a_wide_model_is_read_and_written_in_blocks_of_bounded_size(tmp_path: Path) -> None:
    cache = kv_store.KVCache(8, 32, 128, 700, torch.float32)  # a quarter of a megabyte a position
    for rows in (*cache.keys, *cache.values):
        rows.copy_(torch.randn(rows.shape))
    cache.length = 700
    contents = kv_store.Contents((7,) * 700, (Pass(0, 700, "prefill"),))
    path = tmp_path / "a.safetensors"
    assert kv_store.write(path, "key", cache, contents) == path.stat().st_size
    again = kv_store.KVCache(8, 32, 128, 700, torch.float32)
    reader = kv_store.KVReader(path, "key", again)
    assert sum(1 for _ in reader.read(500)) > 4
    reader.close()
    assert all(torch.equal(a[:, :500], b[:, :500]) for a, b in zip(again.keys, cache.keys, strict=True))
    with safe_open(path, "pt") as file:
        assert max(file.get_tensor(name).nbytes for name in file.keys()) <= 2**24  # noqa: SIM118
