"""NVIDIA's management library for a machine that exists only on paper: what $PRETEND_CARDS describes, as JSON.

A folder of its own, so that it can be put in front of sys.path, here and by PYTHONPATH in a child. Its functions have
the names, results and errors of nvidia-ml-py, as far as a reader of cards needs them.

{"driver": "550.54.15", "cuda": 12040, "cards": [{"name": "…", "uuid": "GPU-…", "capability": [8, 6], "total": bytes,
"free": bytes, "mig": [{"uuid": "MIG-…", "total": bytes, "free": bytes}]}]}; no variable: no driver.
"""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    pass


class NVMLError_LibraryNotFound(NVMLError):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


class NVMLError_NotFound(NVMLError):
    pass


class NVMLError_Uninitialized(NVMLError):
    pass


_machine: dict[str, Any] | None = None


def nvmlInit() -> None:
    global _machine
    text = os.environ.get("PRETEND_CARDS")
    if text is None:
        raise NVMLError_LibraryNotFound("NVML Shared Library Not Found")
    _machine = json.loads(text)


def nvmlShutdown() -> None:
    global _machine
    _machine = None


def _asked() -> dict[str, Any]:
    if _machine is None:
        raise NVMLError_Uninitialized("Uninitialized")
    return _machine


def nvmlSystemGetDriverVersion() -> str:
    return str(_asked()["driver"])


def nvmlSystemGetCudaDriverVersion_v2() -> int:
    return int(_asked()["cuda"])


def nvmlDeviceGetCount() -> int:
    return len(_asked()["cards"])


def nvmlDeviceGetHandleByIndex(index: int) -> Any:
    return _asked()["cards"][index]


def nvmlDeviceGetName(handle: Any) -> str:
    return str(handle["name"])


def nvmlDeviceGetUUID(handle: Any) -> str:
    return str(handle["uuid"])


def nvmlDeviceGetMemoryInfo(handle: Any) -> Any:
    total, free = handle["total"], handle["free"]
    return SimpleNamespace(total=total, free=free, used=total - free)


def nvmlDeviceGetCudaComputeCapability(handle: Any) -> tuple[int, int]:
    major, minor = handle["capability"]
    return major, minor


def nvmlDeviceGetMigMode(handle: Any) -> list[int]:
    if handle.get("mig") is None:
        raise NVMLError_NotSupported("Not Supported")
    return [int(bool(handle["mig"])), int(bool(handle["mig"]))]


def nvmlDeviceGetMaxMigDeviceCount(handle: Any) -> int:
    return 7


def nvmlDeviceGetMigDeviceHandleByIndex(handle: Any, index: int) -> Any:
    if index >= len(handle["mig"]):
        raise NVMLError_NotFound("Not Found")
    return {"name": f"{handle['name']} MIG", **handle["mig"][index]}
