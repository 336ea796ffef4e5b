"""How many threads pay: physical cores that this process may use, and a short look at what they really give."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from glmchat.core.machine import physical_cores


def choose_threads(asked: int | None, step: Callable[[], float]) -> int:
    """Set torch's thread count to the one with which `step` (it returns the seconds it took) is fastest.

    asked: taken as it is. Otherwise all cores are compared with one: two OpenMP threads on a machine whose second core
    is busy can be 20 times slower than one, because each barrier waits for the core that does not come.
    """
    cores = physical_cores()
    if asked is not None or cores == 1:
        torch.set_num_threads(asked or 1)
        return asked or 1
    candidates: Sequence[int] = (cores, cores // 2, 1) if cores > 3 else (cores, 1)
    best, best_seconds = 1, math.inf
    for count in candidates:
        torch.set_num_threads(count)
        step()  # the pool is built and caches are warm
        seconds = sorted(step() for _ in range(3))[1]
        if seconds < best_seconds * 0.97:  # fewer threads must not win by noise, nor more
            best, best_seconds = count, seconds
    torch.set_num_threads(best)
    return best
