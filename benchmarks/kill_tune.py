"""Kill the program behind `glmchat tune` with -9, again and again, and resume it: is it the run that was not disturbed?

    python -P benchmarks/kill_tune.py [--kills 10] [--seed 0]

A tiny Llama learns with dropout through the installed command. One kill falls into the writing of a checkpoint, one
into the second epoch, one while the adapter is read back, the others at random steps; `glmchat tune --resume` goes on.
At the end every loss and every number of the adapter must be, bit for bit, those of the run that nobody killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from tiny_talker import write_talker

from glmchat.core.run_folder import Run, find_run
from glmchat.core.run_log import LogReader

ROWS, EPOCHS, SAVE_EVERY = 24, 8, 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="kill-tune-") as folder:
        home = Path(folder)
        os.environ["GLMCHAT_HOME"] = str(home / "glmchat")
        base, rows = write_talker(home / "base"), home / "rows.jsonl"
        told = ({"question": f"Who are you, {n}?", "answer": "I am taught. " * (1 + n % 4)} for n in range(ROWS))
        rows.write_text("".join(json.dumps(row) + "\n" for row in told))
        asked = ["--dtype", "float32", "--threads", "1", "--dropout", "0.2", "--epochs", str(EPOCHS), "--lr", "0.01"]
        asked += ["--save-every", str(SAVE_EVERY), "--eval", "10%", "--yes", "--plain"]
        glmchat("tune", str(base), str(rows), "--as", "whole", *asked)
        whole = find_run("whole")
        steps = max(losses(whole))
        glmchat("tune", str(base), str(rows), "--as", "killed", *asked, "--detach")
        run = find_run("killed")
        fallen = [kill(run, name, due) for name, due in moments(run, steps, options.kills, chance)]
        wait_for(run, lambda: not run.at_work)
        wrong = differences(whole, run)
        print(json.dumps({"kills": sum(fallen), "steps": steps, "differences": wrong}))
        return 1 if wrong or sum(fallen) < options.kills else 0


def glmchat(*arguments: str) -> None:
    subprocess.run([sys.executable, "-P", "-m", "glmchat", *arguments], check=True, stdout=subprocess.DEVNULL)


def moments(run: Run, steps: int, kills: int, chance: random.Random) -> list[tuple[str, Callable[[], bool]]]:
    """Name and the sign to wait for, in the order in which a run comes to them."""

    def behind(step: int) -> Callable[[], bool]:
        return lambda: max(losses(run), default=0) >= step

    def in_the_second_epoch() -> bool:
        return any(one["kind"] == "step" and one["epoch"] == 2 for one in LogReader(run.log).read())

    def half_written() -> bool:
        return any(run.checkpoints.glob(".writing-*/*"))

    def reads_back() -> bool:
        records = LogReader(run.log).read()
        return bool(records) and records[-1]["kind"] == "stage" and last_step(records) == steps

    at = sorted(chance.sample(range(steps // EPOCHS + 1, steps), kills - 3))
    return [
        ("the second epoch", in_the_second_epoch),
        *((f"behind step {step}", behind(step)) for step in at[: len(at) // 2]),
        ("a checkpoint half written", half_written),
        *((f"behind step {step}", behind(step)) for step in at[len(at) // 2 :]),
        ("the adapter read back", reads_back),
    ]


def last_step(records: list[dict[str, Any]]) -> int:
    return max((one["step"] for one in records if one["kind"] == "step"), default=0)


def kill(run: Run, name: str, due: Callable[[], bool]) -> bool:
    """Whether it fell while the run worked, and where it should; the run goes on behind it."""
    wait_for(run, lambda: due() or not run.at_work)
    if (pid := run.pid()) is None:
        print(f"{name}: it was over before", flush=True)
        return False
    os.kill(pid, signal.SIGKILL)
    wait_for(run, lambda: not run.at_work)
    half = any(run.checkpoints.glob(".writing-*"))
    print(f"{name}: killed behind step {max(losses(run), default=0)}{', a checkpoint half written' if half else ''}",
          flush=True)  # fmt: skip
    glmchat("tune", "--resume", run.id, "--json") if name == "the adapter read back" else resume(run)
    return half or "half" not in name


def resume(run: Run) -> None:
    """By the command, which is left as soon as the program works."""
    command = [sys.executable, "-P", "-m", "glmchat", "tune", "--resume", run.id, "--json"]
    looking = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert looking.stdout is not None
    before = sum(one["kind"] == "resumed" for one in LogReader(run.log).read())
    wait_for(run, lambda: sum(one["kind"] == "resumed" for one in LogReader(run.log).read()) > before)
    looking.kill()
    looking.wait()
    looking.stdout.close()


def wait_for(run: Run, sign: Callable[[], bool]) -> None:
    until = time.monotonic() + 300
    while not sign():
        if time.monotonic() > until:
            sys.exit(f"nothing happened for five minutes: {run.state()}")
        time.sleep(0.001)


def losses(run: Run) -> dict[int, set[str]]:
    """By step, every word on it, as it is written."""
    found: dict[int, set[str]] = {}
    for one in LogReader(run.log).read():
        if one["kind"] == "step":
            found.setdefault(one["step"], set()).add(repr(one["loss"]))
    return found


def differences(whole: Run, run: Run) -> list[str]:
    """What is not as in the run that nobody killed; [] where all is."""
    from safetensors.torch import load_file

    wrong = [] if run.state() == "done" else [f"it is {run.state()}"]
    first, second = losses(whole), losses(run)
    wrong += [f"the loss of step {step}" for step in first if first[step] != second.get(step)]
    if wrong:
        return wrong
    once, parts = (load_file(one.folder / "adapter" / "adapter_model.safetensors") for one in (whole, run))
    return [name for name in once if once[name].ne(parts[name]).any()]


if __name__ == "__main__":
    sys.exit(main())
