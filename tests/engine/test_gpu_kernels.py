"""The card's kernels and steps without a card: numbers in Triton's interpreter, code through its compiler.

Covers engine/gpu/kernels.py, engine/gpu/words.py, engine/gpu/step.py and engine/models/parts.py.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (torch's CPU builds come without it)"
)
HERE = Path(__file__).resolve().parent


def run(script: str, *names: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-P", str(HERE / script), *names],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
        cwd="/",
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


@pytest.mark.parametrize("name", ["products", "attention", "lookups", "sums", "choice", "layers"])
def test_a_kernel_gives_the_numbers_of_its_definition(name: str) -> None:
    assert run("kernel_checks.py", name, TRITON_INTERPRET="1") == ["right"]


@pytest.mark.parametrize("names", ["chatglm:4 gpt2", "chatglm2:8+lora+prefix qwen3:4+lora", "glm4:4"])
def test_a_step_is_the_models_own_forward(names: str) -> None:
    assert run("step_checks.py", *names.split(), TRITON_INTERPRET="1") == ["right"]


def test_steps_of_several_cards_give_the_bits_of_one() -> None:
    assert run("step_checks.py", "chatglm:4+chain", TRITON_INTERPRET="1") == ["right"]


@pytest.mark.parametrize("capabilities", ["75 90", "80 89", "86 120"])
def test_kernels_are_compiled_to_wide_loads_without_spills(capabilities: str) -> None:
    """Turing, Ampere, Ada, Hopper, Blackwell: weights by 16 bytes, nothing in local memory, registers bounded; from
    Hopper on, dependent launch."""
    assert run("kernel_compiles.py", *capabilities.split()) == ["compiled"]
