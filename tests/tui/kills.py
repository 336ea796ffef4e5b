"""The real window in a terminal of its own, its engine and itself killed with -9 while an answer streams.

`Life` is one window from start to kill. Each engine it starts says words of its own letter ("c0 c1 c2 …"), so that what
was on the screen at a moment can be compared with what the database holds afterwards.
"""

from __future__ import annotations

import fcntl
import os
import pty
import random
import re
import select
import signal
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pyte
from polling import wait_until

from glmchat.chat.history.history import History
from glmchat.chat.history.rows import StoredMessage

TESTS = Path(__file__).resolve().parents[1]
SIZE = (100, 30)  # columns and rows of the terminal
EMPTY = "Ask anything"  # stands in a prompt in which nothing stands
PROMISE = 1.0  # seconds; what stood on the screen longer than that is in the database
CHILD = """
import itertools, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from fake_server import fake_command
from glmchat.chat.shared_engine import start_engine
from glmchat.chat.launch import LaunchOptions
from glmchat.core.engine_options import EngineOptions
from glmchat.tui.app import GlmchatApp
letters = iter({letters!r})
def start(options):
    letter = next(letters)
    pieces = [f"{{letter}}{{n}} " for n in range(4000)]
    return start_engine(options, command=fake_command(pieces=pieces, seconds_per_token=0.005, context=1_000_000))
engine = EngineOptions(folder=Path("/no"), model="fake")
GlmchatApp(LaunchOptions(engine, sampling={{"max_tokens": 1_000_000}}), start=start).run()
"""


class Life:
    """letters: of the engines it starts, one after the other."""

    def __init__(self, home: Path, letters: str) -> None:
        self.home, self.letters = home, letters
        self.seen: list[tuple[float, str, int]] = []  # when, letter, number of a word on the screen
        self.screen = pyte.Screen(*SIZE)
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            columns, rows = SIZE
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            os.environ.update(GLMCHAT_HOME=str(home), GLMCHAT_LANG="en", TERM="xterm-256color")
            code = CHILD.format(tests=str(TESTS), letters=letters)
            os.execv(sys.executable, [sys.executable, "-P", "-c", code])
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        stream = pyte.ByteStream(self.screen)
        with suppress(OSError):  # the terminal's other end is gone
            while True:
                if not select.select([self.terminal], [], [], 0.1)[0]:
                    continue
                data = os.read(self.terminal, 65536)
                now = time.monotonic()
                stream.feed(data)
                for letter in self.letters:
                    if found := re.findall(rb"\b%s(\d+)" % letter.encode(), data):
                        self.seen.append((now, letter, max(map(int, found))))

    def until(self, holds: Callable[[], object], what: str, seconds: float = 60.0) -> None:
        wait_until(
            holds, seconds, else_=lambda: f"{what}: waited in vain; on the screen stands {self.screen.display!r}"
        )

    def shows(self, text: str) -> bool:
        return any(text in row for row in self.screen.display)

    def keys(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def say(self, line: str) -> None:
        if not self.shows(EMPTY):  # a draft, unsent when the window before was killed
            self.keys("\x15")  # Ctrl+U
            self.ready()
        self.keys(line)
        self.until(lambda: any(row.strip(" │") == line for row in self.screen.display), f"the echo of {line}")
        self.keys("\r")

    def ready(self) -> None:
        self.until(lambda: self.shows(EMPTY), "an empty prompt")

    def go_on(self, letter: str) -> None:
        """/continue, again until the model is there."""

        def goes_on() -> bool:
            self.say("/continue")
            with suppress(AssertionError):
                self.streams(letter, seconds=1.0)
                return True
            return False

        self.until(goes_on, "/continue")

    def streams(self, letter: str, number: int = 0, seconds: float = 60.0) -> None:
        """Until this word of that letter was on the screen."""
        self.until(lambda: any(s == letter and n >= number for _, s, n in self.seen), f"{letter}{number}", seconds)

    def _children(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).children()
        return []

    def kill_engine(self) -> float:
        (engine,) = self._children()
        engine.kill()
        return time.monotonic()

    def kill(self) -> float:
        """The window itself; its engine ends by the pipe that it held."""
        children = self._children()
        os.kill(self.pid, signal.SIGKILL)
        died = time.monotonic()
        os.waitpid(self.pid, 0)
        _, alive = psutil.wait_procs(children, timeout=60)
        assert not alive, "an engine outlived its window"
        self.reader.join(1)
        os.close(self.terminal)
        return died

    def shown(self, letter: str, at: float) -> int:
        """The number of the last word of that letter that was on the screen then; -1 for none."""
        return max((n for when, s, n in self.seen if s == letter and when <= at), default=-1)


def answer_in(home: Path) -> StoredMessage:
    """The last answer as the database has it; the file is whole."""
    with History.open(home / "data" / "history.db") as history:
        assert history.store.rows("PRAGMA integrity_check") == [("ok",)]
        head = history.last()
        assert head is not None
        return history.load(head.id).path()[-1]


def check(answer: StoredMessage, before: str, life: Life, letter: str, died: float) -> float:
    """How old the oldest loss is, in seconds. Raises AssertionError if anything older than a second is missing."""
    assert answer.text.startswith(before), f"what was there before is gone: {before[-60:]!r}, now {answer!r:.600}"
    words = answer.text[len(before) :].split()
    assert words == [f"{letter}{n}" for n in range(len(words))], "words are missing in the middle"
    assert life.shown(letter, died - PROMISE) < len(words), "something older than a second is lost"
    lost = [when for when, s, n in life.seen if s == letter and n >= len(words)]
    return max(0.0, died - min(lost, default=died))


def live_and_die(home: Path, letters: str, before: str, chance: random.Random) -> tuple[str, list[float]]:
    """One window: it goes on with the answer `before` (asks, if that is empty), its engine is killed, it goes on, it is
    killed. Returns the answer as it stands then, and how much was lost each time, in seconds. Two kills."""
    first, second = tuple(letters)
    life = Life(home, letters)
    try:
        life.ready()
        if before:
            life.until(lambda: life.shows("was interrupted"), "the offer to go on")
            life.say("/resume")
            life.until(lambda: not life.shows("new conversation"), "the old conversation")
            life.go_on(first)
        else:
            life.say("question")
        life.streams(first, chance.randrange(10, 300))  # a word every 5 ms
        died = life.kill_engine()
        life.until(lambda: answer_in(home).state == "failed", "the answer's end")
        text = answer_in(home).text
        losses = [check(answer_in(home), before, life, first, died)]
        life.keys("\x1b[15~")  # F5
        life.go_on(second)
        life.streams(second, chance.randrange(10, 300))
    except BaseException:
        life.kill()
        raise
    died = life.kill()
    answer = answer_in(home)
    assert answer.state == "interrupted" and answer.can_continue
    losses.append(check(answer, text, life, second, died))
    return answer.text, losses
