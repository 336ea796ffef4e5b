"""A server that goes away under a window and comes back: a real one on loopback, killed and started again.

Covers tui/connection.py.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fakes import model_in
from foreign_server import deaf
from hub_helpers import COMMIT_A
from parrot import Handler, Server
from screen import TerminalSession

from glmchat.core import locations


@contextmanager
def running(port: int = 0) -> Iterator[tuple[int, int]]:
    """(port, process)."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("parrot.py")), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline()), process.pid
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("lang", "columns", "rows", "lost", "back"),
    [
        ("en", 80, 24, "server not reachable", "the server answers again"),
        ("zh", 120, 36, "连不上服务器", "服务器恢复了"),
    ],
)
def test_a_killed_server_is_said_and_the_conversation_goes_on_when_it_is_back(
    lang: str, columns: int, rows: int, lost: str, back: str
) -> None:
    with running() as (port, pid):
        locations.config_file().parent.mkdir(parents=True, exist_ok=True)
        locations.config_file().write_text(f'[servers.box]\nurl = "http://127.0.0.1:{port}"\nmodel = "parrot"\n')
        with TerminalSession("--lang", lang, "run", "--server", "box", columns=columns, rows=rows) as terminal:
            terminal.until_seen("parrot")
            terminal.say("alpha")
            terminal.until_seen("parrot heard: alpha")
            terminal.until_still()
            os.kill(pid, signal.SIGKILL)
            terminal.say("bravo")
            terminal.until(lambda: lost in terminal.lines[-1])
            terminal.say("charlie")
            terminal.until_still()
            assert "parrot heard: charlie" not in terminal.text
            with running(port):
                terminal.until_seen(back)
                terminal.until_seen("parrot heard: bravo")  # two questions without an answer between are one message
                terminal.until(lambda: "charlie" in terminal.text.partition("parrot heard: bravo")[2])
                assert lost not in terminal.lines[-1]
                terminal.press("ctrl+home")
                terminal.until_seen("parrot heard: alpha")  # nothing of the conversation is lost


@pytest.mark.parametrize(("lang", "columns", "rows"), [("en", 80, 24), ("zh", 120, 36)])
def test_the_models_of_a_server_are_listed_and_switched_and_the_conversation_goes_on(
    lang: str, columns: int, rows: int
) -> None:
    with running() as (port, _):
        arguments = ("--lang", lang, "run", "parrot", "--server", f"http://127.0.0.1:{port}")
        with TerminalSession(*arguments, columns=columns, rows=rows) as terminal:
            terminal.until(lambda: "parrot" in terminal.lines[-1])
            terminal.say("alpha")
            terminal.until_seen("parrot heard: alpha")
            terminal.until_still()
            terminal.press("f4")
            terminal.until_seen("raven", "poet")
            terminal.press("down", "enter")
            terminal.until(lambda: "raven" in terminal.lines[-1])
            terminal.say("bravo")
            terminal.until_seen("raven heard: bravo", "alpha")
            terminal.until_still()
            terminal.say("/model poet")
            terminal.until_seen("/adapter poet")
            terminal.say("/model nobody")
            terminal.until(lambda: "nobody" in terminal.text and "parrot, raven" in terminal.text)
            terminal.say("/model parrot")
            terminal.until(lambda: "parrot" in terminal.lines[-1])


@pytest.mark.parametrize(("columns", "rows"), [(40, 12), (80, 24)])
def test_the_list_of_models_has_the_servers_of_the_config(tmp_path: Path, columns: int, rows: int) -> None:
    with running() as (port, _), running() as (other, _):
        locations.config_file().parent.mkdir(parents=True, exist_ok=True)
        locations.config_file().write_text(
            f'[servers.box]\nurl = "http://127.0.0.1:{port}"\nmodel = "parrot"\n'
            f'[servers.hut]\nurl = "http://127.0.0.1:{other}"\nmodel = "raven"\n'
        )
        with TerminalSession("run", model_in(tmp_path / "model"), columns=columns, rows=rows) as terminal:
            terminal.until_ready()
            terminal.press("f4")
            terminal.until_seen("can be pulled")
            terminal.press("end")
            terminal.until_seen("servers", "▸   hut")
            terminal.press("v", "d", "4", "u")  # of models on this machine
            terminal.press("up")
            terminal.until_seen("▸   box")
            terminal.press("enter")
            terminal.until(lambda: "parrot" in terminal.lines[-1])
            terminal.say("alpha")
            terminal.until_seen("parrot heard: alpha")
            terminal.until_still()
            terminal.press("f4")
            terminal.until_seen("raven", "hut")
            terminal.press("end", "up")
            terminal.until_seen("▸   hut")
            terminal.press("enter")
            terminal.until(lambda: "raven" in terminal.lines[-1])
            terminal.press("f7")
            terminal.until_seen("Adapters for raven")


