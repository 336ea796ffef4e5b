"""The terminal goes away in the middle of an answer: a real pseudo-terminal is closed under the real program.

Covers chat/hangup.py, cli/attach.py.
"""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from polling import wait_until

from glmchat.chat.history.history import History
from glmchat.chat.history.rows import StoredMessage
from glmchat.core import locations

Argv = Callable[..., list[str]]
ENDS = 60  # seconds in which a process has ended on any machine
SLOW = {"pieces": ["word "], "seconds_per_token": 0.02}


class OnTerminal:
    """A program on a terminal that can be taken away, as sshd does when the line breaks.

    controlling: it is the one that the kernel sends SIGHUP for.
    """

    def __init__(self, argv: list[str], controlling: bool = True, **environ: str) -> None:
        self.controller, terminal = pty.openpty()
        self.process = subprocess.Popen(
            argv,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            preexec_fn=(lambda: os.login_tty(0)) if controlling else os.setsid,
            env={**os.environ, "COLUMNS": "80", "LINES": "24", **environ},
        )
        os.close(terminal)
        self.seen = b""

    def wait_for(self, text: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while text.encode() not in self.seen:
            if not select.select([self.controller], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"{text!r} did not come; there was {self.seen[-2000:]!r}")
            try:
                self.seen += os.read(self.controller, 65536)
            except OSError:
                raise AssertionError(f"it ended before {text!r} came; there was {self.seen[-2000:]!r}") from None

    def type(self, text: str) -> None:
        os.write(self.controller, text.encode())

    def hang_up(self) -> None:
        os.close(self.controller)

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()


@pytest.fixture
def enough(tmp_path: Path) -> Path:
    """The fake goes on with its answer until this file is there."""
    return tmp_path / "enough"


@pytest.fixture
def on_terminal(fake_argv: Argv, enough: Path) -> Iterator[Callable[..., OnTerminal]]:
    started: list[OnTerminal] = []

    def start(*arguments: object, term: str = "xterm-256color", controlling: bool = True) -> OnTerminal:
        argv = fake_argv({**SLOW, "until": str(enough)}, *arguments)
        started.append(OnTerminal(argv, controlling, TERM=term))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait(ENDS)


@pytest.fixture
def attached(fake_argv: Argv) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """`glmchat attach` off a terminal, once it reads along."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        reader = subprocess.Popen(
            fake_argv({}, "attach"), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
        )
        started.append(reader)
        assert reader.stderr is not None and "following" in reader.stderr.readline()
        assert reader.stderr.readline() == "> go\n"
        return reader

    yield start
    for one in started:
        one.kill()
        one.communicate()


def answer_of(conversation: int = 1) -> StoredMessage:
    with History.default() as history:
        return history.load(conversation).path()[-1]


def ask(terminal: OnTerminal, mode: str) -> None:
    """Ask, and wait until the answer is under way."""
    terminal.wait_for("> " if mode == "plain" else "commands")
    terminal.type("go" + ("\n" if mode == "plain" else "\r"))
    terminal.wait_for("word word word")


@pytest.mark.parametrize("mode", ["window", "plain"])
def test_a_closed_terminal_ends_the_chat_and_keeps_what_was_said(
    on_terminal: Callable[..., OnTerminal], model: Path, mode: str
) -> None:
    terminal = on_terminal("run", model, *(["--plain"] if mode == "plain" else []))
    ask(terminal, mode)
    engines = terminal.children()
    terminal.hang_up()
    assert terminal.process.wait(ENDS) == 129
    assert engines and not psutil.wait_procs(engines, ENDS)[1]
    answer = answer_of()
    assert answer.state == "stopped" and answer.can_continue and answer.text.startswith("word word word")


@pytest.mark.parametrize("mode", ["window", "plain"])
def test_so_does_one_for_which_no_signal_comes(on_terminal: Callable[..., OnTerminal], model: Path, mode: str) -> None:
    """As under a supervisor or in a container, where the terminal is nobody's controlling one."""
    terminal = on_terminal("run", model, *(["--plain"] if mode == "plain" else []), controlling=False)
    ask(terminal, mode)
    engines = terminal.children()
    terminal.hang_up()
    terminal.process.wait(ENDS)
    assert engines and not psutil.wait_procs(engines, ENDS)[1]
    answer = answer_of()
    assert answer.state == "stopped" and answer.can_continue and answer.text.startswith("word word word")


@pytest.mark.parametrize("mode", ["window", "plain", "once"])
def test_an_answer_is_finished_without_its_terminal_and_attach_reads_along(
    on_terminal: Callable[..., OnTerminal],
    attached: Callable[[], subprocess.Popen[str]],
    enough: Path,
    model: Path,
    mode: str,
) -> None:
    flags = {"window": [], "plain": ["--plain"], "once": ["-p", "go"]}[mode]
    terminal = on_terminal("run", model, "--finish-on-hangup", *flags)
    if mode == "once":
        terminal.wait_for("word word word")
    else:
        ask(terminal, mode)
    engines = terminal.children()
    terminal.hang_up()
    (log,) = wait_for_log()
    reader = attached()
    assert terminal.process.poll() is None and all(engine.is_running() for engine in engines)
    enough.touch()
    said, _ = reader.communicate(timeout=ENDS)
    assert terminal.process.wait(ENDS) == 129  # it ends by itself, and its engine with it
    assert not psutil.wait_procs(engines, ENDS)[1]
    answer = answer_of()
    assert answer.state == "complete" and answer.owner is None
    assert said == answer.text + "\n"
    assert log.stat().st_mode & 0o777 == 0o600 and "\x1b" not in log.read_text()


def wait_for_log() -> list[Path]:
    return wait_until(lambda: list(locations.logs_dir().glob("chat-*.log")))


def test_attach_takes_the_conversation_over_when_the_answer_is_finished(
    on_terminal: Callable[..., OnTerminal], enough: Path, model: Path
) -> None:
    terminal = on_terminal("run", model, "--finish-on-hangup", "--plain")
    ask(terminal, "plain")
    terminal.hang_up()
    elsewhere = on_terminal("attach", term="dumb")
    elsewhere.wait_for("following")
    enough.touch()
    elsewhere.wait_for("is ready")
    elsewhere.type("and then?\n")
    elsewhere.wait_for("and then?\r\nword \r\n> ")
    elsewhere.type("/quit\n")
    assert elsewhere.process.wait(ENDS) == 0
    with History.default() as history:
        said = [(m.role, m.state) for m in history.load(1).path()]
    assert said == [("user", "complete"), ("assistant", "complete")] * 2


def test_leaving_attach_with_ctrl_c_leaves_the_answer_alone(
    on_terminal: Callable[..., OnTerminal],
    attached: Callable[[], subprocess.Popen[str]],
    enough: Path,
    model: Path,
) -> None:
    terminal = on_terminal("run", model, "--finish-on-hangup", "--plain")
    ask(terminal, "plain")
    terminal.hang_up()
    reader = attached()
    reader.send_signal(signal.SIGINT)
    assert reader.wait(ENDS) == 130
    assert terminal.process.poll() is None
    enough.touch()
    assert terminal.process.wait(ENDS) == 129
    assert answer_of().state == "complete"


@pytest.mark.parametrize("mode", ["window", "plain"])
def test_leaving_attach_says_how_to_end_the_answer_and_that_keeps_what_was_said(
    on_terminal: Callable[..., OnTerminal], attached: Callable[[], subprocess.Popen[str]], model: Path, mode: str
) -> None:
    terminal = on_terminal("run", model, "--finish-on-hangup", *(["--plain"] if mode == "plain" else []))
    ask(terminal, mode)
    engines = terminal.children()
    terminal.hang_up()
    reader = attached()
    assert reader.stdout is not None and reader.stdout.read(5) == "word "  # so it is in the database
    reader.send_signal(signal.SIGINT)
    _, words = reader.communicate(timeout=ENDS)
    pid = re.search(r"`kill (\d+)` stops the answer", words)
    assert pid is not None and int(pid[1]) == terminal.process.pid
    os.kill(int(pid[1]), signal.SIGTERM)
    assert terminal.process.wait(ENDS) == 143
    assert engines and not psutil.wait_procs(engines, ENDS)[1]
    answer = answer_of()
    assert answer.state == "stopped" and answer.can_continue and answer.text.startswith("word word word")


@pytest.mark.parametrize("mode", ["window", "plain", "once"])
def test_kill_ends_the_chat_and_keeps_every_word_that_was_shown(
    on_terminal: Callable[..., OnTerminal], model: Path, mode: str
) -> None:
    terminal = on_terminal("run", model, *{"window": [], "plain": ["--plain"], "once": ["-p", "go"]}[mode])
    if mode == "once":
        terminal.wait_for("word word word")
    else:
        ask(terminal, mode)
    engines = terminal.children()
    terminal.process.terminate()
    assert terminal.process.wait(ENDS) == 143
    assert engines and not psutil.wait_procs(engines, ENDS)[1]
    answer = answer_of()
    assert answer.state == "stopped" and answer.can_continue and answer.text.startswith("word word word")


def test_kill_ends_plain_mode_at_its_prompt(on_terminal: Callable[..., OnTerminal], model: Path) -> None:
    terminal = on_terminal("run", model, "--plain")
    terminal.wait_for("> ")
    engines = terminal.children()
    terminal.process.terminate()
    terminal.process.wait(ENDS)
    assert engines and not psutil.wait_procs(engines, ENDS)[1]


def test_with_nothing_saved_an_answer_that_nobody_could_read_is_not_finished(
    on_terminal: Callable[..., OnTerminal], model: Path
) -> None:
    terminal = on_terminal("run", model, "--finish-on-hangup", "--plain", "--no-history")
    ask(terminal, "plain")
    terminal.hang_up()
    assert terminal.process.wait(ENDS) == 129


def test_attach_without_a_running_answer_says_so(fake_argv: Argv) -> None:
    with History.default() as history:
        tree = history.new()
        history.append(tree, "user", "question")
    done = subprocess.run(
        fake_argv({}, "attach"), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "" and "no answer is being written" in done.stderr
