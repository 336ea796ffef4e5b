"""What a model reaches on this machine: load, prefill, decode, memory, and the memory bus that bounds decoding.

`python -P -m glmchat.jobs.bench FOLDER` writes one JSON object a line to stdout; `glmchat bench` draws them.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import torch

from glmchat.core.errors import GlmchatError
from glmchat.core.machine import available_memory
from glmchat.core.messages import Sampling
from glmchat.engine.engine import Engine

PROMPT_LENGTHS = (32, 128, 512, 2048)
DECODED = 64  # tokens an answer is timed over
REPEATS = 3  # the best of them counts: everything else on the machine only slows
BUS_BYTES = 2**30  # beyond any cache: 256 MB stood in the 480 MB third-level cache of a server


def read_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads read from memory: the best of five sums over 1 GiB, less where memory is
    short."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    size = min(BUS_BYTES, (available_memory() or BUS_BYTES) // 4)
    block = torch.ones(size // 4, dtype=torch.float32)
    best = min(_seconds(lambda: block.sum()) for _ in range(5))
    torch.set_num_threads(before)
    return block.nbytes / best


def bench(engine: Engine, lengths: Sequence[int] = PROMPT_LENGTHS, decoded: int = DECODED) -> Iterator[dict[str, Any]]:
    """Events "bench.length" for each prompt length that fits, then one "bench.machine".

    decode_fraction: weight bytes read per second while decoding, over what the bus gives to the same threads. Each
    weight is read once a token; the embedding is not (one row of it is), the head is.
    """
    weights = engine.memory()["weights"]
    bus = read_bandwidth(engine.threads)
    best_decode = 0.0
    for length in lengths:
        if length + decoded > engine.context:
            continue
        prefill, decode = _best(engine, length, decoded)
        best_decode = max(best_decode, decode)
        yield {
            "event": "bench.length",
            "prompt_tokens": length,
            "prefill_tokens_per_second": prefill,
            "decode_tokens_per_second": decode,
        }
    yield {
        "event": "bench.machine",
        "threads": engine.threads,
        "weights_bytes": weights,
        "read_bytes_per_second": bus,
        "decode_fraction": best_decode * weights / bus,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
    }


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


def main() -> int:
    """The child process of `glmchat bench`. Errors are one JSON line and their exit code."""
    parser = argparse.ArgumentParser(prog="glmchat.jobs.bench")
    parser.add_argument("folder")
    parser.add_argument("--quant", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--lengths", type=int, nargs="*", default=PROMPT_LENGTHS)
    given = parser.parse_args()
    base = psutil.Process().memory_info().rss
    try:
        engine = Engine.load(given.folder, given.quant, given.dtype, given.device, given.threads, context=given.context)
        memory = engine.memory()
        _line(
            {
                "event": "bench.load",
                "load_seconds": engine.load_seconds,
                "base_rss_bytes": base,
                **engine.facts(),
                "memory": memory,
            }
        )
        for event in bench(engine, given.lengths):
            _line(event)
        engine.close()
    except GlmchatError as problem:
        _line({"event": "error", **problem.to_json()})
        return problem.exit
    return 0


def _line(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
