"""How many tokens a second several answers get together, against one alone: ratios within one run.

`.venv/bin/python -P benchmarks/many.py MODEL [--quant 4] [--threads 2] [--prompt 200] [--tokens 100]`: the engine in
this process, first alone, then 2, 4, 8 and 16 sequences, `--rounds` times in turn, the best of each; counted once all
prompts are read. With `--evaluation N` so many prompts of 100 tokens, answers of 60: sixteen at a time, and one by one.
`--cpu` counts the processor's seconds instead of the clock's, for one thread on a machine that others use.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Generator
from pathlib import Path

from glmchat.engine import Chunk, Engine, Sampling
from glmchat.engine.decoding.sequences import Sequences

CLOCK = time.thread_time if "--cpu" in sys.argv else time.perf_counter


def prompt(number: int, length: int, vocabulary: int) -> list[int]:
    """Prompts of different numbers have no beginning in common."""
    return [100 + (number * 7919 + i * 104729) % (min(vocabulary, 30_000) - 200) for i in range(length)]


def run(engine: Engine, prompts: list[list[int]], tokens: int, at_once: int) -> tuple[float, float]:
    """Seconds until all are written, and tokens a second from when the first `at_once` prompts were read."""
    engine.sequences = Sequences(engine.model, engine.context, engine.device, at_once)
    sampling = Sampling(temperature=0, max_tokens=tokens, ignore_eos=True)
    waiting = [engine.stream_tokens(ids, sampling) for ids in prompts]
    writing: list[Generator[Chunk | None, None, None]] = []
    read, left = 0.0, 0
    started = CLOCK()
    while waiting or writing:
        while waiting and len(writing) < at_once:
            writing.append(waiting.pop(0))
        engine.step()
        writing = [steps for steps in writing if next(steps, _ENDED) is not _ENDED]
        slots = [slot for slot in engine.sequences.slots if slot.taken]
        if not read and len(slots) == len(writing) and all(slot.pending is not None for slot in slots):
            read = CLOCK()
            left = sum(tokens + len(prompts[0]) - 1 - slot.length for slot in slots)
    ended = CLOCK()
    return ended - started, left / (ended - read)


_ENDED = object()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--quant", type=int)
    parser.add_argument("--products", choices=("int8",))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--counts", default="1,2,4,8,16")
    parser.add_argument("--evaluation", type=int, default=0)
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()
    if given.cpu and given.threads != 1:
        parser.error("--cpu is for --threads 1")
    ways = {"quant": given.quant, "products": given.products}
    engine = Engine.load(given.model, threads=given.threads, context=2048, **ways)
    size = engine.spec.vocab_size
    print(f"{given.model.name}: {engine.facts()['kernel']}, {engine.facts()['dtype']}, {given.threads} threads")
    best: dict[int, float] = {}
    for _ in range(given.rounds):
        for count in map(int, given.counts.split(",")):
            prompts = [prompt(number, given.prompt, size) for number in range(count)]
            best[count] = max(best.get(count, 0.0), run(engine, prompts, given.tokens, count)[1])
    alone = best[min(best)]
    for count, speed in best.items():
        print(
            f"{count:3} at once: {speed:8.1f} tokens a second in all, {speed / alone:.2f} times one alone", flush=True
        )
    if given.evaluation:
        prompts = [prompt(n, 100, size) for n in range(given.evaluation)]
        together, single = run(engine, prompts, 60, 16)[0], run(engine, prompts, 60, 1)[0]
        print(f"{len(prompts)} prompts of 100, answers of 60: {together:.1f} s sixteen at once, {single:.1f} s in turn")


if __name__ == "__main__":
    main()
