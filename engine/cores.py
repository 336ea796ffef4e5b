"""How many threads pay: physical cores that this process may use, and a short look at what they really give."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

_CPU_INFO = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Physical cores in the affinity mask, at most what the cgroup's CPU quota allows, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        allowed: set[int] = os.sched_getaffinity(0)
    else:
        allowed = set(range(os.cpu_count() or 1))
    siblings = {_siblings(cpu) for cpu in allowed}
    cores = len(siblings)
    quota = _cgroup_quota()
    return max(1, min(cores, math.ceil(quota) if quota else cores))


def _siblings(cpu: int) -> str:
    """The set of hardware threads that share a core, as Linux writes it; the thread itself where nobody says."""
    try:
        return (_CPU_INFO / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _cgroup_quota() -> float | None:
    """CPUs' worth of time that the cgroup (version 2 or 1) may use, or None if it is not limited."""
    try:
        limit, period = (_CGROUP / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass  # no version 2 here
    try:
        limit_us = int((_CGROUP / "cpu" / "cpu.cfs_quota_us").read_text())
        period_us = int((_CGROUP / "cpu" / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return limit_us / period_us if limit_us > 0 and period_us > 0 else None


def choose_threads(asked: int | None, step: Callable[[], float]) -> int:
    """Set torch's thread count to the one with which `step` (it returns the seconds it took) is fastest.

    asked: taken as it is. Otherwise all cores are compared with one: two OpenMP threads on a machine whose second core
    is busy can be 20 times slower than one, because each barrier waits for the core that does not come.
    """
    cores = usable_cores()
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
