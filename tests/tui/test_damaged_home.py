"""A home whose files are random bytes, and places that never come to an end, as a person at a terminal meets them.

Covers chat/history/database.py, hub/manifests.py, hub/aliases.py, cli/pull.py, tui/talk.py.
"""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from fakes import model_in
from screen import TerminalSession

from glmchat.core import locations

RANDOM = bytes(range(256)) * 40
AT_ONCE = 1.0  # second; from the key to the end
BUSY = 2.0  # seconds more that a machine may take which runs other tests
ANSWERS = {"pieces": ["quick ", "answer"]}


def damaged() -> list[Path]:
    """Everything in a home that glmchat writes by itself, but for the settings."""
    run = locations.data_dir() / "tuning" / "run-1"
    return [
        locations.data_dir() / "history.db",
        locations.manifests_dir() / "x.json",
        locations.adapters_dir() / "poet" / "glmchat.json",
        locations.adapters_dir() / "poet" / "adapter_config.json",
        locations.models_dir() / "tiny-int4" / "glmchat.json",
        locations.models_dir() / "tiny-int4" / "config.json",
        locations.config_dir() / "aliases.json",
        locations.state_dir() / "last-model.json",
        locations.cache_dir() / "vocabularies.json",
        run / "state.json",
        run / "log.jsonl",
    ]


def test_a_window_opens_on_a_home_of_random_bytes_says_what_was_set_aside_and_loses_nothing_else(
    tmp_path: Path,
) -> None:
    model = model_in(tmp_path / "model")
    for path in damaged():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(RANDOM)
    settings, lock = locations.config_dir() / "config.toml", tmp_path / "glmchat.lock"
    settings.write_text('theme = "light"\n')
    lock.write_bytes(RANDOM)
    with TerminalSession("run", model, behaviour=ANSWERS) as window:
        window.until_ready()
        window.until_seen("The history was damaged", "history.db.corrupt-")
        window.say("still here?")
        window.until_seen("quick answer")
        window.press("f4")
        window.until_seen("can be pulled")
        window.press("esc")
        window.until(lambda: "can be pulled" not in window.text)
        assert "Traceback" not in window.text
        window.press("ctrl+q")
        assert window.until_ended() == 0
    aside = list(locations.data_dir().glob("history.db.corrupt-*"))
    assert [path.read_bytes() for path in aside] == [RANDOM]
    rewritten = {"history.db", "last-model.json", "vocabularies.json"}
    assert all(path.read_bytes() == RANDOM for path in damaged() if path.name not in rewritten)
    assert settings.read_text() == 'theme = "light"\n' and lock.read_bytes() == RANDOM
    with TerminalSession("run", model, behaviour=ANSWERS) as window:
        window.until_seen("still here?")


@pytest.mark.parametrize("name", ["config.toml", "models.toml"])
def test_settings_of_random_bytes_are_named_in_one_line_and_stay(name: str, tmp_path: Path) -> None:
    path = locations.config_dir() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(RANDOM)
    with TerminalSession("run", model_in(tmp_path / "model"), behaviour=ANSWERS, columns=200) as window:
        assert window.until_ended() == 2
        window.until_seen(name, "move it out of the way")
        assert len([line for line in window.lines if line]) == 2
    assert path.read_bytes() == RANDOM


# Places without end.

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: "
LIST = HEAD + b"application/json\r\nContent-Length: 9999999\r\n\r\n["
EVENTS = HEAD + b"text/event-stream\r\n\r\n"
WORD = b'data: {"choices":[{"index":0,"delta":{"content":"word "}}]}\n\n'
MODELS = b'{"object": "list", "data": [{"id": "m", "object": "model"}]}'


class Endless:
    """Servers that begin `reply`, then say `forever` again and again, or a letter a minute where that is empty.

    Who asks for models is answered; `asked` is set when anything else was asked for.
    """

    def __init__(self) -> None:
        self.asked, self._over = threading.Event(), threading.Event()
        self._listeners: list[socket.socket] = []

    def serves(self, reply: bytes, forever: bytes = b"") -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        self._listeners.append(listener)
        threading.Thread(target=self._accept, args=(listener, reply, forever), daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    def _accept(self, listener: socket.socket, reply: bytes, forever: bytes) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._answer, args=(connection, reply, forever), daemon=True).start()

    def _answer(self, connection: socket.socket, reply: bytes, forever: bytes) -> None:
        with connection, suppress(OSError):
            if b"GET /v1/models" in connection.recv(65536):
                size = b"application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(MODELS)
                connection.sendall(HEAD + size + MODELS)
                return
            connection.sendall(reply)
            self.asked.set()
            while forever and not self._over.is_set():
                connection.sendall(forever)
            while not self._over.wait(60):
                connection.sendall(b" ")

    def end(self) -> None:
        self._over.set()
        for listener in self._listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()


@pytest.fixture
def endless() -> Iterator[Endless]:
    running = Endless()
    yield running
    running.end()


def seconds_until_ended(window: TerminalSession) -> float:
    began = time.monotonic()
    window.until_ended()
    return time.monotonic() - began


HUBS = {"nothing": b"", "half a head": b"HTTP/1.1 200 OK\r\nX-A: ", "half a list": LIST}


@pytest.mark.parametrize("kind", [*HUBS, "a list without end"])
def test_ctrl_c_ends_a_pull_from_a_hub_without_end_in_one_line(kind: str, endless: Endless) -> None:
    address = endless.serves(HUBS.get(kind, LIST), b"" if kind in HUBS else b'{"a": 1},')
    with TerminalSession("pull", "a/b", "--endpoint", address) as window:
        window.until(endless.asked.is_set)
        window.press("ctrl+c")
        assert seconds_until_ended(window) < AT_ONCE + BUSY
        said = [line for line in window.lines if "glmchat:" in line]
        assert len(said) <= 1 and "Traceback" not in window.text, window.text
        assert window.process.returncode in (-signal.SIGINT, 130), window.text


ANSWERS_WITHOUT_END = {
    "nothing": (EVENTS, b""),
    "a word": (EVENTS + WORD, b""),
    "half a line": (EVENTS + b"data: {", b""),
    "remarks for ever": (EVENTS + WORD, b": " + b"x" * 1000 + b"\n"),
}


@pytest.mark.parametrize("kind", ANSWERS_WITHOUT_END)
def test_esc_stops_an_answer_without_end_and_the_window_goes_on(kind: str, endless: Endless) -> None:
    with TerminalSession("run", "m", "--server", endless.serves(*ANSWERS_WITHOUT_END[kind])) as window:
        window.until_ready()
        window.say("a question")
        window.until(endless.asked.is_set)
        window.press("esc")
        began = time.monotonic()
        window.until_seen("stopped")
        assert time.monotonic() - began < AT_ONCE + BUSY
        assert "Traceback" not in window.text
        window.press("ctrl+q")
        assert seconds_until_ended(window) < AT_ONCE + BUSY
        assert window.process.returncode == 0
