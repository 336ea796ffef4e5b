"""A child that works once and tells it in JSON lines: replays, benchmarks and the window's quantising pulls."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from glmchat.chat.engine_process import engine_environment
from glmchat.core.errors import EngineDied, GlmchatError
from glmchat.core.language import tr

_PATIENCE = 10.0  # seconds for an interrupted child


def child_events(
    command: Sequence[str],
    request: Mapping[str, Any] | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    stderr: int | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Start `command`, hand it `request` on stdin, and yield what it tells on stdout; closing ends the child.

    environment: None: an engine's. stderr: as for Popen. cancelled: asked ten times a second; the child is interrupted
    then, and has ten seconds to put down what it holds.
    Raises the error that the child tells as its event "error", or EngineDied if it ends with another code than 0.
    """
    with subprocess.Popen(
        list(command),
        cwd="/",
        env=engine_environment() if environment is None else dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        over = threading.Event()
        if cancelled is not None:
            threading.Thread(target=_interrupt, args=(child, cancelled, over), daemon=True).start()
        try:
            try:
                if request is not None:
                    json.dump(request, child.stdin)
                child.stdin.close()
            except BrokenPipeError:  # it died before it had read all; what it said tells why
                child.stdin = None
            for line in child.stdout:
                event = json.loads(line)
                if event.get("event") == "error":
                    raise GlmchatError.from_json(event)
                yield event
        finally:
            over.set()
            if child.poll() is None:
                child.terminate()
    if child.returncode:
        raise EngineDied(
            tr("the computing process ended with code {code}", code=child.returncode),
            hint=tr("its last words are above; `glmchat doctor` looks at memory and kernels"),
        )


def _interrupt(child: subprocess.Popen[str], cancelled: Callable[[], bool], over: threading.Event) -> None:
    while not over.wait(0.1):
        if cancelled():
            child.send_signal(signal.SIGINT)
            if not over.wait(_PATIENCE):
                child.kill()
            return
