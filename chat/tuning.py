"""Runs of tuning, as the faces see them: begun, read along, stopped, gone on with.

A run is a process of its own session (jobs/tune.py), so that a lost line ends nothing. It hears a face in two ways:
its stdin says "go" once the page was looked at, and SIGTERM saves and stops (a second one stops at once).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from glmchat.chat.engine_process import last_words
from glmchat.chat.jobs import job_environment, run_job
from glmchat.chat.recipe import MODELS
from glmchat.chat.tuning_words import Record
from glmchat.core.errors import Failed, GlmchatError, Interrupted, Usage
from glmchat.core.language import tr
from glmchat.core.run_folder import Run, last_record, new_run
from glmchat.core.run_log import LogReader, Progress
from glmchat.core.text import one_line

PROGRAM: tuple[str, ...] = ("-m", "glmchat.jobs.tune")
POLL_SECONDS = 0.1
_TRIES = 5  # for a checkpoint that goes while it is looked at
_ADAPTERS = (("adapter_config.json", "adapter_model.safetensors"), ("config.json", "pytorch_model.bin"))
STOP_SECONDS = 20.0  # for a plan that nobody wants any more


class Begun:
    """A run whose page is being made; it ends with this process unless `go` is said."""

    def __init__(self, name: str, recipe: Mapping[str, Any]) -> None:
        self.run = new_run(name, recipe)
        self._reader = LogReader(self.run.log)
        try:
            self._child = _start(self.run, waits=True)
        except OSError:
            self.run.remove()
            raise

    def page(
        self, cancelled: Callable[[], bool] | None = None, hear: Callable[[Record], None] = lambda record: None
    ) -> Record:
        """Wait for the plan. Raises what planning raised, or Interrupted; the folder is then gone.

        hear: is told what comes before it.
        """
        try:
            while True:
                dead = self._child.poll() is not None  # asked first: what it wrote before is read below
                for record in self._reader.read():
                    if record.get("kind") == "page":
                        return record
                    if record.get("kind") == "end":
                        raise error_of(record)
                    hear(record)
                if dead:
                    raise died(self.run)
                if cancelled is not None and cancelled():
                    raise Interrupted(tr("stopped"), hint=tr("nothing was trained; run it again"))
                time.sleep(POLL_SECONDS)
        except BaseException as error:
            is_bug = isinstance(error, GlmchatError) and error.code in ("tune.bug", "run.died")
            self.give_up(keep=is_bug)  # its log tells where
            raise

    def go(self) -> Run:
        """Let it learn; from now on it lives by itself."""
        assert self._child.stdin is not None
        with suppress(OSError):
            self._child.stdin.write(b"go\n")
            self._child.stdin.close()
        return self.run

    def give_up(self, *, keep: bool = False) -> None:
        """It was only a plan: the process and its folder go. keep: the folder stays."""
        assert self._child.stdin is not None
        with suppress(OSError):
            self._child.stdin.close()
        try:
            self._child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        if not keep:
            self.run.remove()


def _start(run: Run, *, waits: bool) -> subprocess.Popen[bytes]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    log = os.open(run.folder / "job.log", flags, 0o600)
    try:
        return subprocess.Popen(
            [sys.executable, "-P", *PROGRAM, str(run.folder), *([] if waits else ["--go"])],
            cwd="/",
            env=job_environment(pulls=False),
            stdin=subprocess.PIPE if waits else subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # neither Ctrl-C nor the end of the terminal reaches it
        )
    finally:
        os.close(log)


def prepare(name: str, recipe: Mapping[str, Any], processes: int) -> tuple[Run, list[str]]:
    """The folder of a run that a launcher of several processes will start, and the command. Raises OSError."""
    run = new_run(name, recipe)
    run.note("prepared")
    # --multi_gpu also where it learns on a CPU: with --cpu accelerate 1.15 starts one process, whatever it is told.
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return run, [sys.executable, "-P", "-m", *launcher, *PROGRAM, str(run.folder), "--go"]


def resume(run: Run) -> None:
    """Go on from its last whole checkpoint. Raises Usage for a run that is at work, or has nothing to go on with."""
    state = run.state()
    if run.at_work:
        raise Usage(
            tr("the run {name} is at work", name=run.id), hint=f"glmchat tune --attach {run.id}", code="run.at_work"
        )
    if state == "done":
        raise Usage(
            tr("the run {name} is done", name=run.id), hint=tr("glmchat tune BASE DATA starts one"), code="run.done"
        )
    # Its first act is to note that it is at work; until then who looks would see how the last one ended.
    before = run.log.stat().st_size if run.log.exists() else 0
    child = _start(run, waits=False)
    while child.poll() is None and (not run.log.exists() or run.log.stat().st_size == before):
        time.sleep(POLL_SECONDS)


def stop(run: Run) -> bool:
    """Save and stop; asked a second time, stop at once. False where nothing is at work. Raises Usage elsewhere."""
    if (machine := run.machine()) is not None and run.at_work:
        raise Usage(
            tr("the run {name} is at work on {machine}", name=run.id, machine=one_line(machine, 60)),
            hint=tr("stop it there"),
            code="run.elsewhere",
        )
    if (pid := run.pid()) is None:
        return False
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    return True


def follow(run: Run, *, leave: Callable[[], bool] | None = None) -> Generator[list[dict[str, Any]], None, None]:
    """What the log holds, and then what comes, until the run has ended or `leave` says so.

    Some times a second, also where nothing is new: []. A process that died without a word ends with a record of its
    own, of state "dead".
    """
    reader = LogReader(run.log)
    while True:
        is_over = not run.at_work
        records = reader.read()
        if is_over and not (records and records[-1].get("kind") == "end"):
            ended = last_record(run, "end") is not None and run.state() != "dead"
            state = "prepared" if run.state() == "prepared" else "dead"
            records += [] if ended else [{"kind": "end", "state": state, **died(run).to_json()}]
        yield records
        if is_over or (leave is not None and leave()):
            return
        time.sleep(POLL_SECONDS)


def progress_of(run: Run) -> Progress:
    """All that its log tells until now."""
    progress = Progress()
    progress.add(LogReader(run.log).read())
    return progress


def died(run: Run) -> GlmchatError:
    """Its process is gone and wrote no end; or there was none yet."""
    if run.state() == "prepared":
        return Usage(
            tr("the run {name} was prepared and not started", name=run.id),
            hint=tr("start it by the command that --prepare said; in one process: glmchat tune --resume {name}",
                    name=run.id),
            code="run.prepared",
        )  # fmt: skip
    words = last_words(run.folder / "job.log")
    if run.never_began:
        said = tr("the run {name} died before it began to learn", name=run.id)
        hint = tr("glmchat tune --resume {name} begins it, glmchat tune --rm {name} deletes it", name=run.id)
    else:
        said = tr("the run {name} died", name=run.id)
        hint = tr("glmchat tune --resume {name} goes on from its last checkpoint", name=run.id)
    if not words and run.died_for_memory:
        words = tr("the system ran out of memory and killed it")
        smaller = tr("close other programs first; a run with shorter passes (--row-tokens) takes less")
        hint = tr("{first}; {second}", first=hint, second=smaller)
    return Failed(said + (f": {words}" if words else ""), hint=hint, code="run.died")


def error_of(end: Record) -> GlmchatError:
    """The error that a record of an end tells."""
    return GlmchatError.from_json(dict(end))


def last_checkpoint(run: Run) -> Path | None:
    """The newest whole one; the trainer writes them beside and renames them."""
    places = sorted(place for place in run.checkpoints.glob("step-*") if _adapter_files(place) is not None)
    return places[-1] if places else None


def _adapter_files(place: Path) -> tuple[str, ...] | None:
    """Of a checkpoint, those that are an adapter: PEFT's, or THUDM's of a prefix. None: it holds none."""
    return next((names for names in _ADAPTERS if all((place / name).is_file() for name in names)), None)


def take_checkpoint(run: Run, model: Path | None) -> str:
    """Bring the last checkpoint of a run that still learns into the store; returns its name there.

    model: what it will be used with. Raises what adding an adapter raises, and Usage where there is none yet.
    """
    if run.recipe().get("method") in MODELS:
        raise Usage(
            tr("the run {name} makes a model, not an adapter", name=run.id),
            hint=tr("its model is in the store when it is done"),
            code="run.no_checkpoint",
        )
    place = _held(run)
    try:
        step = int(place.name.rpartition("-")[2])
        request = {
            "path": str(place),
            "name": f"{run.recipe().get('name', run.id)}-step-{step}",
            "origin": {"asked": f"glmchat tune {run.id}", "served": []},
            "base": None if model is None else {"path": str(model), "note": None},
            "reuse": True,
        }
        for event in run_job("add_adapter", request):
            if event["event"] == "result":
                return str(event["name"])
        raise AssertionError("a job ends with its result or an error")
    finally:
        shutil.rmtree(place.parent, ignore_errors=True)


def _held(run: Run) -> Path:
    """The last checkpoint in a folder of our own, by links: the trainer takes old ones away when it likes."""
    for _ in range(_TRIES):
        if (place := last_checkpoint(run)) is None:
            raise Usage(
                tr("the run {name} has no checkpoint yet", name=run.id),
                hint=tr("wait for one, or begin with --save-every N"),
                code="run.no_checkpoint",
            )
        held = Path(mkdtemp(prefix=".held-", dir=run.folder)) / place.name
        try:
            held.mkdir()
            for file in _adapter_files(place) or ():
                os.link(place / file, held / file)
            return held
        except FileNotFoundError:  # it went meanwhile; there is a newer one
            shutil.rmtree(held.parent, ignore_errors=True)
    raise died(run)
