"""What this machine gives a process: cores, memory, and what the kernel did when memory ran out. Standard library only.

A container's limits stand in its cgroup (v2 and v1), and the machine's own numbers ignore them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from glmchat.core.files import read_text

CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 writes 2**63 rounded to pages for "no limit"


def physical_cores() -> int:
    """Cores, not hyperthreads, that this process may run on: affinity mask and cgroup quota counted. At least 1.

    Decoding is bound by memory, and a second hyperthread of a core only gets in the way of the first.
    """
    allowed = _affinity()
    cores = {_core_of(cpu) for cpu in allowed}
    count = len(cores) if allowed else _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu")
    count = count or os.cpu_count() or 1
    quota = cpu_quota()
    return count if quota is None else max(1, min(count, int(quota)))


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if sys.platform.startswith("linux") else set()


def _core_of(cpu: int) -> str:
    """A name that hyperthreads of one core share. A virtual machine without topology has a core per CPU."""
    siblings = _read(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
    return siblings or str(cpu)


def _sysctl(name: str) -> int | None:
    if sys.platform != "darwin":
        return None
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        answer = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, timeout=5, check=True)
        return int(answer.stdout)
    return None


def cpu_quota() -> float | None:
    """CPUs' worth of time that the cgroup allows, the tightest on the way to the root; None without a limit."""
    quotas = []
    for folder in _groups("cpu"):
        if text := _read(folder / "cpu.max"):  # v2: "200000 100000" or "max 100000"
            quota, _, period = text.partition(" ")
        else:
            quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        with suppress(ValueError, ZeroDivisionError):
            if (value := int(quota) / int(period)) > 0:
                quotas.append(value)
    return min(quotas, default=None)


@cache
def has_bf16() -> bool:
    """True if this CPU multiplies bfloat16 by itself (AVX-512 BF16 or AMX); the engine then computes in it."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("flags"):
            flags = line.split()
            return "avx512_bf16" in flags or "amx_tile" in flags
    return False


def memory_limit() -> int | None:
    """Bytes the cgroup allows, the tightest on the way to the root; None without a limit."""
    limits = []
    for folder in _groups("memory"):
        with suppress(ValueError):
            value = int(_read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes"))
            if value < _UNLIMITED:
                limits.append(value)
    return min(limits, default=None)


def available_memory() -> int | None:
    """Bytes that can be taken without swapping: MemAvailable, or what the cgroup leaves if that is less.

    Page cache counts as available in both, since the kernel gives it back. None where nothing says so.
    """
    candidates = []
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            candidates.append(int(line.split()[1]) * 1024)
    for folder in _groups("memory"):
        with suppress(ValueError):
            limit = int(_read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes"))
            used = int(_read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes"))
            if limit < _UNLIMITED:
                candidates.append(max(0, limit - used + _page_cache(folder)))
    return min(candidates, default=None)


def _page_cache(folder: Path) -> int:
    """File pages of a cgroup that the kernel drops before it kills."""
    total = 0
    for line in _read(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("total_inactive_file", "total_active_file") or (
            name in ("inactive_file", "active_file") and (folder / "memory.max").exists()
        ):
            total += int(value)
    return total


def peak_memory() -> int:
    """The most bytes that this process has held. Linux's ru_maxrss begins with what held whoever started it."""
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def oom_kills() -> int | None:
    """Processes of this cgroup that the kernel killed for memory, ever; None where that cannot be read.

    Read before a child starts and after it died: the difference is the cause.
    """
    for folder in _groups("memory"):
        for name in ("memory.events", "memory.oom_control"):  # v2, v1
            for line in _read(folder / name).splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill" and value.isdecimal():
                    return int(value)
    return None


def _groups(controller: str) -> list[Path]:
    """Folders of this process's cgroup for a controller, from its own up to the root."""
    groups: list[Path] = []
    for root, own in _memberships(controller):
        # Inside a container the path is often the host's and not there: then the mount's root is our group.
        inner = root / own.lstrip("/")
        folder = inner if inner.is_dir() and ".." not in own else root
        while True:
            groups.append(folder)
            if folder == root or root not in folder.parents:
                break
            folder = folder.parent
    return groups


@cache
def _memberships(controller: str) -> tuple[tuple[Path, str], ...]:
    memberships = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            unified = CGROUPS / "unified"
            memberships.append((unified if unified.is_dir() else CGROUPS, path))
        elif controller in controllers.split(","):
            memberships.append((CGROUPS / controller, path))
    return tuple(memberships)


def _read(path: Path) -> str:
    try:
        return read_text(path, errors="replace").strip()
    except OSError:
        return ""


_M_MMAP_THRESHOLD = -3  # malloc.h
_BIG = 256 * 1024


def return_big_blocks() -> None:
    """Freed blocks above 256 kB go back to the system at once. Does nothing where the C library is not glibc.

    glibc begins so, but each big block that is freed raises its limit, up to 32 MB. A long answer is a string that is
    replaced by a longer one many times a second: below the limit, each leaves a hole in a heap that only grows.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _BIG)
