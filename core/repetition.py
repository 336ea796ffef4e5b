"""A run that repeats another one: under which conditions each learned, and where they part."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.run_folder import Run, find_run, last_record
from glmchat.core.run_log import LogReader
from glmchat.core.text import one_line

# What a repetition must share: files by their place, and their hashes.
FILES = ("data", "base")


def conditions_of(run: Run) -> dict[str, Any]:
    """What it noted when it began; {} for one that noted nothing."""
    record = last_record(run, "start") or {}
    found = record.get("conditions")
    return found if isinstance(found, dict) else {}


def original_of(run: Run, name: str) -> Run | None:
    """The run that `run` repeats; None where it was removed, also where a later one bears its name."""
    with suppress(Usage):
        found = find_run(name, is_whole=True)
        return found if found.created <= run.created else None
    return None


def require_same_files(before: Run, now: Mapping[str, Any]) -> None:
    """Raises Usage for rows or weights that are not those of the earlier run, with both hashes."""
    known = conditions_of(before)
    for kind in FILES:
        old, new = known.get(kind), now.get(kind)
        if not isinstance(old, dict) or not isinstance(new, dict):
            continue
        for path in (*old, *new):
            if old.get(path) != new.get(path):
                raise Usage(
                    tr("{path} is not what the run {name} learned from: it was {old}, and is {new}",
                       path=one_line(path, 200), name=before.id, old=_hash(old.get(path)), new=_hash(new.get(path))),
                    hint=tr("glmchat tune BASE DATA begins a new run"),
                    code="tune.changed",
                )  # fmt: skip


def _hash(value: Any) -> str:
    return str(value)[:24] if value else tr("none")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What else is not as it was: threads, kernels, types, versions."""
    names = [name for name in dict.fromkeys((*before, *now)) if name not in FILES]
    return [f"{name}: {before.get(name)} → {now.get(name)}" for name in names if before.get(name) != now.get(name)]


def compared(before: Run, now: Run, hashes: Mapping[str, str]) -> dict[str, Any]:
    """hashes: of the files that `now` has learned.

    {"run", "identical", "steps": how many were compared, "step": the first whose loss differs, "why", "whole": whether
    the earlier run is done}; identical: every loss and, where it is done, every byte of what it learned.
    """
    old, new = _losses(before), _losses(now)
    both = sorted(old.keys() & new.keys())
    step = next((number for number in both if old[number] != new[number]), None)
    end = last_record(before, "end") or {}
    is_whole = end.get("state") == "done"
    is_same = step is None and bool(both)
    if is_whole:
        is_same = is_same and old.keys() == new.keys() and end.get("hashes") == dict(hashes)
    why = differences(conditions_of(before), conditions_of(now))
    return {"run": before.id, "identical": is_same, "steps": len(both), "step": step, "why": why, "whole": is_whole}


def words(found: Mapping[str, Any]) -> list[str]:
    """What `compared` found, for people."""
    if not found["steps"]:
        return [tr("the run {name} has no losses to compare with", name=found["run"])]
    if found["identical"] and not found.get("whole", True):
        return [tr("identical to the run {name} as far as it came: {count:,} losses, bit by bit",
                   name=found["run"], count=found["steps"])]  # fmt: skip
    if found["identical"]:
        return [tr("identical to the run {name}: {count:,} losses and what was learned, bit by bit",
                   name=found["run"], count=found["steps"])]  # fmt: skip
    if found["step"] is not None:
        said = tr("it parts from the run {name} at step {step}", name=found["run"], step=found["step"])
    else:
        said = tr("its losses are those of the run {name}, what was learned is not", name=found["run"])
    why = [one_line(str(line), 200) for line in found["why"]] or [tr("nothing that is noted differs")]
    return [said, *(f"  {line}" for line in why)]


def _losses(run: Run) -> dict[int, Any]:
    """The later word on each step."""
    return {one["step"]: one.get("loss") for one in LogReader(run.log).read()
            if one.get("kind") == "step" and isinstance(one.get("step"), int)}  # fmt: skip
