"""A helper process for what a stranger wrote: it has no secrets and a bound on all that it may take, and what goes
wrong in it goes wrong there.

Requests and replies are one line of JSON each; the first line that it writes says that it is ready.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any, TextIO

from glmchat.core.text import one_line

# What a Python needs to start in the place where it stands; nothing else of the environment is a stranger's business.
_PASSED = frozenset(
    {"PATH", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"}
)
_START_SECONDS = 20.0  # a cold interpreter on a busy machine
READY = '{"ready": true}\n'


class Sandbox:
    """One such process, as whoever started it sees it. It ends with this object."""

    def __init__(self, module: str) -> None:
        """module: dotted name of the program. What it writes beside its replies is kept, in case it does not start."""
        passed = {name: value for name, value in os.environ.items() if name in _PASSED}
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._rest = b""
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            cwd="/",
            env={**passed, "PYTHONIOENCODING": "utf-8:surrogatepass"},
        )
        self.stop = weakref.finalize(self, _end, self.process, self._words)

    def obstacle(self) -> str | None:
        """Waits for the process to be ready. Why it is not, in its last words, which may be none; None: it is."""
        if "ready" in self.reply(_START_SECONDS):
            return None
        self._words.seek(0)
        lines = self._words.read(100_000).decode("utf-8", "replace").splitlines()
        self.stop()
        return one_line(next((line for line in reversed(lines) if "rror" in line), "".join(lines[-1:])), 300)

    def send(self, request: Mapping[str, Any]) -> int:
        """Returns the bytes of the request."""
        assert self.process.stdin is not None
        line = json.dumps(request).encode("ascii") + b"\n"
        with suppress(OSError):  # it has died; the missing reply says so
            self.process.stdin.write(line)
            self.process.stdin.flush()
        return len(line)

    def reply(self, seconds: float, largest: int = 2**20) -> dict[str, Any]:
        """The next line; `{"late": …}` after so many seconds, `{"died": true}` from a process that is gone or writes
        more than `largest` bytes."""
        assert self.process.stdout is not None
        descriptor, deadline = self.process.stdout.fileno(), time.monotonic() + seconds
        piece, buffer = self._rest, bytearray(self._rest)
        while b"\n" not in piece:
            left = deadline - time.monotonic()
            if left <= 0 or not _readable(descriptor, left):
                return {"late": f"it takes more than {seconds:.2g} seconds"}
            piece = os.read(descriptor, 2**20)
            if not piece or len(buffer) > largest:
                return {"died": True}
            buffer += piece
        line, _, self._rest = bytes(buffer).partition(b"\n")
        reply = json.loads(line)
        return reply if isinstance(reply, dict) else {"died": True}


def _readable(descriptor: int, seconds: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(seconds))


def _end(process: subprocess.Popen[bytes], words: IO[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout, words):
        if stream is not None:
            with suppress(OSError):
                stream.close()
    process.wait()


# In the process itself ----------------------------------------------------------------------------------------------


def reply_stream() -> TextIO:
    """The real stdout, for replies alone: nothing that a stranger's program could reach writes into it."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return replies


def confine(memory: int, files: int = 16) -> None:
    """Bound what this process may take from now on. memory: bytes of address space; files: open ones."""
    for kind, limit in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, files)):
        try:
            hard = resource.getrlimit(kind)[1]
            bound = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (bound, hard))
        except (ValueError, OSError):  # macOS refuses RLIMIT_AS; the bound on time still holds
            continue
