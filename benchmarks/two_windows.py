"""What two windows on one model take together, beside one: the starter model, an answer in each, shared pages once.

python benchmarks/two_windows.py
"""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

COMMAND = str(Path(sys.executable).parent / "glmchat")
SECONDS = 60.0


class Window:
    """A window of 100x30 on a pseudo-terminal."""

    def __init__(self) -> None:
        self.terminal, child = pty.openpty()
        self.process = subprocess.Popen(
            [COMMAND, "run", "smollm2", "--max-tokens", "64"],
            stdin=child, stdout=child, stderr=child, cwd="/", start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", "GLMCHAT_LANG": "en", "LINES": "30", "COLUMNS": "100"},
        )  # fmt: skip
        os.close(child)
        self.seen = b""

    def until(self, holds: Callable[[], object]) -> None:
        deadline = time.monotonic() + SECONDS
        while not holds():
            if time.monotonic() > deadline:
                sys.exit("it did not come within a minute")
            if select.select([self.terminal], [], [], 0.1)[0]:
                self.seen += os.read(self.terminal, 65536)

    def ask(self) -> None:
        self.until(lambda: b"Ask anything" in self.seen)
        os.write(self.terminal, b"Count to twenty\r")
        self.until(lambda: b"tok/s" in self.seen)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.terminal)


def megabytes(pid: int) -> float:
    """The proportional set size: pages that several processes share count for each with its share."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    return int(next(line for line in rollup.splitlines() if line.startswith("Pss:")).split()[1]) * 1024 / 1e6


def engines() -> list[int]:
    listed = subprocess.run([COMMAND, "ps", "--json"], cwd="/", capture_output=True, text=True, check=True).stdout
    return [int(json.loads(line)["pid"]) for line in listed.splitlines()]


def main() -> None:
    starter_home = Path(__file__).resolve().parent.parent / ".test-cache"
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        data.mkdir()
        for name in ("models", "manifests"):
            (data / name).symlink_to(starter_home / "data" / name)
        os.environ.update(GLMCHAT_HOME=scratch, XDG_RUNTIME_DIR=scratch)
        windows = []
        try:
            for number in (1, 2):
                windows.append(Window())
                windows[-1].ask()
                pids = engines()
                engine, faces = sum(map(megabytes, pids)), [megabytes(window.process.pid) for window in windows]
                total = engine + sum(faces)
                print(
                    f"{number} windows, {len(pids)} engines: {total:.0f} MB; the engine {engine:.0f}, "
                    f"windows {', '.join(f'{face:.0f}' for face in faces)}; {total / engine:.2f} engines"
                )
        finally:
            for window in windows:
                window.end()
            subprocess.run([COMMAND, "stop", "all"], cwd="/", check=False, capture_output=True)


if __name__ == "__main__":
    main()
