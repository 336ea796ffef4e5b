"""The card's kernels compiled ahead of time, their machine code read: test_gpu_kernels.py starts this program.

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
from glmchat.engine.gpu.choose import TOP
from glmchat.engine.gpu.step import ADD_BLOCK, ATTEND_BLOCK, MERGE_BLOCK, SPLIT
from glmchat.engine.gpu.words import BLOCK

TOOLS = Path(next(iter(nvidia.__path__))) / "bin"
MOST_REGISTERS = {"product": 128}  # others have few programs: as many as there are
POINTERS = {"words": "*i32", "pairs": "*fp16", "state": "*i32", "marks": "*u8", "best": "*i64"}
NUMBERS = {
    **dict.fromkeys(("inputs", "outputs", "capacity", "splits", "rows", "vocab", "programs", "size"), "i32"),
    **dict.fromkeys(("eps", "alpha", "scale"), "fp32"),
}
ALIGNED = ("inputs", "outputs", "capacity", "size")  # multiples of 16 in every model
PRODUCT: dict[str, Any] = {
    "BFLOAT": False, "GROUP": 128, "GROUPS": 32, "KEEP_NORMED": 0, "HAS_BIAS": True, "HAS_RESIDUAL": True, "RANK": 0,
    "RANK_BLOCK": 1, "OUT_PLANES": 8, "RESIDUAL_PLANES": 8, "BLOCK": BLOCK, "DEPENDENT": False,
}  # fmt: skip
ATTEND: dict[str, Any] = {
    "D": 128, "D_BLOCK": 128, "ROTATED": 64, "WIDE": False, "SPLIT": SPLIT, "BLOCK": ATTEND_BLOCK, "DEPENDENT": False,
}  # fmt: skip
EMBED: dict[str, Any] = {
    "BFLOAT": False, "GROUP": 128, "GROUPS": 32, "HAS_POSITIONS": False, "OUT_PLANES": 8, "BLOCK": 256,
    "DEPENDENT": False,
}  # fmt: skip


def compiled(kernel: str, capability: int, cache: str, constants: dict[str, Any]) -> tuple[bytes, str]:
    """Machine code, and PTX."""
    function = getattr(kernels, kernel)
    names = function.arg_names
    given = {
        **NUMBERS,
        **POINTERS,
        "keys": cache,
        "values": cache,
        "out": cache,
        **dict.fromkeys(constants, "constexpr"),
    }
    kinds = {name: given.get(name, "*fp32") for name in names}
    aligned = [name for name in names if kinds[name].startswith("*") or name in ALIGNED]
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    made = triton.compile(ASTSource(function, kinds, constants, hints), target=GPUTarget("cuda", capability, 32))
    return bytes(made.asm["cubin"]), str(made.asm["ptx"])


def told(flag: str, cubin: Path) -> str:
    return subprocess.run([TOOLS / "cuobjdump", flag, cubin], capture_output=True, text=True, check=True).stdout


def check(kernel: str, capability: int, base: dict[str, Any], *, cache: str = "*fp16", **changes: Any) -> None:
    constants = {**base, **changes}
    what = (kernel, capability, changes)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        code, ptx = compiled(kernel, capability, cache, constants)
        cubin.write_bytes(code)
        listing, usage = told("-sass", cubin), told("-res-usage", cubin)
    registers = max(int(count) for count in re.findall(r"REG:(\d+)", usage))
    print(*what, "registers", registers, file=sys.stderr)
    assert not re.findall(r"\b(?:STL|LDL)\b", listing), (what, "registers spill")
    assert registers <= MOST_REGISTERS.get(kernel, 255), (what, registers)
    if kernel in ("product", "unpack"):
        assert re.findall(r"\bLDG\S*\.128", listing), (what, "no load of 16 bytes")
    if kernel == "unpack":
        assert re.findall(r"\bSTG\S*\.128", listing), (what, "no store of 16 bytes")
    assert ("griddepcontrol.wait" in ptx) == constants.get("DEPENDENT", False), what


def check_all(number: int) -> None:
    dot = "*fp16" if number < 80 else "*bf16"
    attend = {**ATTEND, "BLOCK": 16} if number < 80 else ATTEND  # as step.attend_block has it
    check("product", number, PRODUCT, BITS=4, NORM=1, GATED=True, ACTIVATION=1, ROWS=4)
    check("product", number, PRODUCT, BITS=4, NORM=0, GATED=False, ACTIVATION=0, ROWS=8)
    check("product", number, PRODUCT, BITS=4, NORM=2, GATED=False, ACTIVATION=2, ROWS=8, GROUP=32, GROUPS=128)
    check("product", number, PRODUCT, BITS=8, NORM=1, GATED=False, ACTIVATION=0, ROWS=8, GROUP=4096, GROUPS=1)
    check("product", number, PRODUCT, BITS=16, NORM=1, GATED=True, ACTIVATION=1, ROWS=8, BFLOAT=number >= 80)
    check("product", number, PRODUCT, BITS=32, NORM=0, GATED=False, ACTIVATION=0, ROWS=4, RANK=8, RANK_BLOCK=8)
    shared = {"HEADS": 32, "KV_HEADS": 2, "GROUP": 16, "GROUP_BLOCK": 16, "ROTARY": 2, "NORMED": False}
    alone = {"HEADS": 32, "KV_HEADS": 32, "GROUP": 1, "GROUP_BLOCK": 1, "ROTARY": 3, "NORMED": False}
    normed = {"HEADS": 32, "KV_HEADS": 8, "GROUP": 4, "GROUP_BLOCK": 16, "ROTARY": 1, "NORMED": True}
    check("attend", number, attend, cache=dot, BY_HEAD=False, **shared)
    check("attend", number, attend, cache="*fp16", BY_HEAD=True, **alone)
    check("attend", number, attend, cache=dot, BY_HEAD=False, **{**normed, "ROTATED": 128})
    merged = {"HEADS": 32, "D": 128, "D_BLOCK": 128, "SPLIT": SPLIT, "OUT_PLANES": 8, "BLOCK": MERGE_BLOCK}
    check("merge", number, {**merged, "DEPENDENT": False})
    added = {"OUT_PLANES": 8, "RESIDUAL_PLANES": 8, "BLOCK": ADD_BLOCK, "DEPENDENT": number >= 90}
    check("add_normed", number, added)
    for bits in (4, 8, 16):
        check("embed", number, EMBED, BITS=bits)
    for bits in (4, 8):
        check("unpack", number, {"BITS": bits, "GROUP": 128, "GROUPS": 32, "ROWS": 4, "BLOCK": 256}, cache=dot)
    check("candidates", number, {"TOP": TOP, "BLOCK": 1024, "DEPENDENT": False})
    check("choose_best", number, {"TOP": TOP, "PROGRAMS_BLOCK": 64, "BLOCK": 4096, "DEPENDENT": False})
    if number >= 90:
        check("product", number, PRODUCT, BITS=4, NORM=1, GATED=True, ACTIVATION=1, ROWS=4, DEPENDENT=True)
        check("attend", number, attend, cache=dot, BY_HEAD=False, DEPENDENT=True, **shared)
        check("choose_best", number, {"TOP": TOP, "PROGRAMS_BLOCK": 64, "BLOCK": 4096, "DEPENDENT": True})


if __name__ == "__main__":
    check_all(int(sys.argv[1]))
    print("compiled")
