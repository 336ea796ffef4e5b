"""Two kernels that measure the card itself: one that does nothing, and one that reads as fast as can be."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def nothing(out, DEPENDENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a node of a graph costs. DEPENDENT: launched before the one ahead of it has ended (Hopper and later)."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit  # type: ignore[untyped-decorator]
def read(words, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program reads every n-th block of int32 words, 16 bytes a thread, and writes one number."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(program * BLOCK, count, programs * BLOCK):
        total = total ^ tl.load(words + start + tl.arange(0, BLOCK))
    tl.store(out + program, tl.sum(total))
