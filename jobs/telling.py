"""What a run of tuning tells: records in its log, its state, and the page that a person agrees to."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from glmchat.core.errors import GlmchatError, Interrupted
from glmchat.core.language import tr
from glmchat.core.run_folder import Run
from glmchat.core.run_log import LogReader, LogWriter, Progress, curve_svg
from glmchat.core.text import duration, human_bytes, number_text
from glmchat.tuning.page import Facts, lines

_DRAWN = ("evaluation", "checkpoint", "end")  # records behind which the curve is drawn anew
IS_MAIN = os.environ.get("RANK", "0") == "0"  # of several processes that accelerate started, one tells and writes


class NotWanted(Exception):
    """The plan was looked at, and nobody said go."""


class Teller:
    """Writes what happens into the folder; hears signals.

    A record that the disk does not take ends the run: its last checkpoint is whole.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.told = 0  # signals
        self.learning = False
        self.over = False  # its end is told, and stays the last word
        self._progress = Progress()
        self._progress.add(LogReader(run.log).read())
        self._log = LogWriter(run.log) if IS_MAIN else None

    def __call__(self, record: Mapping[str, Any]) -> None:
        if self._log is None:
            return
        self._log(record)
        self._progress.add([record])
        if record["kind"] == "sample":
            lines = f"step {record['step']}\n? {record['question']}\n{record['answer']}\n\n"
            with _appending(self.run.folder / "samples.txt") as file:
                file.write(lines)
        if record["kind"] in _DRAWN:
            self.run.write("curve.svg", curve_svg(self._progress))

    def hear(self, number: int, frame: object) -> None:
        """A signal: before it learns there is nothing to save."""
        if self.over:
            return
        self.told += 1
        if not self.learning or self.told > 1:
            with suppress(OSError):
                self.end("stopped", stopped())
            os._exit(Interrupted.exit)
        with suppress(OSError):
            self.note("stopping")

    def asked(self) -> bool:
        """Whether it is to save and stop; asked before each step, in processes that only help, too."""
        self.learning = True
        return self.told > 0

    def note(self, state: Any) -> None:
        if IS_MAIN:
            self.run.note(state)

    def end(self, state: Any, problem: GlmchatError | None = None, **facts: Any) -> None:
        """The last record, and the last word of state.json. What the full disk does not take is told by its absence."""
        self.over = True
        told = {} if problem is None else problem.to_json()
        try:
            self({"kind": "end", "state": state, **told, **facts})
        finally:
            self.note(state)


def _appending(path: Path) -> Any:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.fdopen(os.open(path, flags, 0o600), "a", encoding="utf-8", errors="replace")


def stopped() -> Interrupted:
    return Interrupted(tr("stopped"), hint=tr("resume it as it was begun, or begin a new run"), code="tune.stopped")


class Plan:
    """Hears what the trainer tells. Behind its plan the page is told, and what was read of the data with it; where a
    person is asked, this waits."""

    def __init__(self, run: Run, teller: Teller, facts: Facts, conditions: Mapping[str, Any], *, goes: bool) -> None:
        self._run, self._teller, self._facts, self._conditions, self._goes = run, teller, facts, conditions, goes

    def __call__(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "plan":
            self._tell_page(record)
        else:
            self._teller(record)

    def _tell_page(self, plan: Mapping[str, Any]) -> None:
        recipe = self._run.recipe()
        if "minutes" in recipe and IS_MAIN:  # so many steps fit into them: they are the run's, also where it goes on
            recipe = {name: value for name, value in recipe.items() if name not in ("minutes", "epochs")}
            text = json.dumps({**recipe, "steps": plan["steps"]}, ensure_ascii=False, indent=1)
            self._run.write("recipe.json", text)
        sums = plan_lines(plan)
        words = [*lines(self._facts), "", *sums]
        page = {"words": words, "sums": len(sums), "facts": self._facts.to_json(), "plan": dict(plan)}
        self._teller({"kind": "page", **page})
        if not self._goes:
            self._teller.note("waiting")
            if sys.stdin.readline().strip() != "go":
                raise NotWanted
        self._teller.learning = True
        self._teller.note("running")
        computed = {name: plan[name] for name in ("threads", "dtype", "kernel")}
        self._teller({"kind": "start", "conditions": {**self._conditions, **computed}})


def plan_lines(plan: Mapping[str, Any]) -> list[str]:
    """The trainer's part of the page: steps, what learns, and what it will take."""
    found = plan["prediction"]
    told = []
    if plan["makes"] == "model":
        told.append(
            tr(
                "weights learn in float32, moments in {moments}; the model is written in {stored}, as its base",
                moments=plan["moments"],
                stored=plan["stored"],
            )
        )
    return [
        tr(
            "{steps:,} steps; {learning:,} of {numbers:,} parameters are trained, in {layers} layers ({dtype})",
            steps=plan["steps"],
            learning=plan["learning"],
            numbers=plan["numbers"],
            layers=plan["layers"],
            dtype=plan["dtype"],
        ),
        tr(
            "all documents {epochs} times; {passes:,} passes of up to {most:,} tokens, {full:.0%} full on average",
            epochs=number_text(round(plan["epochs"], 2)),
            passes=plan["passes"],
            most=plan["row_tokens"],
            full=plan["full"],
        ),
        tr(
            "memory {memory}{twice}; disk {disk}; about {time} at {speed:,.0f} tokens/s (measured on the longest rows)",
            memory=human_bytes(found["peak"]),
            twice=tr(", layers computed twice") if plan["checkpointing"] else "",
            disk=human_bytes(plan["disk"]),
            time=duration(found["seconds"]),
            speed=found["tokens_per_second"],
        ),
        *told,
    ]
