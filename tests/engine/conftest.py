"""What the engine's tests share: tiny checkpoints with random weights in the original format."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from glmchat.engine.native import cpu

ROOT = Path(__file__).resolve().parents[2]


def module_at(path: Path) -> ModuleType:
    """A file that is in no package, under its own name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def random_checkpoints() -> ModuleType:
    """benchmarks/random_checkpoints.py: `write_checkpoint(folder, tiny(NAME, **changes))`."""
    return module_at(ROOT / "benchmarks" / "random_checkpoints.py")


@pytest.fixture(scope="session")
def builders() -> ModuleType:
    """engine_builders.py beside this file: tiny Llama folders and GGUF files."""
    return module_at(Path(__file__).with_name("engine_builders.py"))


@pytest.fixture(scope="session")
def step_checks() -> ModuleType:
    """step_checks.py beside this file: tiny networks as a card holds them."""
    return module_at(Path(__file__).with_name("step_checks.py"))


def _instruction_sets() -> list[str]:
    """Those of the C kernel that this processor has, the best first; none without the kernel."""
    if cpu.NativeCpu().unavailable() is not None:
        return []
    names = ("avx512amx", "avx512vnni", "avx512", "avx2", "portable")
    found = [name for name in names if cpu.choose_instructions(name)]
    cpu.choose_instructions()
    return found


@pytest.fixture(params=_instruction_sets())
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    cpu.choose_instructions(request.param)
    yield request.param
    cpu.choose_instructions()
