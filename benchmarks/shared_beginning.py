"""Eight answers whose prompts begin alike: what their caches take together, and what the others wait for.

    python -P benchmarks/shared_beginning.py MODEL [--cache-type int8] [--copies] [--beginning 2000] [--threads 1]

--copies: each has pages of its own, as where pages cannot be shared. Memory is what the process adds to the machine's
(PSS: `top` counts a page for each cache that maps it); times are the processor's.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise
from typing import Any

import psutil

from glmchat.engine import Engine, Sampling
from glmchat.engine.native import pages

ANSWERS, STEPS = 8, 20


def begin(engine: Engine, beginning: list[int], number: int) -> Any:
    """An answer whose prompt has been read."""
    prompt = [*beginning, 100 + number, 7]
    steps = engine.stream_tokens(prompt, Sampling(temperature=0, max_tokens=2 * STEPS, ignore_eos=True))
    next(steps)
    while engine.sequences.current.length < len(prompt):
        next(steps)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cache-type", choices=("float32", "bfloat16", "int8"))
    parser.add_argument("--copies", action="store_true")
    parser.add_argument("--beginning", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    if given.copies:
        pages.LEAST_BYTES = 1 << 60
    engine = Engine.load(given.model, threads=given.threads, parallel=ANSWERS, cache_type=given.cache_type)
    process = psutil.Process()
    list(engine.generate(list(range(20, 60)), Sampling(max_tokens=4, temperature=0)))
    beginning = [(7 * i) % (engine.spec.vocab_size // 2) + 20 for i in range(given.beginning)]
    memory, times = [process.memory_full_info().pss], []
    answers: list[Any] = []
    for count in (1, ANSWERS - 1):
        started = time.process_time()
        answers += [begin(engine, beginning, len(answers) + number) for number in range(count)]
        times.append((time.process_time() - started) / count)
        memory.append(process.memory_full_info().pss)
    started = time.process_time()
    for _ in range(STEPS):
        engine.step()
        for steps in answers:
            next(steps)
    step = (time.process_time() - started) / STEPS
    one, more = (1e-6 * (later - sooner) for sooner, later in pairwise(memory))
    print(f"cache in {given.cache_type or engine.dtype}: the first takes {one:.0f} MB and {times[0]:.2f} s, ", end="")
    print(f"{ANSWERS - 1} more {more:.0f} MB and {1e3 * times[1]:.0f} ms each; a step of all {1e3 * step:.1f} ms")


if __name__ == "__main__":
    main()
