"""The script that measures a card runs without one: in Triton's interpreter, on the pretend card, and with nothing.

Of benchmarks: gpu_check.py and, through it, gpu_run.py, gpu_right.py, gpu_kernels.py, gpu_models.py and gpu_peers.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
REFUSE = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Refuse())
"""
NOT_THERE = ("transformers", "tokenizers", "sentencepiece", "tiktoken", "platformdirs", "huggingface_hub", "httpx",
             "gguf", "peft", "psutil", "typer", "textual", "uvicorn", "starlette", "jinja2")  # fmt: skip


def check(out: Path, *arguments: str, **environment: str) -> tuple[int, str, list[dict[str, Any]]]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(out), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
        cwd="/",
        timeout=600,
    )
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    return done.returncode, done.stdout + done.stderr, rows


def verdicts(rows: list[dict[str, Any]], step: str) -> list[str]:
    return [row.get("verdict", "") for row in rows if row["step"] == step]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_step_runs_in_tritons_interpreter_with_nothing_but_torch(tmp_path: Path) -> None:
    """The card's machine has torch, triton, numpy and safetensors; whatever else is imported is not there."""
    (tmp_path / "sitecustomize.py").write_text(REFUSE.format(names=NOT_THERE))
    code, said, rows = check(
        tmp_path / "out", "--device", "cpu", "--tiny", TRITON_INTERPRET="1", PYTHONPATH=str(tmp_path)
    )
    assert code == 0, said[-3000:]
    steps = dict.fromkeys(row["step"] for row in rows)
    assert list(steps) == [
        "right", "networks", "ceilings", "products", "attention", "decode", "prompts", "loading", "peers", "forms"
    ]  # fmt: skip
    assert verdicts(rows, "networks") == ["right", "right"]
    assert "wrong" in said.splitlines()[-1]
    assert (tmp_path / "out" / "table.md").read_text().count("\n") == len(rows) + 2


def test_the_recorded_answers_come_from_the_pretend_card(tmp_path: Path, shared: Path) -> None:
    code, said, rows = check(
        tmp_path, "--device", "fakegpu", "--tiny", "--reference", str(shared / "reference" / "chatglm")
    )
    assert code == 0, said[-3000:]
    assert verdicts(rows, "right").count("right") == 8
    assert [row["row"] for row in rows if row["step"] == "loading"]


def test_a_step_that_takes_too_long_is_ended_and_named(tmp_path: Path, shared: Path) -> None:
    code, said, rows = check(
        tmp_path, "--device", "fakegpu", "--only", "right", "--seconds", "1",
        "--reference", str(shared / "reference" / "chatglm"),
    )  # fmt: skip
    assert code == 0, said[-3000:]
    assert rows[-1]["verdict"] == "skipped: it took more than its 1 s"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_the_run_fails_with_the_reason(tmp_path: Path) -> None:
    code, said, rows = check(tmp_path, "--only", "ceilings", "--seconds", "100")
    assert code == 1
    assert rows[-1]["verdict"] == "FAILED", said[-3000:]
    assert "CUDA" in rows[-1]["value"] or "NVIDIA" in rows[-1]["value"]


def test_a_wrong_number_fails_the_run(tmp_path: Path) -> None:
    """The gates can fail: recorded answers that are not this network's are told apart."""
    reference = tmp_path / "reference"
    for name in ("v2", "v2_int4"):
        source = ROOT.parent / "shared" / "reference" / "chatglm" / name
        if not source.is_dir():
            pytest.skip("../shared with the reference vectors is absent")
        (reference / name).mkdir(parents=True)
        for file in source.iterdir():
            other = ROOT.parent / "shared" / "reference" / "chatglm" / "v3" / file.name
            is_golden = file.name.startswith("golden") and name == "v2"
            if file.is_file():
                (reference / name / file.name).write_bytes((other if is_golden else file).read_bytes())
    code, said, rows = check(
        tmp_path / "out", "--device", "fakegpu", "--tiny", "--only", "right", "--reference", str(reference)
    )
    assert code == 1, said[-3000:]
    assert "WRONG" in verdicts(rows, "right")
