"""How many tokens a second several answers get together, against one alone: ratios within one run.

`.venv/bin/python -P benchmarks/many.py MODEL [--quant 4] [--threads 2] [--prompt 200] [--tokens 100]`: the engine in
this process, first alone, then 2, 4, 8 and 16 sequences, `--rounds` times in turn, the best of each; counted once all
prompts are read. With `--evaluation N` so many prompts of 100 tokens, answers of 60: sixteen at a time, and one by one.
With `--adapters N` as many answers, each with a random LoRA of rank 8 of its own: in one step, all with the same one,
without any, and a token of each in turns; and what the change from one adapter to another costs.
`--cpu` counts the processor's seconds instead of the clock's, for one thread on a machine that others use.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from glmchat.engine import Chunk, Engine, Sampling
from glmchat.engine.decoding.sequences import Sequences

Steps = Generator[Chunk | None, None, None]
CLOCK = time.thread_time if "--cpu" in sys.argv else time.perf_counter


def prompt(number: int, length: int, vocabulary: int) -> list[int]:
    """Prompts of different numbers have no beginning in common."""
    return [100 + (number * 7919 + i * 104729) % (min(vocabulary, 30_000) - 200) for i in range(length)]


def write_lora(engine: Engine, folder: Path, seed: int, rank: int = 8) -> Path:
    """On every linear layer, with random numbers."""
    noise, tensors, targets = torch.Generator().manual_seed(seed), {}, set[str]()
    for name, layer in engine.model.named_modules():
        if ".layers." in name and hasattr(layer, "in_features"):
            targets.add(name.rpartition(".")[2])
            stem = f"base_model.model.{name}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, layer.in_features, generator=noise) * 0.02
            tensors[f"{stem}.lora_B.weight"] = torch.randn(layer.out_features, rank, generator=noise) * 0.02
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def begun(engine: Engine, active: dict[str, float], ids: list[int], sampling: Sampling) -> Steps:
    engine.activate(active)
    yield from engine.stream_tokens(ids, sampling)


def run(
    engine: Engine,
    prompts: list[list[int]],
    tokens: int,
    at_once: int,
    active: Sequence[dict[str, float]] = ({},),
    together: bool = True,
) -> tuple[float, float]:
    """Seconds until all are written, and tokens a second from when the first `at_once` prompts were read.

    active: adapters of the answers, one after the other. together: in one step; else by torch's rules, each alone.
    """
    engine.activate({})
    engine.sequences = Sequences(engine.model, engine.context, engine.device, at_once)
    sampling = Sampling(temperature=0, max_tokens=tokens, ignore_eos=True)
    waiting = [begun(engine, active[n % len(active)], ids, sampling) for n, ids in enumerate(prompts)]
    writing: list[Steps] = []
    read, left = 0.0, 0
    started = CLOCK()
    while waiting or writing:
        while waiting and len(writing) < at_once:
            writing.append(waiting.pop(0))
        if together:
            engine.step()
        writing = [steps for steps in writing if next(steps, _ENDED) is not _ENDED]
        slots = [slot for slot in engine.sequences.slots if slot.taken]
        if not read and len(slots) == len(writing) and all(slot.pending is not None for slot in slots):
            read = CLOCK()
            left = sum(tokens + len(prompts[0]) - 1 - slot.length for slot in slots)
    ended = CLOCK()
    return ended - started, left / (ended - read)


_ENDED = object()


def compare_adapters(engine: Engine, prompts: list[list[int]], tokens: int, rounds: int, root: Path) -> None:
    """root: an empty folder for the adapters, which are looked at when they become active."""
    names = [f"a{number}" for number in range(len(prompts))]
    for number, name in enumerate(names):
        engine.attach(write_lora(engine, root / name, number), name)
    own = [{name: 1.0} for name in names]
    ways = {
        "without adapters": ([{}], True),
        "all with the same one": (own[:1], True),
        "each with its own": (own, True),
        "each with its own, a token of each in turns": (own, False),
    }
    best = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for way, (active, together) in ways.items():
            best[way] = max(best[way], run(engine, prompts, tokens, len(prompts), active, together)[1])
    for way, speed in best.items():
        print(f"{len(prompts)} answers {way}: {speed:.1f} tokens a second in all", flush=True)
    variants = []
    for active in own[:2]:
        engine.activate(active)
        variants.append(engine.sequences.current.variant)
    started = CLOCK()
    for number in range(100):
        engine.model.wear(variants[number % 2])
    print(f"from one adapter to another: {(CLOCK() - started) * 10:.2f} ms")


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
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()
    if given.cpu and given.threads != 1:
        parser.error("--cpu is for --threads 1")
    ways = {"quant": given.quant, "products": given.products}
    engine = Engine.load(given.model, threads=given.threads, context=2048, **ways)
    size = engine.spec.vocab_size
    print(f"{given.model.name}: {engine.facts()['kernel']}, {engine.facts()['dtype']}, {given.threads} threads")
    if given.adapters:
        prompts = [prompt(number, given.prompt, size) for number in range(given.adapters)]
        with TemporaryDirectory() as folder:
            compare_adapters(engine, prompts, given.tokens, given.rounds, Path(folder))
        return
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
