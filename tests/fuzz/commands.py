"""Runs command lines in children of one process that has imported them all: what each says, takes and weighs.

As a program it reads one request a line, {"argv", "env", "cwd"}, and answers with one line for each. The program never
starts a thread, so that forking it is safe.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 30.0  # then it hangs
_MODULES = (
    *("glmchat.cli.main", "glmchat.cli.run", "glmchat.cli.models", "glmchat.cli.show", "glmchat.cli.adapters"),
    *("glmchat.cli.pull", "glmchat.cli.history", "glmchat.cli.quantize", "glmchat.cli.mirror", "glmchat.hub.sources"),
    *("glmchat.checkpoints.fit", "glmchat.chat.connect", "glmchat.chat.history.transcript", "huggingface_hub.hf_api"),
    "glmchat.chat.client.endpoint",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """code: the exit code, below zero for a signal. growth: bytes of resident memory above the start.

    processor: seconds of it, with those of its own children; the clock tells more of what else the machine does.
    """

    code: int
    out: str
    err: str
    seconds: float
    processor: float
    growth: int


class Commands:
    """A process that runs command lines. Use as a context."""

    def __enter__(self) -> Commands:
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def run(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path) -> Outcome:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"argv": list(argv), "env": dict(env), "cwd": str(cwd)}) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))


def _child(request: Mapping[str, Any], out: int, err: int) -> None:
    """The command, as its script runs it. Never returns."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        from glmchat.cli import main

        sys.argv = ["glmchat", *request["argv"]]
        main.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _run(request: Mapping[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        child = os.fork()
        if not child:
            _child(request, out.fileno(), err.fileno())
        ended = os.pidfd_open(child)
        if not select.select([ended], [], [], SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
        os.close(ended)
        seconds = time.monotonic() - began
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read(1_000_000).decode("utf-8", "replace"))
        growth = max(0, usage.ru_maxrss - before) * 1024
        code = os.waitstatus_to_exitcode(status)
        spent = {"seconds": seconds, "processor": usage.ru_utime + usage.ru_stime}
        return {"code": code, "out": texts[0], "err": texts[1], **spent, "growth": growth}


def main() -> None:
    from importlib import import_module

    for module in _MODULES:
        import_module(module)
    from glmchat.hub import catalogue

    catalogue.load()
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
