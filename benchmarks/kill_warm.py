"""Kill the window or the warm engine behind it with -9 at random points of an answer: what is lost, what is left?

    python benchmarks/kill_warm.py [--kills 100] [--seed 0] [--seconds 600]

One home, one folder of sockets; each life is a window in a terminal that joins the engine that is there or starts one.
After each kill: what stood on the screen for a second is in the database, which is whole; every engine that lives is
one that `glmchat ps` knows; whoever listens to no socket has none; and the next window answers, by the same engine
where only the window was killed. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "tui"))

from fakes import model_in
from kills import PROMISE, answer_in
from polling import wait_until
from screen import TerminalSession

from glmchat.chat.shared_engine import end_engine
from glmchat.core import engine_records
from glmchat.core.sockets import listens, socket_dir

SPEAKS = {"pieces": [f"w{number} " for number in range(4000)], "seconds_per_token": 0.005, "context": 1_000_000}


class Watched(TerminalSession):
    """Remembers when which word was the last on the screen."""

    seen: tuple[tuple[float, int], ...] = ()

    def _read(self, seconds: float) -> None:
        super()._read(seconds)
        words = re.findall(r"\bw(\d+)\b", self.text)
        if words:
            self.seen += ((time.monotonic(), max(map(int, words))),)

    def shown(self, at: float) -> int:
        return max((word for when, word in self.seen if when <= at), default=-1)


def engines() -> set[int]:
    """The engines that live, whether `ps` knows them or not: of this folder of sockets."""
    folder, found = str(socket_dir()), set()
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or ())
        if "fake_server.py" in line and folder in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.add(process.pid)
    return found


def known() -> set[int]:
    """What `glmchat ps` lists."""
    return {record.pid for record in engine_records.running()}


def live_and_die(home: Path, model: Path, victim: str, chance: random.Random) -> float:
    """One window until one kill. The oldest loss, in seconds. Raises AssertionError for what is wrong."""
    before = known()
    argv = ("run", model, "--keep-alive", 60)
    with Watched(*argv, behaviour=SPEAKS, environ={"XDG_RUNTIME_DIR": os.environ["XDG_RUNTIME_DIR"]}) as window:
        window.until_ready()
        window.say("question")
        word = chance.randrange(10, 300)
        window.until(lambda: window.shown(time.monotonic()) >= word)
        pids = known()
        assert len(pids) == 1 and (not before or pids == before), f"one engine was there: {before}, now {pids}"
        (engine,) = pids
        os.kill(engine if victim == "engine" else window.process.pid, signal.SIGKILL)
        died = time.monotonic()
        if victim == "engine":
            window.until(lambda: answer_in(home).state != "streaming")
            window.press("ctrl+q")
            window.until_ended()
        else:
            window.process.wait(10)
    answer = answer_in(home)
    words = answer.text.split()
    assert words == [f"w{number}" for number in range(len(words))], "words are missing in the middle"
    assert window.shown(died - PROMISE) < len(words), "something older than a second is lost"
    wait_until(lambda: engines() == known(), 10, else_=lambda: f"alive {engines()}, ps knows {known()}")
    assert known() == (set() if victim == "engine" else {engine}), "the engine outlives its window, and nothing else"
    dead = [path.name for path in socket_dir().glob("*.sock") if not listens(path)]
    assert not dead, f"in the way: {dead}"
    lost = [when for when, number in window.seen if number >= len(words) and when <= died]
    return max(0.0, died - min(lost, default=died))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="fewer kills, if they take longer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, began = random.Random(options.seed), time.monotonic()
    losses: dict[str, list[float]] = {"window": [], "engine": []}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kw", dir="/tmp") as folder:
        home = Path(folder) / "home"
        os.environ.update(GLMCHAT_HOME=str(home), XDG_RUNTIME_DIR=folder, GLMCHAT_LANG="en")
        model = model_in(Path(folder) / "model")
        for number in range(options.kills):
            if time.monotonic() - began > options.seconds:
                break
            victim = chance.choice(("window", "engine"))
            try:
                losses[victim].append(live_and_die(home, model, victim, chance))
            except AssertionError as error:
                wrong.append(f"{number}, {victim}: {str(error)[-1500:]}")
        for record in engine_records.running():
            end_engine(record)
        wait_until(lambda: not engines(), 10)
    oldest = max((max(each, default=0.0) for each in losses.values()), default=0.0)
    counts = {f"kills_of_the_{victim}": len(each) for victim, each in losses.items()}
    seconds = round(time.monotonic() - began)
    print(json.dumps({**counts, "oldest_loss_seconds": round(oldest, 3), "seconds": seconds, "wrong": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
