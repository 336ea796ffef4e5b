"""The card's product compiled ahead of time, its machine code read: test_gpu_kernels.py starts this program.

`python -P kernel_compiles.py CAPABILITY`: nothing runs, so no card is needed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from glmchat.engine.gpu import kernels
from glmchat.engine.gpu.words import BLOCK

TOOLS = Path(next(iter(nvidia.__path__))) / "bin"
MOST_REGISTERS = 128
POINTERS = {"words": "*i32", "pairs": "*fp16"}
NUMBERS = {"inputs": "i32", "outputs": "i32", "eps": "fp32", "alpha": "fp32"}
FORM: dict[str, Any] = {
    "BFLOAT": False, "GROUP": 128, "GROUPS": 32, "KEEP_NORMED": 0, "HAS_BIAS": True, "HAS_RESIDUAL": True, "RANK": 0,
    "RANK_BLOCK": 1, "OUT_PLANES": 8, "RESIDUAL_PLANES": 8, "BLOCK": BLOCK,
}  # fmt: skip


def compiled(capability: int, **constants: Any) -> bytes:
    names = kernels.product.arg_names
    given = {**NUMBERS, **POINTERS, **dict.fromkeys(constants, "constexpr")}
    kinds = {name: given.get(name, "*fp32") for name in names}
    aligned = [name for name in names if kinds[name].startswith("*") or name in ("inputs", "outputs")]
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    made = triton.compile(ASTSource(kernels.product, kinds, constants, hints), target=GPUTarget("cuda", capability, 32))
    return bytes(made.asm["cubin"])


def told(flag: str, cubin: Path) -> str:
    return subprocess.run([TOOLS / "cuobjdump", flag, cubin], capture_output=True, text=True, check=True).stdout


def check(capability: int, **constants: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "product.cubin"
        cubin.write_bytes(compiled(capability, **FORM, **constants))
        code, usage = told("-sass", cubin), told("-res-usage", cubin)
    wide = re.findall(r"\bLDG\S*\.128", code)
    assert wide, (capability, constants, "no load of 16 bytes")
    assert not re.findall(r"\b(?:STL|LDL)\b", code), (capability, constants, "registers spill")
    registers = max(int(count) for count in re.findall(r"REG:(\d+)", usage))
    assert registers <= MOST_REGISTERS, (capability, constants, registers)


if __name__ == "__main__":
    number = int(sys.argv[1])
    check(number, BITS=4, NORM=1, GATED=True, ACTIVATION=1, ROWS=4)
    check(number, BITS=4, NORM=0, GATED=False, ACTIVATION=0, ROWS=8)
    check(number, BITS=8, NORM=1, GATED=False, ACTIVATION=0, ROWS=8)
    check(number, BITS=16, NORM=0, GATED=False, ACTIVATION=0, ROWS=8)
    print("compiled")