def test_another_server_of_the_config_is_switched_to_and_one_that_goes_while_nothing_is_asked_is_noticed() -> None:
    with running() as (port, _), running() as (other, pid):
        locations.config_file().parent.mkdir(parents=True, exist_ok=True)
        locations.config_file().write_text(
            f'[servers.box]\nurl = "http://127.0.0.1:{port}"\nmodel = "parrot"\n'
            f'[servers.hut]\nurl = "http://127.0.0.1:{other}"\nmodel = "raven"\n'
            f'[servers.den]\nurl = "http://127.0.0.1:{other}"\nkey_file = "/nowhere/key"\n'
        )
        with TerminalSession("run", "--server", "box") as terminal:
            terminal.until(lambda: "parrot" in terminal.lines[-1])
            terminal.say("alpha")
            terminal.until_seen("parrot heard: alpha")
            terminal.until_still()
            terminal.say("/adapter nobody")
            terminal.until_seen("the server has no adapter nobody", "it has: poet")
            terminal.say("/model den")
            terminal.until_seen("the key file /nowhere/key cannot be read")
            assert "parrot" in terminal.lines[-1]  # what is refused changes nothing
            terminal.say("/model hut")
            terminal.until(lambda: "raven" in terminal.lines[-1])
            terminal.say("bravo")
            terminal.until_seen("raven heard: bravo")
            terminal.until_still()
            os.kill(pid, signal.SIGKILL)
            terminal.until(lambda: "server not reachable" in terminal.lines[-1], 60)
            with running(other):
                terminal.until_seen("the server answers again")
                terminal.say("/model box:raven")
                terminal.say("charlie")  # typed at once, and meant for the model that is being looked for
                terminal.until_seen("raven heard: charlie")
                terminal.until_still()
                terminal.say("/model box:nobody")
                terminal.until_seen("box has no model nobody", "it has: parrot, raven")
                assert "raven" in terminal.lines[-1] and "Esc stop" not in terminal.text
                terminal.say("/model box:poet")
                terminal.until_seen("/adapter poet")
                terminal.say("delta")
                terminal.until_seen("raven heard: delta")
            terminal.until_still()
            terminal.press("ctrl+home")
            terminal.until_seen("parrot heard: alpha")


def test_a_server_of_the_config_that_is_away_leaves_the_model_that_answers(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        locations.config_file().parent.mkdir(parents=True, exist_ok=True)
        locations.config_file().write_text(f'[servers.box]\nurl = "http://127.0.0.1:{taken.getsockname()[1]}"\n')
        with TerminalSession("run", model_in(tmp_path / "model")) as terminal:
            terminal.until_ready()
            for words in ("/model box", "/model box:raven"):
                terminal.say(words)
                terminal.until_seen("nothing is listening at")
                terminal.until(lambda: "Esc stop" not in terminal.text)
                terminal.say(f"hello {words[-3:]}")
                terminal.until(lambda words=words: "one two" in terminal.text.rpartition(words[-3:])[2])  # type: ignore[misc]
                terminal.until_still()


@contextmanager
def holding() -> Iterator[tuple[str, threading.Event]]:
    """A server whose list of models begins, and ends when the event is set."""
    goes_on = threading.Event()

    class Slow(Handler):
        def handle(self) -> None:
            while not goes_on.wait(0.05):
                try:
                    if not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                        return  # the client hung up
                except BlockingIOError:
                    pass
                except OSError:
                    return
            super().handle()

    with Server(("127.0.0.1", 0), Slow) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", goes_on
        finally:
            goes_on.set()
            server.shutdown()


SOON = 4.0  # seconds: a second, and a machine that others use; the server would be waited for more than 10


def test_esc_takes_back_the_wait_for_a_server_and_f5_asks_it_again() -> None:
    with holding() as (url, goes_on), TerminalSession("run", "parrot", "--server", url) as terminal:
        terminal.until(lambda: "asking the server" in terminal.lines[-1])
        terminal.press("esc")
        terminal.until(lambda: "not connected · F5" in terminal.lines[-1] and "stopped" in terminal.text, SOON)
        goes_on.set()
        terminal.press("f5")
        terminal.until(lambda: terminal.lines[-1].strip().startswith("parrot"))
        terminal.say("alpha")
        terminal.until_seen("parrot heard: alpha")
        terminal.until(lambda: "thinking" not in terminal.lines[-1] and "answering" not in terminal.lines[-1])
        goes_on.clear()
        for question in ("/model raven", "/adapter poet"):
            before = terminal.text.count("stopped")
            terminal.say(question)
            terminal.until(lambda: "asking the server" in terminal.lines[-1])
            terminal.press("esc")
            terminal.until(lambda b=before: terminal.text.count("stopped") > b, SOON)  # type: ignore[misc]
            assert "parrot" in terminal.lines[-1]
        terminal.press("ctrl+q")
        assert terminal.until_ended(SOON) == 0


@pytest.mark.parametrize("act", ["quit", "SIGTERM"])
def test_a_window_ends_at_once_while_it_waits_for_a_server_that_makes_no_connection(act: str) -> None:
    with deaf() as url, TerminalSession("run", "parrot", "--server", url) as terminal:
        terminal.until(lambda: "asking the server" in terminal.lines[-1])
        if act == "quit":
            terminal.press("ctrl+q")
        else:
            os.kill(terminal.process.pid, signal.SIGTERM)
        terminal.until_ended(SOON)


@pytest.mark.parametrize("act", ["esc", "SIGTERM"])
def test_the_plan_of_a_pull_does_not_wait_for_a_hub(act: str) -> None:
    locations.user_catalogue().parent.mkdir(parents=True, exist_ok=True)
    locations.user_catalogue().write_text(
        '[[model]]\nname = "aaa"\nlabel = "main"\nfamily = "llama"\nquant = "none"\nparameters = 9\ncontext = 9\n'
        f'languages = ["en"]\n[[model.source]]\nkind = "hf"\nrepo = "a/b"\nrevision = "{COMMIT_A}"\n'
    )
    with holding() as (url, _), TerminalSession("run", environ={"HF_ENDPOINT": url}) as terminal:
        terminal.until_seen("can be pulled", "aaa")
        terminal.until_still()
        for _ in range(terminal.row_of("aaa") - terminal.row_of("can be pulled") - 1):
            terminal.press("down")
        terminal.press("enter")
        terminal.until_seen("planning", "Esc stops it")
        if act == "esc":
            terminal.press("esc")
            terminal.until(lambda: "stopped" in terminal.text and "Esc closes" in terminal.text, SOON)
        else:
            os.kill(terminal.process.pid, signal.SIGTERM)
            terminal.until_ended(SOON)
