"""The one starter of jobs: programs that load torch for a while, each a child that tells JSON lines (jobs/lines.py).

The command line and the window call the same `run_job`, so one prints the plan
that the other asks for.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from glmchat.chat.engine_process import cause_of_death, engine_environment, new_log
from glmchat.core.errors import GlmchatError, Interrupted
from glmchat.core.job_control import rests_with_us
from glmchat.core.language import tr
from glmchat.core.machine import oom_kills

_PATIENCE = 10.0  # seconds for a stopped job to put down what it holds
_POLL_SECONDS = 0.1
# Handed on to a job that pulls, and to no other: the token of gated models, the user's own word on being offline, and
# the proxies. Where the hub is (HF_ENDPOINT) and its cache (HF_HOME, …) every child may know.
_FOR_THE_HUB = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")

Events = Generator[dict[str, Any], None, None]


def run_job(
    name: str,
    request: Mapping[str, Any],
    *,
    arguments: Sequence[str] = (),
    pulls: bool = False,
    cancelled: Callable[[], bool] | None = None,
) -> Events:
    """Start `python -m glmchat.jobs.NAME`, hand it the request, and yield what it tells: plan first, result last.

    arguments: its command line. pulls: it may ask hubs. cancelled: asked ten times a second; the job then has ten
    seconds to put down what it holds. Closing the generator stops the job in the same way.
    Raises the error that the job tells, Interrupted where it was cancelled, and otherwise why it died: DoesNotFit or
    EngineDied.
    """
    oom_before = oom_kills()
    with TemporaryFile() as stderr:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", f"glmchat.jobs.{name}", *arguments],
            cwd="/",
            env=job_environment(pulls=pulls),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C on the terminal is for us, and only we decide what it stops
        )
        rests_with_us(child)
        finished = False
        with closing(_events(child, request, cancelled)) as events:
            for event in events:
                finished = event["event"] == "result"
                yield event
        if finished:
            return
        if cancelled is not None and cancelled():
            hint = tr("run the same command again to resume")
            raise Interrupted(tr("stopped"), hint=hint, code="pull.stopped" if pulls else "interrupted")
        raise cause_of_death(child.returncode, _log(stderr), oom_before)


def _events(child: subprocess.Popen[str], request: Mapping[str, Any], cancelled: Callable[[], bool] | None) -> Events:
    """What it tells, up to its result or its end; then it has ended. Raises the error that it tells."""
    assert child.stdin is not None and child.stdout is not None
    over = threading.Event()
    if cancelled is not None:
        threading.Thread(target=_stop_when, args=(child, cancelled, over), daemon=True).start()
    try:
        with suppress(BrokenPipeError):  # it died before it had read all; its end tells why
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
        for line in child.stdout:
            event = json.loads(line)
            if event["event"] == "error":
                raise GlmchatError.from_json(event)
            yield event
    finally:
        over.set()
        child.stdout.close()  # one that stands before a full pipe would wait for a reader
        _stop(child)


def _log(stderr: IO[bytes]) -> Path:
    """The last words of a job that died, as a file that people can be pointed to."""
    path, log = new_log("job")
    stderr.seek(0)
    with log:
        shutil.copyfileobj(stderr, log)
    return path


def job_environment(*, pulls: bool, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """An engine's environment; for a job that pulls also what asking a hub takes. Keys for servers go to nobody."""
    environ = os.environ if environ is None else environ
    variables = engine_environment(environ)
    if pulls:
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # an engine's is set, whatever the user's is
            variables.pop(name, None)
        variables |= {n: v for n, v in environ.items() if n in _FOR_THE_HUB or n.lower().endswith("_proxy")}
    return variables


def _stop_when(child: subprocess.Popen[str], cancelled: Callable[[], bool], over: threading.Event) -> None:
    while not over.wait(_POLL_SECONDS):
        if cancelled():
            _stop(child)
            return


def _stop(child: subprocess.Popen[str]) -> None:
    """The end of its stdin tells a job to stop; one that does not is killed. One that has ended is only reaped."""
    assert child.stdin is not None
    with suppress(OSError):
        child.stdin.close()
    try:
        child.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
