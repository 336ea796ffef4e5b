"""How fast weights are quantised in memory, and what that makes for the 6.2 billion of ChatGLM-6B.

    python benchmarks/quantise_speed.py [--rows 4096]

One float16 matrix of ROWS x 4096, best of three. Seconds on the clock say what this machine gave just now; processor
seconds are what it takes, whoever else is at work. Reading and writing files come on top.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from glmchat.engine.quantize.int4 import quantise_int4
from glmchat.engine.quantize.int8 import quantise_int8

WEIGHTS = 6.2e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    rows = parser.parse_args().rows
    weight = (torch.randn(rows, 4096, generator=torch.Generator().manual_seed(1)) * 0.02).half()
    cases: list[tuple[str, Callable[[], object]]] = [
        ("INT4 g128, whole zero points", lambda: quantise_int4(weight, 128)),
        ("INT4 g128, free zeros", lambda: quantise_int4(weight, 128, portable=False)),
        ("INT4 g128 --fast", lambda: quantise_int4(weight, 128, fast=True)),
        ("INT8", lambda: quantise_int8(weight)),
        ("INT8 --fast", lambda: quantise_int8(weight, fast=True)),
    ]
    print(f"{torch.get_num_threads()} threads")
    for name, work in cases:
        clock, processor = min(_timed(work) for _ in range(3))
        times = WEIGHTS / weight.numel()
        print(
            f"{name:30} {weight.numel() / clock / 1e6:6.0f} million weights/s; ChatGLM-6B: {times * clock:5.0f} s, "
            f"{times * processor:5.0f} s of processor time",
            flush=True,
        )


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


if __name__ == "__main__":
    main()
