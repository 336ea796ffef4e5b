"""How long until something is there: `glmchat --help`, a list, the window, its last conversation, a one-shot's token.

The one-shot finds its engine warm, as the second of two does; the window has a conversation of yesterday, which the
bare `glmchat` lists and `run -c` opens. Best and median of several, of a program that has its byte code, as an
installed one has: each thing is started once before it is measured.

python benchmarks/start_up.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
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
TITLE, ANSWER = "Rivers", "Danube"
TALK = [{"role": "user", "content": TITLE}, {"role": "assistant", "content": ANSWER}]


def seconds_of(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([COMMAND, *arguments], cwd="/", capture_output=True, check=True)
    return time.perf_counter() - started


def seconds_until_seen(text: str, *arguments: str) -> float:
    """From the start of the process to the first screen that shows the text, on a real terminal."""
    parent, child = pty.openpty()
    started = time.perf_counter()
    process = subprocess.Popen(
        [COMMAND, *arguments], stdin=child, stdout=child, stderr=child, cwd="/", start_new_session=True,
        env={**os.environ, "TERM": "xterm-256color", "GLMCHAT_LANG": "en", **SIZE},
    )  # fmt: skip
    os.close(child)
    seen = b""
    try:
        while text.encode() not in seen:
            ready, _, _ = select.select([parent], [], [], 60)
            if not ready:
                sys.exit(f"{text!r} was not seen within a minute")
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
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        work = {
            "glmchat --version": lambda: seconds_of("--version"),
            "glmchat --help": lambda: seconds_of("--help"),
            "glmchat list": lambda: seconds_of("list"),
            "first frame of the window": lambda: seconds_until_seen("Ask anything", "run", "smollm2"),
            "last conversation, listed": lambda: seconds_until_seen(TITLE),
            "last conversation, opened": lambda: seconds_until_seen(ANSWER, "run", "-c"),
            "first token of a one-shot": seconds_to_first_token,
        }
        seconds_to_first_token()  # starts the engine
        talk = Path(scratch) / "talk.json"
        talk.write_text(json.dumps({"model": "smollm2", "messages": TALK}), encoding="utf-8")
        subprocess.run([COMMAND, "history", "import", str(talk)], cwd="/", check=True, capture_output=True)
        for name, measure in work.items():
            measure()
            times = [measure() for _ in range(rounds)]
            print(f"{name:28} best {min(times):.2f} s, median {statistics.median(times):.2f} s of {rounds}")
        subprocess.run([COMMAND, "stop", "all"], cwd="/", check=True, capture_output=True)


if __name__ == "__main__":
    main()
