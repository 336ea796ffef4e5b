"""A run of tuning is a folder: what was asked for, what happened, who works on it, and what it has learned so far.

    runs/ID/recipe.json   what was asked for: all that the program needs
            state.json    the process that works on it, or how it ended
            log.jsonl     one record a line (core/run_log.py)
            curve.svg     the losses, drawn
            samples.txt   what it answered on the way
            job.log       what its libraries said
            checkpoints/  the trainer's, each whole or absent

The program writes, everybody else reads. A folder is 0700 and its files 0600.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from glmchat.core import locations
from glmchat.core.errors import Usage
from glmchat.core.json_files import small_json
from glmchat.core.language import tr
from glmchat.core.machine import oom_kills
from glmchat.core.processes import is_alive, machine_of, pid_of, this_process
from glmchat.core.run_log import LogReader
from glmchat.core.text import one_line

_ID = re.compile(r"\w[\w.+-]{0,95}")
# prepared: a launcher will start it. planning: the page is made, nothing is learned yet. dead: its process is gone and
# did not say why.
State = Literal["prepared", "planning", "waiting", "running", "stopping", "done", "stopped", "failed", "dead"]
_AT_WORK = ("planning", "waiting", "running", "stopping")


@dataclass(frozen=True, slots=True)
class Run:
    folder: Path

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def created(self) -> float:
        """Seconds since 1970."""
        with suppress(OSError):
            return (self.folder / "recipe.json").stat().st_mtime
        return 0.0

    def recipe(self) -> dict[str, Any]:
        return small_json(self.folder / "recipe.json")

    def state(self) -> State:
        """What the program wrote down, unless its process is gone: then it died."""
        note = small_json(self.folder / "state.json")
        state: State = note.get("state", "dead")
        if state in _AT_WORK and is_alive(note.get("owner")) is False:
            return "dead"
        return state

    @property
    def at_work(self) -> bool:
        return self.state() in _AT_WORK

    @property
    def never_began(self) -> bool:
        """Whether it ended before it came to learn: it was a plan, and its folder holds nothing."""
        is_over = self.state() in ("dead", "failed", "stopped")
        return is_over and not self.checkpoints.exists() and last_record(self, "start") is None

    @property
    def died_for_memory(self) -> bool:
        """Whether it is dead, and the kernel has killed a program for memory since it last wrote down its state."""
        before, now = small_json(self.folder / "state.json").get("oom_kills"), oom_kills()
        return self.state() == "dead" and isinstance(before, int) and now is not None and now > before

    def pid(self) -> int | None:
        """The process that works on it; None where there is none on this machine."""
        return pid_of(small_json(self.folder / "state.json").get("owner")) if self.at_work else None

    def machine(self) -> str | None:
        """The other machine that works on it; None for this one."""
        return machine_of(str(small_json(self.folder / "state.json").get("owner", "")))

    def note(self, state: State) -> None:
        """Written by the program alone: from now on this process answers for the run."""
        told = {"state": state, "owner": this_process(), "oom_kills": oom_kills()}
        self.write("state.json", json.dumps(told))

    def write(self, name: str, text: str) -> None:
        """A small file of the folder, whole or as it was. Raises OSError."""
        place = self.folder / name
        growing = place.with_name(f".{name}.{os.getpid()}.tmp")
        try:
            descriptor = os.open(growing, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            growing.replace(place)
        except OSError:
            with suppress(OSError):
                growing.unlink()
            raise

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def runs_dir() -> Path:
    return locations.data_dir() / "runs"


def new_run(name: str, recipe: Mapping[str, Any]) -> Run:
    """A folder named `name`, or name-2, name-3 … Raises Usage for what is no name, OSError, Failed."""
    if not _ID.fullmatch(name) or ".." in name:
        raise _unknown(name, (), [run.id for run in runs()])
    locations.private_dir(locations.data_dir())
    parent = locations.private_dir(runs_dir())
    for number in count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            continue
        run = Run(folder)
        try:
            run.write("recipe.json", json.dumps(recipe, ensure_ascii=False, indent=1))
        except OSError:
            run.remove()
            raise
        return run
    raise AssertionError


def runs() -> list[Run]:
    """The newest first. What is no run of ours is left out."""
    try:
        folders = [Run(Path(entry.path)) for entry in os.scandir(runs_dir()) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    there = [run for run in folders if _ID.fullmatch(run.id) and (run.folder / "recipe.json").is_file()]
    return sorted(there, key=lambda run: (-run.created, run.id))


def find_run(name: str, *, is_whole: bool = False) -> Run:
    """By its id, or by how that begins where only one does. Raises Usage with those there are.

    is_whole: by its id alone; what deletes guesses nothing.
    """
    known = {run.id: run for run in runs()}
    found = [name] if name in known else [] if is_whole else beginning(name, known)
    if len(found) == 1:
        return known[found[0]]
    raise _unknown(name, found, known)


def _unknown(name: str, found: Sequence[str], known: Collection[str]) -> Usage:
    names = one_line(", ".join(found or known), 200)
    return Usage(
        tr("several runs begin with {name}", name=repr(name))
        if found
        else tr("there is no run {name}", name=repr(one_line(name, 80))),
        hint=tr("there are {names}", names=names) if names else tr("glmchat tune BASE DATA starts one"),
        code="run.unknown",
    )


def beginning(name: str, known: Iterable[str]) -> list[str]:
    """The names that begin as `name` does; none for an empty one."""
    return [each for each in known if name and each.startswith(name)]


def last_record(run: Run, kind: str) -> dict[str, Any] | None:
    """The last record of that kind in its log."""
    return next((record for record in reversed(LogReader(run.log).read()) if record.get("kind") == kind), None)
