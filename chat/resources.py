"""How much memory a process and the graphics card use, for the status line."""

from __future__ import annotations

import importlib
from typing import Any

import psutil


def process_memory(pid: int) -> int | None:
    """Bytes that a process and its children hold in memory; None if it is gone.

    Weights are mapped from their file; what the kernel has read of them is counted, as `top` counts it.
    """
    try:
        process = psutil.Process(pid)
        return int(sum(p.memory_info().rss for p in [process, *process.children(recursive=True)]))
    except psutil.Error:
        return None


def gpu_memory() -> tuple[int, int] | None:
    """(used, total) bytes of the first NVIDIA card; None without one or without nvidia-ml-py."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        info = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(0))
    except ModuleNotFoundError:
        return None
    except Exception as error:
        # pynvml makes its error classes at run time, all under NVMLError: no driver and no card are no news.
        if type(error).__module__.partition(".")[0] != "pynvml":
            raise
        return None
    return int(info.used), int(info.total)


def total_memory() -> int:
    """Bytes of memory in this machine."""
    return int(psutil.virtual_memory().total)
