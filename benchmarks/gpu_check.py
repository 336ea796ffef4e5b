"""Everything that is to be known of glmchat on an NVIDIA card, in under eight minutes:

    python benchmarks/gpu_check.py --out DIR

First whether it is right: recorded answers of the original programs, random networks against float32, graph against
eager bit for bit, replays. Then how fast: the card's own ceilings, each kernel, attention, tokens, prompts, loads,
quantising, other programs beside it. A prediction stands beside each figure; all figures are shares of what this run
measured on this card. Rows are written to DIR/rows.jsonl one by one, the table is printed last and kept in
DIR/table.md. The exit status is 1 if something is wrong.

It needs torch, triton, numpy and safetensors, the checkout that it lies in, and the recorded answers (--reference).
Every step is a process of its own: one that breaks the card's context, hangs or takes too long costs only itself.

Without a card: TRITON_INTERPRET=1 python benchmarks/gpu_check.py --device cpu --tiny --out DIR runs the kernels in
Triton's interpreter; the tests do, and on a pretend card too.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_run import ROOT, Run, make_importable, rows_of

# name, module, function, seconds of 470
STEPS = (
    ("right", "gpu_right", "right", 40),
    ("networks", "gpu_right", "networks", 55),
    ("ceilings", "gpu_kernels", "ceilings", 20),
    ("products", "gpu_kernels", "products", 60),
    ("attention", "gpu_kernels", "attention", 25),
    ("decode", "gpu_models", "decode", 90),
    ("prompts", "gpu_models", "prompts", 25),
    ("loading", "gpu_models", "loading", 35),
    ("peers", "gpu_peers", "peers", 85),
    ("forms", "gpu_right", "forms", 35),
)
WHOLE = sum(seconds for *_, seconds in STEPS)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for rows.jsonl, table.md and logs")
    parser.add_argument("--seconds", type=float, default=470, help="for everything together")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N; without a card: cpu, fakegpu")
    parser.add_argument("--reference", type=Path, default=ROOT.parent / "shared" / "reference" / "chatglm",
                        help="the recorded answers")  # fmt: skip
    parser.add_argument("--only", nargs="*", metavar="STEP", help=f"of {', '.join(name for name, *_ in STEPS)}")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, all in this process: does the script run?")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_step(given: argparse.Namespace, name: str, seconds: float) -> None:
    name, _, family = name.partition(" ")
    run = Run(given.device, given.out, given.reference, "networks" if family else name, seconds, tiny=given.tiny)
    if family:
        import_module("gpu_right").family(run, family)
        return
    _, module, function, _ = next(step for step in STEPS if step[0] == name)
    getattr(import_module(module), function)(run)


def start_step(given: argparse.Namespace, name: str, seconds: float) -> None:
    """The step in a child, ended when its time is over; what went wrong is a row."""
    log = given.out / f"{name}.log"
    command = [sys.executable, __file__, "--step", name, "--out", str(given.out), "--device", given.device,
               "--reference", str(given.reference), "--seconds", str(seconds)]  # fmt: skip
    with log.open("w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: int | None = child.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    print(log.read_text(errors="replace"), end="", flush=True)
    told = Run("none", given.out, given.reference, name, 0, tiny=False)
    if status is None:
        told.skip("the rest", f"it took more than its {seconds:.0f} s")
    elif status:
        last = ([line for line in log.read_text(errors="replace").splitlines() if line.strip()] or [""])[-1]
        told.row("the step itself", last[:200], "", predicted="ends", verdict="FAILED")


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| step | row | value | predicted | verdict |", "|---|---|---|---|---|"]
    for row in rows:
        value, predicted = (
            f"{number:.4g}" if isinstance(number, float) else "" if number is None else str(number)
            for number in (row["value"], row.get("predicted"))
        )
        more = ", ".join(
            f"{key} {value:.4g}" for key, value in row.items()
            if isinstance(value, int | float) and key not in ("value", "predicted")
        )  # fmt: skip
        shown = f"{value} {row['unit']}".strip() + (f" ({more})" if more else "")
        lines.append(f"| {row['step']} | {row['row']} | {shown} | {predicted} | {row.get('verdict', '')} |")
    return "\n".join(lines)


def main() -> int:
    given = arguments()
    given.out = given.out.absolute()
    given.out.mkdir(parents=True, exist_ok=True)
    make_importable(given.out / "package")
    os.environ.setdefault("GLMCHAT_HOME", str(given.out / "home"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(given.out / "triton"))
    if given.step:
        run_step(given, given.step, given.seconds)
        return 0
    (given.out / "rows.jsonl").unlink(missing_ok=True)
    chosen = [step for step in STEPS if given.only is None or step[0] in given.only]
    started, behind = time.perf_counter(), 0
    for name, _, _, seconds in chosen:
        behind += seconds  # what a step leaves over is the next one's
        share = given.seconds * behind / max(WHOLE if given.only is None else sum(s for *_, s in chosen), 1)
        left = share - (time.perf_counter() - started)
        if given.tiny:
            run_step(given, name, 600)
        else:
            start_step(given, name, max(left, 1.0))
    rows = rows_of(given.out)
    text = table(rows)
    (given.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print("\n" + text)
    wrong = [row for row in rows if row.get("verdict") in ("WRONG", "FAILED")]
    judged = [row for row in rows if row.get("verdict") in ("as predicted", "better", "MISSED")]
    print(f"\n{len(wrong)} wrong, {sum(row['verdict'] == 'MISSED' for row in judged)} of {len(judged)} figures missed, "
          f"{time.perf_counter() - started:.0f} s")  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
