"""How long until something is there: `glmchat --help`, a list, the window's first frame, a one-shot's first token.

The one-shot finds its engine warm, as the second of two does. Best and median of several.

python benchmarks/start_up.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import os
import pty
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZE = {"LINES": "40", "COLUMNS": "120"}
COMMAND = str(Path(sys.executable).parent / "glmchat")


def seconds_of(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([COMMAND, *arguments], cwd="/", capture_output=True, check=True)
    return time.perf_counter() - started


def seconds_to_first_frame(home: str) -> float:
    """From the start of the process to the first screen that shows the prompt's placeholder, on a real terminal."""
    parent, child = pty.openpty()
    started = time.perf_counter()
    process = subprocess.Popen(
        [COMMAND, "run", "smollm2"],
        stdin=child, stdout=child, stderr=child, cwd="/", start_new_session=True,
        env={**os.environ, "GLMCHAT_HOME": home, "TERM": "xterm-256color", "GLMCHAT_LANG": "en", **SIZE},
    )  # fmt: skip
    os.close(child)
    seen = b""
    try:
        while b"Ask anything" not in seen:
            ready, _, _ = select.select([parent], [], [], 60)
            if not ready:
                sys.exit("no frame within a minute")
            seen += os.read(parent, 65536)
        return time.perf_counter() - started
    finally:
        process.kill()
        process.wait()
        os.close(parent)


def seconds_to_first_token() -> float:
    started = time.perf_counter()
    command = [COMMAND, "run", "smollm2", "Count to five"]
    with subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    starter_home = Path(__file__).resolve().parent.parent / ".test-cache"
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "home"
        home.mkdir()
        (home / "data").mkdir()
        (home / "data" / "models").symlink_to(starter_home / "data" / "models")
        (home / "data" / "manifests").symlink_to(starter_home / "data" / "manifests")
        os.environ["GLMCHAT_HOME"] = str(home)
        work = {
            "glmchat --version": lambda: seconds_of("--version"),
            "glmchat --help": lambda: seconds_of("--help"),
            "glmchat list": lambda: seconds_of("list"),
            "first frame of the window": lambda: seconds_to_first_frame(str(home)),
            "first token of a one-shot": seconds_to_first_token,
        }
        seconds_to_first_token()  # starts the engine
        for name, measure in work.items():
            times = [measure() for _ in range(rounds)]
            print(f"{name:28} best {min(times):.2f} s, median {statistics.median(times):.2f} s of {rounds}")
        subprocess.run([COMMAND, "stop", "all"], cwd="/", check=True, capture_output=True)


if __name__ == "__main__":
    main()
