"""The Triton kernel without a GPU: its numbers in Triton's interpreter, its code through Triton's compiler."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (torch's CPU builds come without it)"
)

_NUMBERS = """
import torch
from glmchat.engine.quantize import triton_kernel
from glmchat.engine.quantize.kernels import Shape
from glmchat.engine.quantize.reference import Reference
noise = torch.Generator().manual_seed(1)
cases = ((4, 1, 70, 128, 32), (4, 17, 64, 256, 128), (8, 3, 96, 96, 96), (8, 2, 64, 128, 32))
for bits, rows, outputs, inputs, group in cases:
    shape = Shape(outputs, inputs, bits, group)
    low, high, kind = (0, 16, torch.uint8) if bits == 4 else (-128, 128, torch.int8)
    codes = torch.randint(low, high, (outputs, inputs), generator=noise, dtype=torch.int16).to(kind)
    scale = (torch.rand(outputs, shape.groups, generator=noise) * 0.01).half().float()
    packed = Reference().pack(shape, codes, scale, -8 * scale if bits == 4 else None)
    x = torch.randn(rows, inputs, generator=noise).half()
    found = triton_kernel.run(x, packed["codes"], packed["scale"], packed.get("minimum"), bits, group)
    expected = x.double() @ Reference().rows(shape, packed, torch.arange(outputs)).double().T
    error = float((found - expected).abs().max() / expected.abs().max())
    assert error < 2e-3, (bits, rows, outputs, inputs, group, error)
print("same")
"""

_COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from glmchat.engine.quantize import triton_kernel as k
kinds = {"x": "*fp16", "codes": "*u8", "scale": "*fp16", "low": "*fp16", "y": "*fp32",
         "rows": "i32", "outputs": "i32", "inputs": "i32", "group": "i32"}
for capability in (75, 80, 90):
    for bits in (4, 8):
        constants = {"BITS": bits, "ROWS": k.ROWS, "OUTPUTS": k.OUTPUTS, "HALF": k.HALF}
        signature = {**kinds, "codes": "*u8" if bits == 4 else "*i8", **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(k.multiply, signature, constants)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert made.asm["cubin"][:4] == b"\\x7fELF", capability
print("compiled")
"""


def run(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        cwd="/",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_the_interpreter_gives_the_numbers_of_the_reference() -> None:
    assert run(_NUMBERS, TRITON_INTERPRET="1") == "same"


def test_it_compiles_ahead_of_time_for_turing_ampere_and_hopper(tmp_path: os.PathLike[str]) -> None:
    assert run(_COMPILED, TRITON_CACHE_DIR=str(tmp_path)) == "compiled"
