"""A child that computes once and tells it in JSON lines: `glmchat replay` and `glmchat bench` listen to one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from glmchat.chat.engine_process import engine_environment
from glmchat.core.errors import EngineDied, GlmchatError
from glmchat.core.language import tr


def child_events(
    command: Sequence[str], request: Mapping[str, Any] | None = None
) -> Generator[dict[str, Any], None, None]:
    """Start `command`, hand it `request` on stdin, and yield what it tells on stdout; closing ends the child.

    Raises the error that the child tells as its event "error", or EngineDied if it ends with another code than 0.
    """
    with subprocess.Popen(
        list(command), cwd="/", env=engine_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None
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
            if child.poll() is None:
                child.terminate()
    if child.returncode:
        raise EngineDied(
            tr("the computing process ended with code {code}", code=child.returncode),
            hint=tr("its last words are above; `glmchat doctor` looks at memory and kernels"),
        )
