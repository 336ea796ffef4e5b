"""The line mode on a real pseudo-terminal: it talks, stops, remembers, and never moves the cursor."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from polling import wait_until

from glmchat.chat.history.history import History

Argv = Callable[..., list[str]]


class Terminal:
    """A program on a pseudo-terminal: `wait_for` reads until a text is there, `type` sends a line."""

    def __init__(self, argv: list[str], **environ: str) -> None:
        self._controller, terminal = pty.openpty()
        self.process = subprocess.Popen(
            argv,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=lambda: os.login_tty(0) if hasattr(os, "login_tty") else None,
            env={**os.environ, "TERM": "dumb", **environ},
        )
        os.close(terminal)
        self.seen = ""
        self._at = 0
        self._raw = b""

    def wait_for(self, text: str, seconds: float = 30) -> str:
        deadline = time.monotonic() + seconds
        while text not in self.seen[self._at :]:
            if not select.select([self._controller], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"{text!r} did not come; there was {self.seen[self._at :]!r}")
            try:
                part = os.read(self._controller, 65536)
            except OSError:
                raise AssertionError(f"it ended before {text!r} came; there was {self.seen!r}") from None
            self._raw += part
            self.seen = self._raw.decode("utf-8", "ignore").replace("\r\n", "\n")
        passed = self.seen[self._at :]
        self._at = self.seen.index(text, self._at) + len(text)
        return passed

    def type(self, line: str) -> None:
        os.write(self._controller, line.encode() + b"\n")

    def press(self, key: bytes) -> None:
        os.write(self._controller, key)

    def press_until(self, key: bytes, text: str) -> None:
        """Press as a person does, again if nothing happens: a Ctrl-C while readline draws its prompt waits."""
        for _ in range(20):
            self.press(key)
            with suppress(AssertionError):
                self.wait_for(text, 2)
                return
        raise AssertionError(f"{text!r} did not come; there was {self.seen[self._at :]!r}")

    def end(self) -> int:
        try:
            return self.process.wait(timeout=60)
        finally:
            os.close(self._controller)


@pytest.fixture
def plain(fake_argv: Argv, model: Path) -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def start(*arguments: object, **behaviour: object) -> Terminal:
        started.append(Terminal(fake_argv(behaviour, "run", model, *arguments)))
        started[-1].wait_for("> ")
        return started[-1]

    yield start
    for terminal in started:
        if terminal.process.poll() is None:
            terminal.process.kill()
            terminal.end()


def test_a_conversation_in_lines(plain: Callable[..., Terminal]) -> None:
    terminal = plain(echo=True)  # TERM=dumb chooses this mode by itself
    terminal.type("你好 there")
    terminal.wait_for("\n你好 there\n> ")
    terminal.type("one\\")
    terminal.type("two")
    terminal.wait_for("\none\ntwo\n> ")
    terminal.type("//slash")
    terminal.wait_for("\n/slash\n> ")
    terminal.type("/nonsense")
    terminal.wait_for("there is no command /nonsense")
    terminal.type("/set temp 0.3")
    terminal.wait_for("temperature is 0.3, starting with the next answer")
    terminal.type("/undo")
    terminal.wait_for("undone")
    terminal.type("/context")
    terminal.wait_for("of 4,096")
    terminal.type("/quit")
    assert terminal.end() == 0
    assert not re.search(r"\x1b", terminal.seen)
    with History.default() as history:
        tree = history.load(1)
        assert [m.text for m in tree.path()] == ["你好 there", "你好 there", "one\ntwo", "one\ntwo"]
        assert tree.conversation.settings.sampling == {"temperature": 0.3}


@pytest.mark.parametrize(("titles", "title"), [("local", "Eggs for supper"), ("never", "What can I cook?")])
def test_the_model_names_the_conversation_while_nobody_types_unless_the_setting_forbids_it(
    titles: str, title: str, plain: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLMCHAT_TITLES", titles)
    terminal = plain(pieces=["Eggs ", "for supper"])
    terminal.type("What can I cook?")
    terminal.wait_for("Eggs for supper\n> ")
    with History.default() as history:
        wait_until(lambda: history.load(1).conversation.title == title)
    terminal.type("and then?")
    terminal.wait_for("Eggs for supper\n> ")
    terminal.type("/quit")
    assert terminal.end() == 0


def test_ctrl_c_stops_an_answer_and_continue_goes_on(plain: Callable[..., Terminal]) -> None:
    terminal = plain("--plain", pieces=["word "] * 100, seconds_per_token=0.03)
    terminal.type("go")
    terminal.wait_for("word word word")
    terminal.press(b"\x03")
    terminal.wait_for("Stopped. /continue resumes.")
    with History.default() as history:
        stopped = history.load(1).path()[-1]
    assert stopped.state == "stopped" and 3 <= stopped.text.count("word") < 100
    terminal.wait_for("> ")
    terminal.press_until(b"\x03", "Ctrl+D or /quit")  # at the prompt it ends nothing
    terminal.wait_for("> ")
    terminal.type("/continue")
    terminal.wait_for("word word")
    terminal.wait_for("> ", 60)
    terminal.press(b"\x04")
    assert terminal.end() == 0
    with History.default() as history:
        whole = history.load(1).path()[-1]
    assert whole.state == "complete" and whole.text.startswith(stopped.text) and whole.text.count("word") > 100


def test_a_dead_engine_is_told_and_started_again(plain: Callable[..., Terminal]) -> None:
    terminal = plain(pieces=["word "] * 1000, seconds_per_token=0.02)
    terminal.type("go")
    terminal.wait_for("word")
    next(p for p in psutil.Process(terminal.process.pid).children() if "--lifeline" in p.cmdline()).kill()
    terminal.wait_for("killed")
    terminal.wait_for("> ")
    terminal.type("again")
    terminal.wait_for("Starting the model again")
    terminal.wait_for("word", 60)
    terminal.press(b"\x03")
    terminal.wait_for("Stopped.")
    terminal.type("/quit")
    assert terminal.end() == 0
    with History.default() as history:
        assert [m.state for m in history.load(1).path()] == ["complete", "failed", "complete", "stopped"]


def test_a_bare_word_of_the_demo_is_text_with_a_hint_and_file_asks_for_a_path_to_a_text_of_one_megabyte(
    plain: Callable[..., Terminal], tmp_path: Path
) -> None:
    large = tmp_path / "large.txt"
    large.write_bytes(b"x" * 1_000_001)
    terminal = plain(echo=True)
    terminal.type("clear")
    terminal.wait_for("was sent as text; the command is /clear")
    terminal.wait_for("\nclear\n> ")
    terminal.type("/file")
    terminal.wait_for("/file needs a path")
    terminal.type(f"/file {large}")
    terminal.wait_for(f"{large} is larger than 1.0 MB")
    terminal.type("/bye")
    assert terminal.end() == 0


def test_what_the_windows_commands_do_is_done_in_lines_or_said_to_need_the_window(
    plain: Callable[..., Terminal], tmp_path: Path
) -> None:
    terminal = plain(echo=True)
    terminal.type("/stats")
    terminal.wait_for("there is no answer yet")
    terminal.type("first question")
    terminal.wait_for("\nfirst question\n> ")
    terminal.type("/stats")
    terminal.wait_for("answer tokens: ")
    terminal.type("/regen temperature=0.2")
    terminal.wait_for("\nfirst question\n> ")
    terminal.type("/regen 3")
    terminal.wait_for("need the window")
    terminal.type("/regen temperature=99")
    terminal.wait_for("temperature")
    terminal.type("/save 量化的问题")
    terminal.wait_for("is called 量化的问题")
    terminal.type(f"/export md {tmp_path / 'out.md'}")
    terminal.wait_for("written to")
    terminal.type("/context refuse")
    terminal.wait_for("when the context is full, new questions are refused")
    terminal.type("/adapter")
    terminal.wait_for("adapters, starting with the next answer: none")
    terminal.type("/new")
    terminal.wait_for("A new conversation.")
    terminal.type("/load")
    terminal.wait_for("1  量化的问题")
    terminal.type("/load 1")
    terminal.wait_for("first question")
    terminal.type("/load 99")
    terminal.wait_for("99")
    terminal.type("/compare a b")
    terminal.wait_for("/compare only works in the window")
    terminal.type("/copy")
    terminal.wait_for("select the text with the terminal")
    terminal.type("/complete")
    terminal.wait_for("/complete needs some text")
    terminal.type("/complete Once upon")
    terminal.wait_for("\n> ")
    terminal.type("/bye")
    assert terminal.end() == 0
    assert "first question" in (tmp_path / "out.md").read_text(encoding="utf-8")
    with History.default() as history:
        tree = history.load(1)
        assert tree.conversation.title == "量化的问题"
        assert tree.conversation.settings.context_policy == "refuse"
        assert sum(m.role == "assistant" for m in tree.messages.values()) == 2
