"""The card's kernels compiled ahead of time, their machine code read: test_gpu_kernels.py starts this program.

`python -P kernel_compiles.py CAPABILITY ...`: nothing runs, so no card is needed. Turing, which has sizes of its own,
gets all forms of the kernels; among the others they are dealt out, each to every second one. `every` beside the
capabilities compiles all forms for each (four minutes).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
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

CAPABILITIES = (75, 80, 86, 89, 90, 120)
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


def check(kernel: str, capability: int, base: dict[str, Any], *, cache: str = "*fp16", **changes: Any) -> None:
    constants = {**base, **changes}
    what = (kernel, capability, changes)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        code, ptx = compiled(kernel, capability, cache, constants)
        cubin.write_bytes(code)
        command = [TOOLS / "cuobjdump", "-sass", "-res-usage", cubin]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = max(int(count) for count in re.findall(r"REG:(\d+)", listing))
    print(*what, "registers", registers, file=sys.stderr)
    assert not re.findall(r"\b(?:STL|LDL)\b", listing), (what, "registers spill")
    assert registers <= MOST_REGISTERS.get(kernel, 255), (what, registers)
    if kernel in ("product", "unpack"):
        assert re.findall(r"\bLDG\S*\.128", listing), (what, "no load of 16 bytes")
    if kernel == "unpack":
        assert re.findall(r"\bSTG\S*\.128", listing), (what, "no store of 16 bytes")
    assert ("griddepcontrol.wait" in ptx) == constants.get("DEPENDENT", False), what


Form = tuple[str, dict[str, Any], dict[str, Any]]  # kernel, base, changes


def forms(number: int) -> Iterator[Form]:
    """Of every kernel, for this capability."""

    def form(kernel: str, base: dict[str, Any], **changes: Any) -> Form:
        return kernel, base, changes

    dot = "*fp16" if number < 80 else "*bf16"
    attend = {**ATTEND, "BLOCK": 16} if number < 80 else ATTEND  # as step.attend_block has it
    yield form("product", PRODUCT, BITS=4, NORM=1, GATED=True, ACTIVATION=1, ROWS=4)
    yield form("product", PRODUCT, BITS=4, NORM=0, GATED=False, ACTIVATION=0, ROWS=8)
    yield form("product", PRODUCT, BITS=4, NORM=2, GATED=False, ACTIVATION=2, ROWS=8, GROUP=32, GROUPS=128)
    yield form("product", PRODUCT, BITS=8, NORM=1, GATED=False, ACTIVATION=0, ROWS=8, GROUP=4096, GROUPS=1)
    yield form("product", PRODUCT, BITS=16, NORM=1, GATED=True, ACTIVATION=1, ROWS=8, BFLOAT=number >= 80)
    yield form("product", PRODUCT, BITS=32, NORM=0, GATED=False, ACTIVATION=0, ROWS=4, RANK=8, RANK_BLOCK=8)
    shared = {"HEADS": 32, "KV_HEADS": 2, "GROUP": 16, "GROUP_BLOCK": 16, "ROTARY": 2, "NORMED": False}
    alone = {"HEADS": 32, "KV_HEADS": 32, "GROUP": 1, "GROUP_BLOCK": 1, "ROTARY": 3, "NORMED": False}
    normed = {"HEADS": 32, "KV_HEADS": 8, "GROUP": 4, "GROUP_BLOCK": 16, "ROTARY": 1, "NORMED": True}
    yield form("attend", attend, cache=dot, BY_HEAD=False, **shared)
    yield form("attend", attend, cache="*fp16", BY_HEAD=True, **alone)
    yield form("attend", attend, cache=dot, BY_HEAD=False, **{**normed, "ROTATED": 128})
    merged = {"HEADS": 32, "D": 128, "D_BLOCK": 128, "SPLIT": SPLIT, "OUT_PLANES": 8, "BLOCK": MERGE_BLOCK}
    yield form("merge", {**merged, "DEPENDENT": False})
    added = {"OUT_PLANES": 8, "RESIDUAL_PLANES": 8, "BLOCK": ADD_BLOCK, "DEPENDENT": number >= 90}
    yield form("add_normed", added)
    for bits in (4, 8, 16):
        yield form("embed", EMBED, BITS=bits)
    for bits in (4, 8):
        yield form("unpack", {"BITS": bits, "GROUP": 128, "GROUPS": 32, "ROWS": 4, "BLOCK": 256}, cache=dot)
    yield form("candidates", {"TOP": TOP, "BLOCK": 1024, "DEPENDENT": False})
    yield form("choose_best", {"TOP": TOP, "PROGRAMS_BLOCK": 64, "BLOCK": 4096, "DEPENDENT": False})
    if number >= 90:
        yield form("product", PRODUCT, BITS=4, NORM=1, GATED=True, ACTIVATION=1, ROWS=4, DEPENDENT=True)
        yield form("attend", attend, cache=dot, BY_HEAD=False, DEPENDENT=True, **shared)
        yield form("choose_best", {"TOP": TOP, "PROGRAMS_BLOCK": 64, "BLOCK": 4096, "DEPENDENT": True})


def check_all(number: int, *, every: bool) -> None:
    turn, seen = CAPABILITIES.index(number), Counter[str]()
    for kernel, base, changes in forms(number):
        if every or number < 80 or (seen[kernel] + turn) % 2 == 0:
            check(kernel, number, base, **changes)
        seen[kernel] += 1


if __name__ == "__main__":
    names = sys.argv[1:]
    for capability in [name for name in names if name != "every"]:
        check_all(int(capability), every="every" in names)
    print("compiled")
