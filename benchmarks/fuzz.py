"""Throws mutated inputs at every reader of glmchat: files, requests, replies, lines. Exit code 1 if one was found.

    python -P benchmarks/fuzz.py                              20 s of each target
    python -P benchmarks/fuzz.py --seconds 3600 --target gguf
    python -P benchmarks/fuzz.py --counts gguf=60 lock=400    so many inputs, the same each time, as `make test` has it
    python -P benchmarks/fuzz.py --found FILE …               files named TARGET-….bin, one by one
    python -P benchmarks/fuzz.py --target gguf --number 1234  one input again, with its traceback
    python -P benchmarks/fuzz.py --save FOLDER                what was found, as files: TARGET-SEED-NUMBER.bin and .txt

Source of the inputs: tests/fuzz/mutation.py; what counts as found: tests/fuzz/trials.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "fuzz"))
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1")

import good_inputs  # noqa: E402

good_inputs.extend_path()

import file_targets  # noqa: E402
import wire_targets  # noqa: E402
from trials import Finding, Report, Target, input_of, search, try_one  # noqa: E402

TARGETS: tuple[Target, ...] = (*file_targets.TARGETS, *wire_targets.TARGETS)
HEAD = "| target | inputs | read | seconds | peak MB | crashes | hangs | tracebacks | memory |\n" + "|---" * 9 + "|"


def row(report: Report) -> str:
    kinds = (report.count(kind) for kind in ("crash", "hang", "traceback", "memory"))
    sizes = (f"{report.inputs:,}", f"{report.accepted:,}", f"{report.seconds:.0f}", f"{report.peak / 2**20:.0f}")
    return f"| {report.target} | {' | '.join((*sizes, *map(str, kinds)))} |"


def as_json(report: Report) -> str:
    found = [{"kind": f.kind, "number": f.number, "words": f.words} for f in report.findings]
    facts = {
        "target": report.target,
        "inputs": report.inputs,
        "accepted": report.accepted,
        "seconds": round(report.seconds, 2),
    }
    return json.dumps({**facts, "peak": report.peak, "findings": found})


def save(folder: Path, report: Report, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for finding in report.findings:
        name = f"{report.target}-{seed}-{finding.number}"
        (folder / f"{name}.bin").write_bytes(finding.data)
        again = f"python -P benchmarks/fuzz.py --target {report.target} --seed {seed} --number {finding.number}"
        (folder / f"{name}.txt").write_text(f"{finding.kind}\n{again}\n\n{finding.words}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", action="append", choices=[target.name for target in TARGETS])
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--counts", nargs="+", default=[], metavar="TARGET=INPUTS")
    parser.add_argument("--found", nargs="+", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--number", type=int, help="of one input, with --target")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    chosen = [target for target in TARGETS if not options.target or target.name in options.target]
    if options.number is not None:
        return again(chosen[0], options.seed, options.number)
    if options.found is not None:
        return judge(options.found)
    counts = {name: int(count) for name, _, count in (word.partition("=") for word in options.counts)}
    seconds = options.seconds or (None if counts else 20.0)
    if not options.json:
        print(HEAD)
    clean = True
    for target in chosen:
        if counts and target.name not in counts:
            continue
        with warnings.catch_warnings(action="ignore"):
            report = search(target, seed=options.seed, inputs=counts.get(target.name), seconds=seconds)
        clean = clean and not report.findings
        print(as_json(report) if options.json else row(report), flush=True)
        for finding in report.findings:
            print(f"{target.name} {finding.number}: {finding.kind}\n{finding.words}", file=sys.stderr, flush=True)
        if options.save is not None:
            save(options.save, report, options.seed)
    return 0 if clean else 1


def judge(files: Sequence[Path]) -> int:
    """One line of JSON for each: what it was found to do, or null."""
    by_name = {target.name: target for target in TARGETS}
    clean = True
    for file in files:
        target = by_name[file.name.partition("-")[0]]
        target.load()
        finding = try_one(target.check, file.read_bytes())
        clean = clean and finding is None
        facts = {"kind": finding and finding.kind, "words": finding.words if finding else ""}
        print(json.dumps({"file": file.name, **facts}), flush=True)
    return 0 if clean else 1


def again(target: Target, seed: int, number: int) -> int:
    target.load()
    data = input_of(target, target.seeds(), seed, number)
    sys.stdout.buffer.write(data[:4000] + b"\n")
    sys.stdout.flush()
    finding: Finding | None = try_one(target.check, data)
    print("nothing" if finding is None else f"{finding.kind}: {finding.words}")
    return 0 if finding is None else 1


if __name__ == "__main__":
    sys.exit(main())
