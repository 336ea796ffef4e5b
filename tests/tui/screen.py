"""The whole program in a pseudo-terminal, and its screen as cells: what a person presses and what a person sees."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ, tcgetattr
from typing import Any, Self

import pyte

# Synchronised output: what stands between the two is one frame, and a terminal that knows them shows it at once.
ASKS_FOR_FRAMES, HAS_FRAMES = b"\x1b[?2026$p", b"\x1b[?2026;2$y"
FRAME, FRAME_END = b"\x1b[?2026h", b"\x1b[?2026l"
SECONDS = 20.0  # for what must come; a machine may be busy
COMMAND = Path(__file__).resolve().parent.parent / "cli" / "with_fake_engine.py"
KEYS = {
    "enter": "\r", "esc": "\x1b", "tab": "\t", "up": "\x1b[A", "down": "\x1b[B", "right": "\x1b[C", "left": "\x1b[D",
    "home": "\x1b[H", "end": "\x1b[F", "pgup": "\x1b[5~", "pgdn": "\x1b[6~", "backspace": "\x7f",
    "f1": "\x1bOP", "f2": "\x1bOQ", "f3": "\x1bOR", "f4": "\x1bOS", "f5": "\x1b[15~", "f7": "\x1b[18~",
    "f8": "\x1b[19~", "f9": "\x1b[20~", "ctrl+up": "\x1b[1;5A", "ctrl+home": "\x1b[1;5H",
    **{f"ctrl+{c}": chr(ord(c) - 96) for c in "abcdefghijklmnopqrstuvwxyz"},
}  # fmt: skip


class TerminalSession:
    """`behaviour` is the fake engine's; `arguments` are those of `glmchat`.

    inside: a command that runs it. real: with the engine that a person has.
    """

    def __init__(
        self,
        *arguments: object,
        columns: int = 100,
        rows: int = 30,
        behaviour: Any = None,
        environ: Mapping[str, str] | None = None,
        inside: Sequence[str] = (),
        real: bool = False,
    ) -> None:
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self._unread = b""  # of a frame that is not whole yet
        self._controller, terminal = pty.openpty()
        self.resize(columns, rows)
        command = ("-m", "glmchat") if real else (str(COMMAND), json.dumps(behaviour or {}))
        argv = [*inside, sys.executable, "-P", *command, *map(str, arguments)]
        # Two tests at a time are told a size that is not this terminal's.
        inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        # Nor are the engines of other tests its own. A socket's path has to be short.
        self._sockets = tempfile.TemporaryDirectory(prefix="g", dir="/tmp", ignore_cleanup_errors=True)
        inherited.setdefault("XDG_RUNTIME_DIR", self._sockets.name)
        self.process = subprocess.Popen(
            argv, stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=lambda: os.login_tty(0),
            env={**inherited, "TERM": "xterm-256color", "COLORTERM": "truecolor", **(environ or {})},
        )  # fmt: skip
        os.close(terminal)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(SECONDS)
        os.close(self._controller)
        self._sockets.cleanup()

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        ioctl(self._controller, TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def settings(self) -> list[Any]:
        """Of the terminal: whether it echoes, and the rest."""
        return tcgetattr(self._controller)

    # What a person does.

    def press(self, *keys: str) -> None:
        """Names of KEYS, or characters."""
        for key in keys:
            os.write(self._controller, KEYS.get(key, key).encode())
            self._read(0.05)  # a terminal sends one key, and time passes; Esc and a letter at once would be Alt

    def type(self, text: str) -> None:
        os.write(self._controller, text.encode())

    def paste(self, text: str) -> None:
        os.write(self._controller, f"\x1b[200~{text}\x1b[201~".encode())

    def say(self, text: str) -> None:
        self.type(text)
        end = "".join(text[-5:].split())
        self.until(lambda: end in "".join(self.text.replace("│", "").split()))  # a long line wraps, wherever it is
        self.press("enter")

    # What a person sees.

    @property
    def lines(self) -> list[str]:
        # pyte's own `display` fails where a wide character lost its first cell; the second cell of one holds "".
        cells, columns = self.screen.buffer, range(self.screen.columns)
        rows = ("".join(cells[row][column].data for column in columns) for row in range(self.screen.lines))
        return [row.rstrip() for row in rows]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def row_of(self, text: str) -> int:
        """The first row of the screen that holds it."""
        return next(number for number, line in enumerate(self.lines) if text in line)

    def backgrounds(self, row: int) -> list[str]:
        """The colour behind each cell of a row; of reversed cells their letters' own, which may be the terminal's."""
        cells = (self.screen.buffer[row][column] for column in range(self.screen.columns))
        return [("letters" if cell.fg == "default" else cell.fg) if cell.reverse else cell.bg for cell in cells]

    def until(self, holds: Callable[[], object], seconds: float = SECONDS) -> None:
        """Read on until it holds; fails with the screen."""
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                raise AssertionError(f"it did not come to be; the screen:\n{self.text}")
            self._read(0.05)

    def until_seen(self, *texts: str) -> None:
        self.until(lambda: all(text in self.text for text in texts))

    def until_ready(self) -> None:
        """The prompt is there and the model is loaded."""
        self.until_seen("Ask anything")
        self.until(lambda: "starting" not in self.text and "loading" not in self.text.lower())

    def until_still(self, seconds: float = 0.5) -> None:
        """Nothing has been drawn for so long; for what must not happen."""
        last, before = time.monotonic(), self.text
        while time.monotonic() - last < seconds:
            self._read(0.05)
            if self.text != before:
                last, before = time.monotonic(), self.text

    def until_ended(self, seconds: float = SECONDS) -> int:
        self.until(lambda: self.process.poll() is not None, seconds)
        return self.process.wait()

    def _read(self, seconds: float) -> None:
        if not select.select([self._controller], [], [], seconds)[0]:
            return
        try:
            news = os.read(self._controller, 65536)
        except OSError:  # the program has ended
            self._stream.feed(self._unread)
            self._unread = b""
            return
        if ASKS_FOR_FRAMES in self._unread + news:
            os.write(self._controller, HAS_FRAMES)
        self._unread += news
        end = self._whole()
        self._stream.feed(self._unread[:end])
        self._unread = self._unread[end:]

    def _whole(self) -> int:
        """How many of the bytes are no part of a frame, or of a sequence about frames, whose end is to come."""
        begun = self._unread.rfind(FRAME)
        if begun >= 0 and FRAME_END not in self._unread[begun:]:
            return begun
        cut = (n for n in range(len(FRAME) - 1, 0, -1) if self._unread.endswith((FRAME[:n], ASKS_FOR_FRAMES[:n])))
        return len(self._unread) - next(cut, 0)
