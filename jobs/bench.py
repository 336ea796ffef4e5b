"""What a model reaches on this machine: load, prefill, decode, memory, and the memory bus that bounds decoding.

`python -P -m glmchat.jobs.bench --folder=…` takes the options of an engine; `glmchat bench` draws what it tells.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import psutil
import torch

from glmchat.core.engine_options import EngineOptions
from glmchat.core.machine import available_memory, peak_memory
from glmchat.core.messages import Sampling
from glmchat.engine.engine import Engine
from glmchat.jobs.lines import Request, Tell, run

PROMPT_LENGTHS = (32, 128, 512, 2048)
DECODED = 64  # tokens an answer is timed over
REPEATS = 3  # the best of them counts: everything else on the machine only slows
BUS_BYTES = 2**30  # beyond any cache: 256 MB stood in the 480 MB third-level cache of a server

CARD_BUS_BYTES = 2**32


def read_bandwidth(threads: int, weights: int = BUS_BYTES) -> float:
    """Bytes per second that `threads` threads read: the fastest of three loops over 1 GiB (less where memory is short)
    and over as many bytes as the weights are, of which caches may keep a part when they are decoded, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    most = min(BUS_BYTES, (available_memory() or BUS_BYTES) // 4)
    block = torch.ones(most // 4, dtype=torch.float32)
    rates = []
    for size in {most, min(most, weights) // 4096 * 4096}:
        part = block[: size // 4]
        halves = part[: len(part) // 2], part[len(part) // 2 : len(part) // 2 * 2]
        loops: list[Callable[[], Any]] = [part.sum, part.amax, lambda halves=halves: torch.dot(*halves)]  # type: ignore[misc]
        rates += [part.nbytes / min(_seconds(loop) for _ in range(5)) for loop in loops if size]
    torch.set_num_threads(before)
    return max(rates)


def card_bandwidth(device: str) -> float:
    """Bytes per second that a card reads from its own memory: the fastest sum, or half of the fastest copy that reads
    and writes, over 4 GiB, less where the card is full."""
    free, _ = torch.cuda.mem_get_info(device)
    block = torch.ones(min(CARD_BUS_BYTES, free // 4) // 4, dtype=torch.float32, device=device)
    copy = torch.empty_like(block)

    def timed(work: Callable[[], Any]) -> float:
        def finished() -> None:
            work()
            torch.cuda.synchronize(device)

        torch.cuda.synchronize(device)
        return _seconds(finished)

    reading = min(timed(block.sum) for _ in range(20))
    copying = min(timed(lambda: copy.copy_(block)) for _ in range(20))
    return max(block.nbytes / reading, 2 * block.nbytes / copying)


def bench(
    engine: Engine, tell: Tell, lengths: Sequence[int] = PROMPT_LENGTHS, decoded: int = DECODED
) -> dict[str, Any]:
    """Tells "bench.length" for each prompt length that fits, and returns what the machine gave.

    decode_fraction: weight bytes read per second while decoding, over what the bus of the device gives (on a CPU to the
    same threads). Each weight is read once a token; the embedding is not (one row of it is), the head is. Decoding is
    itself a loop that reads: where no other was as fast, it is the peak.
    """
    weights, device = engine.memory()["weights"], engine.device
    on_card = device.startswith("cuda")
    bus = card_bandwidth(device) if on_card else read_bandwidth(engine.threads, weights)
    best_decode = 0.0
    for length in lengths:
        if length + decoded > engine.context:
            continue
        prefill, decode = _best(engine, length, decoded)
        best_decode = max(best_decode, decode)
        speeds = {"prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode}
        tell({"event": "bench.length", "prompt_tokens": length, **speeds})
    bus = max(bus, best_decode * weights)
    return {
        **({"card": engine.facts().get("card"), "card_peak_bytes": _card_peak(engine)} if on_card else {}),
        "threads": engine.threads,
        "weights_bytes": weights,
        "read_bytes_per_second": bus,
        "decode_fraction": best_decode * weights / bus,
        "peak_rss_bytes": peak_memory(),
    }


def _card_peak(engine: Engine) -> int:
    return sum(torch.cuda.max_memory_allocated(device) for device in engine.plan.devices)


def _best(engine: Engine, length: int, decoded: int) -> tuple[float, float]:
    """Tokens per second of reading a fresh prompt and of answering it, each the best of the repeats."""
    chance = random.Random(length)  # noqa: S311 - the ids only have to differ between repeats
    sampling = Sampling(temperature=0, max_tokens=decoded, ignore_eos=True)
    prefill = decode = 0.0
    for _ in range(REPEATS):
        ids = [chance.randrange(engine.spec.vocab_size // 2) for _ in range(length)]
        started = time.perf_counter()
        steps = engine.generate(ids, sampling)
        next(steps)
        first = time.perf_counter()
        count = sum(1 for _ in steps)
        ended = time.perf_counter()
        prefill = max(prefill, length / (first - started))
        decode = max(decode, count / (ended - first))
    return prefill, decode


def _seconds(work: Any) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def work(request: Request, tell: Tell) -> dict[str, Any]:
    """request: {"lengths": prompt lengths}, all optional. The result is what the machine gave."""
    options = EngineOptions.from_arguments(sys.argv[1:])
    lengths = request.get("lengths", PROMPT_LENGTHS)
    tell({"event": "plan", "folder": str(options.folder), "lengths": lengths})
    base = psutil.Process().memory_info().rss
    with closing(Engine.load(options.require_folder(), **options.for_load())) as engine:
        loaded = {"load_seconds": engine.load_seconds, "base_rss_bytes": base, **engine.facts()}
        tell({"event": "bench.load", **loaded, "memory": engine.memory()})
        return bench(engine, tell, lengths)


if __name__ == "__main__":
    sys.exit(run(work))
