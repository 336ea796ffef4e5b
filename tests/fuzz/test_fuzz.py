"""Readers of strangers' bytes end in an error of the tree or in success: no traceback, no signal, no hang, no growth.

The inputs are the same each time: those of seed 1, and what was once found (`found/README.md`). An hour of each target
is run by benchmarks/fuzz.py, which also does the work here, in one process of its own whose children may die.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOUND = sorted((ROOT / "tests" / "fuzz" / "found").glob("*.bin"))
# Inputs of each target: what fits into about a second of a slow machine.
INPUTS = {
    "gguf": 60, "safetensors": 150, "pickle": 200, "tokenizer": 20, "vocabulary": 30, "adapter": 100, "config": 40,
    "index": 150, "template": 12, "manifest": 60, "lock": 400, "toml": 200, "http": 100, "sse": 30, "reply": 60,
    "hub": 60, "mirror": 100, "history": 40, "lines": 40, "database": 15, "wire": 300,
}  # fmt: skip


def run(*arguments: str) -> list[dict[str, Any]]:
    """Lines of JSON that the fuzzer prints."""
    command = [sys.executable, "-P", str(ROOT / "benchmarks" / "fuzz.py"), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    counts = [f"{name}={count}" for name, count in INPUTS.items()]
    return {report["target"]: report for report in run("--counts", *counts)}


@pytest.fixture(scope="module")
def verdicts() -> dict[str, dict[str, Any]]:
    return {report["file"]: report for report in run("--found", *map(str, FOUND))}


@pytest.mark.parametrize("target", INPUTS)
def test_mutated_inputs_are_read_or_refused(target: str, reports: dict[str, dict[str, Any]]) -> None:
    report = reports[target]
    assert report["findings"] == [], words(report["findings"])
    assert report["inputs"] == INPUTS[target]
    assert report["accepted"] > 0, "every input was refused: the good ones are not good"


@pytest.mark.parametrize("file", FOUND, ids=lambda file: file.stem)
def test_what_was_once_found_is_right_now(file: Path, verdicts: dict[str, dict[str, Any]]) -> None:
    verdict = verdicts[file.name]
    assert verdict["kind"] is None, verdict["words"]


def words(findings: Sequence[dict[str, Any]]) -> str:
    return "\n\n".join(f"input {f['number']}: {f['kind']}\n{f['words'][-1500:]}" for f in findings)


def test_every_file_that_was_found_is_explained() -> None:
    told = (ROOT / "tests" / "fuzz" / "found" / "README.md").read_text(encoding="utf-8")
    assert [file.name for file in FOUND if f"`{file.stem}`" not in told] == []


def test_the_bounds_are_seen_by_the_one_who_looks(tmp_path: Path) -> None:
    """A check of the check: a reader that raises, aborts, hangs or grows is found, and said to do that. One that took
    as long because the machine stood still is not."""
    code = f"""
import json, os, signal, sys, threading, time
sys.path.insert(0, {str(ROOT / "tests" / "fuzz")!r})
import trials
trials.SECONDS, trials.STALL = 1.0, 2.0
held = []
def reader(data, folder):
    if data == b"raise":
        raise TypeError("no error of the tree")
    if data == b"abort":
        os.abort()
    if data == b"hang":
        threading.Event().wait()
    while data == b"spin":
        pass
    if data == b"grow":
        held.append(bytearray(os.urandom(1)) * (350 << 20))
    if data == b"frozen":
        os.kill(os.getppid(), signal.SIGSTOP)  # with its watcher, as a machine that stands still stops both
        time.sleep(trials.STALL * 2)
        os.kill(os.getppid(), signal.SIGCONT)
found = {{word: trials.try_one(reader, word.encode()) for word in sys.argv[1:]}}
print(json.dumps({{word: finding and [finding.kind, finding.words] for word, finding in found.items()}}))
"""
    words = ["raise", "abort", "hang", "spin", "grow", "frozen", ""]
    command = [sys.executable, "-P", "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    kinds = {word: finding and finding[0] for word, finding in found.items()}
    assert kinds == dict(zip(words, ["traceback", "crash", "hang", "hang", "memory", None, None], strict=True))
    assert "asleep" in found["hang"][1] and "in reader" in found["hang"][1]
    assert "of the processor" in found["spin"][1] and "in reader" in found["spin"][1]
