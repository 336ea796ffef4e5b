"""Machines with NVIDIA cards, for tests: a driver that tells of them (pretend_nvml) and a torch beside it.

Both are real files that the product reads as it reads NVIDIA's and torch's own, in this process and in children.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from glmchat.core.cards import Card, look
from glmchat.engine.native.cards import start_fault

NVML = Path(__file__).parent / "pretend_nvml"
GB = 10**9


def card(
    name: str = "NVIDIA GeForce RTX 3090",
    capability: tuple[int, int] = (8, 6),
    total: float = 24,
    free: float | None = None,
    number: int = 0,
    mig: Sequence[tuple[float, float]] = (),
) -> dict[str, Any]:
    """total, free: GB. mig: (total, free) of each instance of a card that is cut up."""
    made: dict[str, Any] = {
        "name": name,
        "uuid": f"GPU-{number:08x}-3090",
        "capability": capability,
        "total": int(total * GB),
        "free": int((total if free is None else free) * GB),
    }
    if mig:
        made["mig"] = [
            {"uuid": f"MIG-{number:08x}-{part}", "total": int(size * GB), "free": int(left * GB)}
            for part, (size, left) in enumerate(mig)
        ]
    return made


def described(*cards: Mapping[str, Any], driver: str = "580.95.05", cuda: int = 13000) -> str:
    """What stands in $PRETEND_CARDS."""
    return json.dumps({"driver": driver, "cuda": cuda, "cards": cards})


def torch_with(folder: Path, cuda: str | None = "13.0") -> Path:
    """A folder that holds a torch of which only version.py is there, in the words of a wheel of PyTorch."""
    package = folder / "torch"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("")
    local = "+cpu" if cuda is None else "+cu" + cuda.replace(".", "")
    (package / "version.py").write_text(
        f"from typing import Optional\n\n__version__ = '2.13.0{local}'\ndebug = False\ncuda: Optional[str] = {cuda!r}\n"
    )
    return folder


def _library() -> ModuleType:
    spec = spec_from_file_location("pynvml", NVML / "pynvml.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def become(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *cards: Mapping[str, Any],
    torch_cuda: str | None = "13.0",
    driver: str = "580.95.05",
    cuda: int = 13000,
    visible: str | None = None,
) -> None:
    """This machine has these cards from now on. Without a card: not even a driver."""
    monkeypatch.syspath_prepend(str(torch_with(tmp_path / f"torch-{torch_cuda}", torch_cuda)))
    monkeypatch.setitem(sys.modules, "pynvml", _library())
    if cards:
        monkeypatch.setenv("PRETEND_CARDS", described(*cards, driver=driver, cuda=cuda))
    else:
        monkeypatch.delenv("PRETEND_CARDS", raising=False)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def torch_sees_them(monkeypatch: pytest.MonkeyPatch, fault: str | None = None, fastest_first: bool = False) -> None:
    """The loaded torch answers for these cards as a CUDA build does, but for computing on them.

    fault: what its start raises. fastest_first: it numbers them so, as where CUDA_DEVICE_ORDER is not the bus's.
    """

    def cards() -> list[Card]:
        found = list(look().visible)
        return sorted(found, key=lambda one: one.capability, reverse=True) if fastest_first else found

    def properties(device: Any) -> Any:
        number = device if isinstance(device, int) else torch.device(device).index or 0
        one = cards()[number]
        major, minor = one.capability
        return SimpleNamespace(
            name=one.name, major=major, minor=minor, total_memory=one.total, uuid=one.uuid.partition("-")[2]
        )

    def init() -> None:
        if fault is not None:
            raise RuntimeError(fault)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    codes = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
    for name, answer in {
        "get_arch_list": lambda: codes,
        "is_available": lambda: fault is None,
        "init": init,
        "device_count": lambda: len(cards()),
        "get_device_properties": properties,
        "get_device_capability": lambda device=0: (properties(device).major, properties(device).minor),
        "mem_get_info": lambda device=0: (cards()[torch.device(device).index or 0].free, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    start_fault.cache_clear()
