"""A run that is killed, whenever that is, goes on as if it had not been; so do two processes that agree on a gradient.

Covers tuning/state.py, tuning/trainer.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import learn, losses, plain, rows_of
from polling import wait_until
from safetensors.torch import load_file
from tiny_checkpoints import build

from glmchat.tuning import state

TESTS = Path(__file__).resolve().parents[1]
# Events go to a file at once; a checkpoint takes its time, so that a kill finds it half written.
PROGRAM = """
import json, os, sys, time
sys.path.insert(0, {tests!r})
import torch
from learning import plain, rows_of
from glmchat.tuning import state
from glmchat.tuning.trainer import train
from pathlib import Path
torch.set_num_threads(1)
model, folder, slow, options = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), json.loads(sys.argv[4])
whole = state.sync
def sync(path):
    time.sleep(slow)
    whole(path)
state.sync = sync
folder.mkdir(parents=True, exist_ok=True)
log = open(folder / "log.jsonl", "a")
def tell(event):
    log.write(json.dumps(event) + "\\n"); log.flush()
train(model, rows_of(options, 18), plain(**options), folder, tell, lambda: False)
"""
OPTIONS = {"epochs": 2, "rows_per_step": 3, "dropout": 0.2, "learning_rate": 1e-2, "save_every": 1}


OF_PAIRS = {**OPTIONS, "method": "dpo", "beta": 0.3}
OF_PREFIX = {**OPTIONS, "method": "prefix", "prefix_length": 5, "prefix_projection": True}


def start(model: Path, folder: Path, slow: float, options: dict[str, Any]) -> subprocess.Popen[bytes]:
    code = PROGRAM.format(tests=str(TESTS))
    words = [sys.executable, "-P", "-c", code, str(model), str(folder), str(slow), json.dumps(options)]
    return subprocess.Popen(words, cwd="/", stdout=subprocess.DEVNULL)


def told(folder: Path) -> list[dict[str, object]]:
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("options", [OPTIONS, OF_PAIRS, OF_PREFIX], ids=["lora", "dpo", "prefix"])
def test_after_kills_every_loss_is_that_of_an_undisturbed_run(tmp_path: Path, options: dict[str, Any]) -> None:
    """One kill in the middle of writing a checkpoint, one in the second epoch, behind a whole checkpoint."""
    torch.set_num_threads(1)
    model, folder = build("llama", tmp_path / "base"), tmp_path / "run"
    _, events = learn(tmp_path / "whole", model, rows_of(options, 18), plain(**options))
    places = folder / "checkpoints"

    def half_written() -> bool:
        return any(places.glob(".writing-*/optimiser.safetensors")) and len(list(places.glob("step-*"))) > 0

    def in_the_second_epoch() -> bool:
        return any(event["kind"] == "checkpoint" and int(str(event["step"])) >= 8 for event in told(folder))

    for due in (half_written, in_the_second_epoch):
        process = start(model, folder, 0.05, options)
        try:
            wait_until(due, seconds=120)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        saved = state.newest(places)
        assert saved is not None and saved.step >= 1
        assert not list(places.glob(".writing-*")) and not (folder / "adapter").exists()
    assert start(model, folder, 0.0, options).wait() == 0
    found: dict[int, set[float]] = {}
    for event in told(folder):
        if event["kind"] == "step":
            found.setdefault(int(str(event["step"])), set()).add(float(str(event["loss"])))
    assert [found[step] for step in sorted(found)] == [{loss} for loss in losses(events)]
    parts, once = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (folder, tmp_path / "whole"))
    assert all(torch.equal(parts[name], once[name]) for name in once)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("options", [OPTIONS, OF_PAIRS, OF_PREFIX], ids=["lora", "dpo", "prefix"])
def test_two_processes_learn_what_one_does(tmp_path: Path, options: dict[str, Any]) -> None:
    """By torch's launcher: accelerate's starts one process on a CPU. Of three passes one of them takes two."""
    model, folder = build("llama", tmp_path / "base"), tmp_path / "two"
    options = {**options, "dropout": 0.0, "row_tokens": 1}
    _, events = learn(tmp_path / "one", model, rows_of(options, 18), plain(**options))
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(tests=str(TESTS)))
    launch = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*launch, str(program), str(model), str(folder), "0", json.dumps(options)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    plan = next(event for event in told(folder) if event["kind"] == "plan")
    assert plan["processes"] == 2
    found = [float(str(event["loss"])) for event in told(folder) if event["kind"] == "step"]
    assert found == pytest.approx(losses(events), rel=1e-4)
    if (
        options.get("method") == "dpo"
    ):  # rewards and margins are sums over both processes, and there rounding differs more
        steps = [[event for event in log if event["kind"] == "step"] for log in (told(folder), events)]
        for both, alone in zip(*steps, strict=True):
            for name in ("loss", "margin", "accuracy", "reward_chosen", "reward_rejected"):
                assert both[name] == pytest.approx(alone[name], abs=1e-5), (alone["step"], name)
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (tmp_path / "one", folder))
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=1e-2, atol=1e-4)
