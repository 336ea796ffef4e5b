"""What is asked arrives whole: texts that look like options, a silent stdin, a loop's file, a long line at a terminal.

Covers cli/asking.py.
"""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from polling import wait_until

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Argv = Callable[..., list[str]]


@pytest.mark.parametrize(
    "text", ["- explain this", "-1 + 2 = ?", "-p means what?", "-n 3 is what?", "--help means what?", "-c\tand -s"]
)
def test_a_text_that_begins_with_a_dash_is_asked_as_it_stands(glmchat: Run, model: Path, text: str) -> None:
    assert glmchat("run", model, text, echo=True).stdout == f"{text}\n"
    assert glmchat("run", model, text, "--max-tokens", "100", echo=True).stdout == f"{text}\n"
    assert glmchat("run", "-p", text, model, echo=True).stdout == f"{text}\n"
    assert glmchat("run", model, "--", text, echo=True).stdout == f"{text}\n"


def test_a_value_that_is_attached_to_its_option_stays_there(glmchat: Run, model: Path) -> None:
    assert glmchat("run", model, "-pwhat is it", echo=True).stdout == "what is it\n"
    assert glmchat("run", model, "--prompt=what is it", echo=True).stdout == "what is it\n"
    assert glmchat("run", model, "--system=You are", "hi", "--json").returncode == 0


@pytest.mark.parametrize("word", ["-5", "-n3 is what?", "-x"])
def test_what_is_neither_option_nor_text_is_refused_with_the_way_to_say_it(
    glmchat: Run, model: Path, word: str
) -> None:
    done = glmchat("run", model, word)
    assert done.returncode == 2 and 'glmchat run NAME -- "-5"' in done.stderr


def test_what_stdin_adds_to_a_prompt_is_said(glmchat: Run, model: Path) -> None:
    done = glmchat("run", model, "-p", "review", stdin=b"a diff\n", echo=True)
    assert done.stdout == "review\n\na diff\n" and "7 B from stdin were added" in done.stderr
    assert "added" not in glmchat("run", model, stdin=b"alone\n", echo=True).stderr


def test_an_open_silent_stdin_is_waited_for_and_that_is_said(fake_argv: Argv, model: Path) -> None:
    argv = fake_argv({"echo": True}, "run", model, "hi")
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stderr is not None
    with process:
        assert "waiting for stdin to end" in process.stderr.readline()
        process.stdin.write("late")
        process.stdin.close()
        process.stdin = None
        out, _ = process.communicate(timeout=60)
    assert out == "hi\n\nlate\n"


def test_a_loop_keeps_the_file_that_feeds_it(fake_argv: Argv, model: Path, tmp_path: Path) -> None:
    questions = tmp_path / "questions"
    questions.write_text("one\ntwo\n")
    with questions.open("rb", buffering=0) as stdin:
        os.read(stdin.fileno(), len("one\n"))  # as `read` leaves it
        done = subprocess.run(
            fake_argv({"echo": True}, "run", model, "one"), stdin=stdin, capture_output=True, text=True, check=True
        )
        assert os.read(stdin.fileno(), 100) == b"two\n"
    assert done.stdout == "one\n" and "left to whoever reads that file" in done.stderr
    with questions.open("rb") as stdin:  # from its start it is meant
        argv = fake_argv({"echo": True}, "run", model, "sum up")
        done = subprocess.run(argv, stdin=stdin, capture_output=True, text=True, check=True)
    assert done.stdout == "sum up\n\none\ntwo\n"


READ = "from glmchat.cli.asking import read_stdin; import sys; sys.stdout.write('<' + str(read_stdin(wait=True)) + '>')"


@pytest.mark.parametrize("piped", [True, False])
def test_a_line_that_is_longer_than_a_terminal_passes_on_arrives_whole(piped: bool) -> None:
    ours, theirs = pty.openpty()
    out: Any = subprocess.PIPE if piped else theirs
    child = subprocess.Popen([sys.executable, "-P", "-c", READ], stdin=theirs, stdout=out, stderr=theirs, cwd="/")
    os.close(theirs)
    os.set_blocking(ours, False)
    text = "量a" * 5_000
    screen = b""

    def shows(words: bytes = b"") -> bool:
        nonlocal screen
        with suppress(OSError):  # the child has ended, and its terminal with it
            while select.select([ours], [], [], 0)[0]:
                screen += os.read(ours, 65536)
        return words in screen

    def ends() -> bool:
        """Between two lines readline gives the terminal back for a moment, and a Ctrl+D that comes then is no end."""
        with suppress(OSError):
            os.write(ours, b"\x04")
        shows()
        return child.poll() is not None

    wait_until(lambda: shows(b"Ctrl+D"))
    wait_until(lambda: not termios.tcgetattr(ours)[3] & termios.ICANON)  # keys, not lines, from now on
    data = text.encode() + b"\n"

    def is_typed() -> bool:
        nonlocal data
        with suppress(BlockingIOError):
            data = data[os.write(ours, data[:500]) :]
        shows()  # what is echoed has to go somewhere
        return not data

    wait_until(is_typed)
    wait_until(ends)
    shows()
    os.close(ours)
    if piped:
        assert child.stdout is not None
        with child.stdout:
            result = child.stdout.read().decode()
    else:
        result = "<" + screen.decode(errors="replace").rpartition("<")[2]
    assert result.strip() == f"<{text}>"
