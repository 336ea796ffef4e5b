"""How a job speaks: one request on stdin, JSON lines on stdout, one way to be stopped.

    stdin    the request, one JSON object on the first line; then nothing, until the face goes away
    stdout   {"event": "plan", …}       first: what will be done; "words" are the lines that people read
             {"event": "progress", …}   and others that the job names; "say" and "meter" are for people alone
             {"event": "result", …}     last, or {"event": "error", …}: an error of the tree, with its exit code

SIGINT and the end of stdin stop a job: its work is left by KeyboardInterrupt, which puts down what can be gone on with
(whole files) and takes away the rest. What it tells last is then an Interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from glmchat.core.errors import GlmchatError, Interrupted, refusal
from glmchat.core.job_control import wake_when_orphaned
from glmchat.core.language import tr
from glmchat.hub.file_request import Meter

if TYPE_CHECKING:
    from glmchat.engine.quantize.quantiser import QuantizeProgress

Request = Mapping[str, Any]
Tell = Callable[[Mapping[str, Any]], None]


def run(work: Callable[[Request, Tell], Mapping[str, Any]], stopped: Callable[[], Interrupted] | None = None) -> int:
    """The whole main program of a job; returns its exit code.

    work: does what the request asks, tells its events and returns the result. stopped: the error for people who stopped
    it. Any other exception keeps its traceback, on stderr.
    """
    signal.signal(signal.SIGINT, _interrupt)
    tell = _Lines(_only_lines())
    try:
        request = json.loads(sys.stdin.readline() or "{}")
        wake_when_orphaned()
        threading.Thread(target=_watch_stdin, name="lifeline", daemon=True).start()
        result = work(request, tell)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # who has the result closes stdin, and that stops nothing any more
    except KeyboardInterrupt:
        return tell.error(stopped() if stopped is not None else _stopped())
    except GlmchatError as problem:
        return tell.error(problem)
    except BrokenPipeError:  # nobody listens any more
        return Interrupted.exit
    except OSError as error:
        if (refused := refusal(error)) is None:
            raise
        return tell.error(refused)
    tell({"event": "result", **result})
    return 0


class Percent:
    """Tells how far a work on many bytes is: a line for programs at each percent, a bar for people.

    what: what is done, in words. shown: what the whole is in the bar's unit: 100 percent, or bytes of the original.
    """

    def __init__(self, tell: Tell, what: str, shown: int = 100) -> None:
        self._tell, self._meter, self._what, self._shown = tell, Meter(tell), what, shown
        self._percent = -1

    def __call__(self, progress: QuantizeProgress) -> None:
        total = max(progress.total, 1)
        self._meter(self._what, self._shown * progress.done // total, self._shown)
        percent = 100 * progress.done // total
        if percent != self._percent:
            self._percent = percent
            self._tell({"event": "progress", "done": progress.done, "total": progress.total})


class _Lines:
    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __call__(self, event: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps(event, ensure_ascii=False) + "\n")
        self._stream.flush()

    def error(self, problem: GlmchatError) -> int:
        with suppress(BrokenPipeError):
            self({"event": "error", **problem.to_json()})
        return problem.exit


def _only_lines() -> IO[str]:
    """The real stdout; whatever a library prints goes to stderr instead of between the lines."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def _interrupt(number: int, frame: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not disturb the tidying up
    raise KeyboardInterrupt


def _watch_stdin() -> None:
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    main = threading.main_thread().ident
    if main is not None:
        signal.pthread_kill(main, signal.SIGINT)  # and not the process: the main thread may wait in the kernel


def _stopped() -> Interrupted:
    return Interrupted(tr("stopped"), hint=tr("run it again"))
