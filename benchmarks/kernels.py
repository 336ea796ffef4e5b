"""Speed of the packed products on this machine: GB/s at few rows, GFLOP/s at many, beside torch's own operators.

    python benchmarks/kernels.py [--threads 1 2] [--rows 16384 --columns 4096] [--repeat 40] [--instructions avx512vnni]

Every figure is the best of many runs, so that a busy machine shows what the kernel can do and not what others did. The
read bandwidth is measured in the same run: the sum of 512 MB of float32 with the same number of threads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from glmchat.engine.native.cpu import choose_instructions
from glmchat.engine.quantize.aten import AtenCpu
from glmchat.engine.quantize.kernels import Shape, choose, kernel_report
from glmchat.engine.quantize.linear import QuantLinear


def best(run: Callable[[], object], repeat: int) -> float:
    run()
    found = float("inf")
    for _ in range(repeat):
        started = time.perf_counter()
        run()
        found = min(found, time.perf_counter() - started)
    return found


def bandwidth(repeat: int) -> float:
    values = torch.ones(128 << 20)
    return values.nbytes / best(values.sum, repeat) / 1e9


def layer(rows: int, columns: int, bits: int, group: int) -> QuantLinear:
    noise = torch.Generator().manual_seed(1)
    if bits == 4:
        q = torch.randint(0, 16, (rows, columns), generator=noise, dtype=torch.uint8)
        scale = (torch.rand(rows, columns // group, generator=noise) * 0.01 + 0.005).half().float()
        return QuantLinear.from_int4(q, scale, torch.zeros_like(scale))
    q = torch.randint(-127, 128, (rows, columns), generator=noise, dtype=torch.int8)
    return QuantLinear.from_int8(q, torch.rand(rows, columns // group, generator=noise) * 0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, torch.get_num_threads()])
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=40)
    parser.add_argument("--instructions", help="of glmchat's kernel, instead of the best that this CPU has")
    options = parser.parse_args()
    rows, columns, repeat = options.rows, options.columns, options.repeat
    for report in kernel_report():
        print(f"int{report.bits}: {report.kernel} {dict(report.passed_over) or ''}")
    if options.instructions:
        print(f"measured: {choose_instructions(options.instructions) or parser.error('this CPU has them not')}")
    for threads in dict.fromkeys(options.threads):
        torch.set_num_threads(threads)
        bus = bandwidth(max(5, repeat // 4))
        print(f"\n{threads} threads, read bandwidth {bus:.1f} GB/s, matrix {rows} x {columns}")
        for bits, group in ((4, 32), (4, 64), (4, 128), (8, 32), (8, columns)):
            linear = layer(rows, columns, bits, group)
            line = f"  int{bits} g{group if group != columns else 'row':<4}"
            for count in (1, 2, 4, 8):
                x = torch.randn(count, columns)
                seconds = best(partial(linear, x), repeat)
                line += f"  {count} rows {seconds * 1e3:5.2f} ms"
                if count == 1:
                    speed = linear.nbytes / seconds / 1e9
                    line += f" ({speed:4.1f} GB/s, {100 * speed / bus:3.0f} %)"
            for count in (128, 512):
                x = torch.randn(count, columns)
                seconds = best(partial(linear, x), max(3, repeat // 10))
                line += f"  {count} rows {2 * count * rows * columns / seconds / 1e9:4.0f} GFLOP/s"
            print(line, flush=True)
            linear.multiply_exactly()
            x = torch.randn(128, columns)
            seconds = best(partial(linear, x), max(3, repeat // 10))
            print(f"      exact float32: 128 rows {2 * 128 * rows * columns / seconds / 1e9:4.0f} GFLOP/s", flush=True)
        weight, x = torch.randn(rows, columns), torch.randn(128, columns)
        seconds = best(partial(torch.matmul, x, weight.T), max(3, repeat // 10))
        print(f"  torch float32 dense: 128 rows {2 * 128 * rows * columns / seconds / 1e9:.0f} GFLOP/s")
        aten, shape = AtenCpu(), Shape(rows, columns, 4, 128)
        scale = torch.rand(rows, columns // 128)
        packed = aten.pack(shape, torch.zeros(rows, columns, dtype=torch.uint8), scale, -8 * scale)
        x = torch.randn(1, columns).bfloat16()
        seconds = best(partial(aten.linear, shape, packed, x, None), repeat)
        print(f"  torch int4 g128: 1 row {seconds * 1e3:.2f} ms; chosen here: {choose(shape).name}")


if __name__ == "__main__":
    main()
