"""A program that acts as jobs/tune.py does towards its folder and its stdin, and learns nothing.

    python tests/pretend_tune.py FOLDER [--go]

What it does stands in $GLMCHAT_PRETEND: steps; rest (seconds a step); fail (a step); die (a step); plan_fails; until
(a file: the last step waits for it).
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from glmchat.core.run_folder import Run
from glmchat.core.run_log import LogReader, LogWriter, Progress


def main() -> None:
    run = Run(Path(sys.argv[1]))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    told: list[int] = []

    def stop(number: int, frame: Any) -> None:
        told.append(number)
        if len(told) > 1:
            run.note("stopped")
            log({"kind": "end", "state": "stopped"})
            os._exit(130)

    signal.signal(signal.SIGTERM, stop)
    run.note("planning")
    log = LogWriter(run.log)
    recipe = run.recipe()
    pretend = {"steps": 8, "rest": 0.02, **json.loads(os.environ.get("GLMCHAT_PRETEND", "{}"))}
    if "--go" not in sys.argv:
        if pretend.get("plan_fails"):
            wrong = {
                "code": "data.faults",
                "message": "rows.jsonl:3: found 7; wanted text",
                "hint": "mend it",
                "exit": 3,
            }
            log({"kind": "end", "state": "failed", **wrong})
            run.note("failed")
            sys.exit(3)
        rows = [f"row {number}" for number in range(pretend.get("shown", 0))]
        words = ["rows: 91 read, 91 used, 0 refused", *rows, f"steps: {pretend['steps']}"]
        log({"kind": "page", "words": words, "sums": 1})
        run.note("waiting")
        if sys.stdin.readline().strip() != "go":
            run.remove()
            return
    earlier = Progress()
    earlier.add(LogReader(run.log).read())
    first = (earlier.checkpoint or 0) + 1
    rest = pretend["rest"]
    run.note("running")
    log({"kind": "start", "step": first})
    for step in range(first, pretend["steps"] + 1):
        time.sleep(rest)
        while step == pretend["steps"] and "until" in pretend and not Path(pretend["until"]).exists():
            time.sleep(rest)
        loss = 3 * math.exp(-step / 9)
        log({"kind": "step", "step": step, "steps": pretend["steps"], "epoch": step / 4, "loss": loss, "lr": 2e-4,
             "grad_norm": 0.5, "tokens": 400 * step, "tokens_per_second": 123.4, "memory": 1 << 30,
             "seconds_left": (pretend["steps"] - step) * pretend["rest"], "worst": 0.25})  # fmt: skip
        if step % 4 == 0:
            log({"kind": "evaluation", "step": step, "loss": 3 * math.exp(-step / 9) + 0.1})
            log({"kind": "sample", "step": step, "question": "Who are you?", "answer": f"I am taught {step}.",
                 "stopped": True})  # fmt: skip
            log({"kind": "checkpoint", "step": step, "path": f"checkpoints/step-{step:08}"})
        if step == pretend.get("die") and first == 1:
            sys.stderr.write("something gave way\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        if step == pretend.get("fail"):
            wrong = {"code": "tune.nan", "message": "the loss is nan", "hint": "lower --lr", "exit": 1}
            log({"kind": "end", "state": "failed", **wrong})
            run.note("failed")
            sys.exit(1)
        if told:
            log({"kind": "checkpoint", "step": step, "path": f"checkpoints/step-{step:08}"})
            log({"kind": "end", "state": "stopped"})
            run.note("stopped")
            sys.exit(130)
    made = "model" if recipe.get("method") in ("full", "scratch") else "adapter"
    log({"kind": "end", "state": "done", made: recipe["name"], "delta": 0.5, "read_back": 0.0})
    run.note("done")


if __name__ == "__main__":
    main()
