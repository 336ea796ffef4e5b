"""Keystroke to screen, processor and memory of the window while a fake engine streams 300 tokens a second.

    python benchmarks/window_stream.py [--seconds 10] [--rate 300] [--kind prose|code|table|long]
    python benchmarks/window_stream.py --tokens 200000 --rate 4000 --kind prose    # memory over one long answer

The real window runs in a pseudo-terminal of its own process; the fake engine is another process behind the real
server. A key is typed every 100 ms and its echo is looked for in what the window writes. Prints one JSON line a kind.
With --tokens nothing is typed: the memory of the window is read at every tenth of the answer, by the clock of its rate.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import select
import signal
import sqlite3
import struct
import sys
import tempfile
import termios
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
KINDS = {
    "prose": [
        "The ",
        "quick ",
        "brown ",
        "fox ",
        "jumps ",
        "over ",
        "the ",
        "lazy ",
        "dog. ",
        "它跑",
        "得很",
        "快。",
        "\n\n",
    ],
    "code": ["    total ", "+= ", "value ", "* ", "2", "  # ", "comment", "\n"],
    "table": ["| ", "cell", " | ", "值", " | ", "42", " |", "\n"],
    "long": ["word "],
}
HEADS = {"code": "```python\n", "table": "| a | b | c |\n|---|---|---|\n"}
SEEN = {"prose": "lazy", "code": "comment", "table": "cell", "long": "word"}  # on the screen once the answer streams
CHILD = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from fake_server import fake_command
from glmchat.chat.shared_engine import start_engine
from glmchat.chat.launch import LaunchOptions
from glmchat.core.engine_options import EngineOptions
from glmchat.tui.app import GlmchatApp
behaviour = json.loads({behaviour!r})
engine = EngineOptions(folder=Path("/fake/model"), model="fake")
app = GlmchatApp(LaunchOptions(engine, sampling={{"max_tokens": 10_000_000}}),
                 start=lambda options: start_engine(options, command=fake_command(**behaviour)))
app.run()
"""


def spawn(behaviour: dict[str, object], home: str) -> tuple[int, int]:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(GLMCHAT_HOME=home, GLMCHAT_LANG="en", TERM="xterm-256color", COLORTERM="truecolor")
        code = CHILD.format(tests=str(ROOT / "tests"), behaviour=json.dumps(behaviour))
        os.execv(sys.executable, [sys.executable, "-P", "-c", code])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    return pid, terminal


def read(terminal: int, seconds: float) -> bytes:
    """What the window writes until it has been quiet for `seconds` or that time is over."""
    found = b""
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0:
        if select.select([terminal], [], [], left)[0]:
            found += os.read(terminal, 65536)
    return found


def wait_for(terminal: int, text: bytes, seconds: float) -> float:
    """Seconds until `text` is written, or raises SystemExit."""
    started = time.perf_counter()
    tail = b""
    while time.perf_counter() - started < seconds:
        if select.select([terminal], [], [], 0.01)[0]:
            tail = (tail + os.read(terminal, 65536))[-200_000:]
            if text in tail:
                return time.perf_counter() - started
    raise SystemExit(f"the window never wrote {text!r}")


def measure(kind: str, seconds: float, rate: float) -> dict[str, object]:
    unit = KINDS[kind]
    repeats = int((seconds + 12) * rate / len(unit)) + 1
    head = [HEADS[kind]] if kind in HEADS else []
    behaviour = {
        "pieces": [*head, *unit * repeats] if head else unit,  # a command line holds 128 kB
        "repeat": 1 if head else repeats,
        "seconds_per_token": 1 / rate,
        "context": 100_000_000,
    }
    with tempfile.TemporaryDirectory() as home:
        pid, terminal = spawn(behaviour, home)
        first = wait_for(terminal, b"Ask anything", 30)
        read(terminal, 3)
        os.write(terminal, b"go\r")
        wait_for(terminal, SEEN[kind].encode(), 30)
        window = psutil.Process(pid)
        before, at = window.cpu_times(), time.perf_counter()
        rss = window.memory_info().rss
        delays = []
        letters = "QZXJVKWY"
        while time.perf_counter() - at < seconds:
            letter = letters[len(delays) % len(letters)]
            os.write(terminal, letter.encode())
            delays.append(wait_for(terminal, letter.encode(), 10))
            read(terminal, 0.1)
        after, end = window.cpu_times(), time.perf_counter()
        grown = window.memory_info().rss - rss
        os.kill(pid, signal.SIGKILL)
        os.close(terminal)
        os.waitpid(pid, 0)
    delays.sort()
    return {
        "kind": kind,
        "rate": rate,
        "first_frame_seconds": round(first, 3),
        "keystroke_p50_ms": round(delays[len(delays) // 2] * 1000, 1),
        "keystroke_p95_ms": round(delays[int(len(delays) * 0.95)] * 1000, 1),
        "keystrokes": len(delays),
        "cpu_percent": round(100 * (after.user + after.system - before.user - before.system) / (end - at), 1),
        "memory_grown_mb": round(grown / 1e6, 1),
    }


def memory(kind: str, tokens: int, rate: float) -> dict[str, object]:
    """Resident megabytes of the window while one answer grows to `tokens` tokens."""
    unit = KINDS[kind]
    behaviour = {"pieces": unit, "repeat": tokens // len(unit), "seconds_per_token": 1 / rate, "context": 100_000_000}
    with tempfile.TemporaryDirectory() as home:
        pid, terminal = spawn(behaviour, home)
        wait_for(terminal, b"Ask anything", 30)
        read(terminal, 3)
        os.write(terminal, b"go\r")
        wait_for(terminal, SEEN[kind].encode(), 30)
        window = psutil.Process(pid)
        started, before = time.perf_counter(), window.cpu_times()
        samples = []
        while said(home) is not None:
            read(terminal, 1.0)
            samples.append((said(home) or tokens, round(window.memory_info().rss / 1e6, 1)))
            if time.perf_counter() - started > 20 * tokens / rate:
                raise SystemExit("the answer never ended")
        seconds, after = time.perf_counter() - started, window.cpu_times()
        os.kill(pid, signal.SIGKILL)
        os.close(terminal)
        os.waitpid(pid, 0)
    tenths = [next(mb for at, mb in samples if at >= tokens * part // 10) for part in range(1, 11)]
    return {
        "kind": kind,
        "tokens": tokens,
        "rate": round(tokens / seconds),
        "memory_mb_at_each_tenth": tenths,
        "cpu_percent": round(100 * (after.user + after.system - before.user - before.system) / seconds, 1),
    }


def said(home: str) -> int | None:
    """Tokens of the running answer that are in the database; None once it has ended."""
    path = Path(home) / "data" / "history.db"
    with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as database:
        row = database.execute("SELECT id FROM message WHERE state = 'streaming'").fetchone()
        if row is None:
            return None
        sizes = database.execute("SELECT sum(length(token_ids)) FROM piece WHERE message = ?", row).fetchone()
    return int(sizes[0] or 0) // 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rate", type=float, default=300)
    parser.add_argument("--kind", choices=list(KINDS), action="append")
    parser.add_argument("--tokens", type=int, help="measure memory over one answer of that length instead")
    chosen = parser.parse_args()
    if chosen.tokens:
        for kind in chosen.kind or ["prose"]:
            print(json.dumps(memory(kind, chosen.tokens, chosen.rate)), flush=True)
        return
    for kind in chosen.kind or list(KINDS):
        print(json.dumps(measure(kind, chosen.seconds, chosen.rate)), flush=True)


if __name__ == "__main__":
    main()
