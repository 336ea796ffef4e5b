"""Which answers may leave their cache on the disk, and when the engine is told that nobody is here any more.

Covers what of core/kv_files.py the server asks for: names, bytes, and whose they are.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import Any

import pytest
from fakes import FakeEngine
from polling import wait_until
from running import Running, Serve
from tiny_checkpoints import llamas

from glmchat.chat.engine_process import EngineProcess
from glmchat.core import kv_files
from glmchat.core.engine_options import EngineOptions
from glmchat.core.engine_records import EngineRecord
from glmchat.core.messages import Finished, Message, Sampling

NAME = "0123456789abcdef" * 2


def asked(running: Running, **fields: Any) -> str | None:
    assert running.ask(**fields).status_code == 200
    return running.engine.conversations[-1]


def test_only_a_conversation_that_is_named_may_be_kept(serve: Serve) -> None:
    running = serve()
    assert asked(running) is None
    assert asked(running, keep_as=NAME) == NAME
    assert asked(running, keep_as=None) is None
    assert asked(running, stream=True, keep_as=NAME, n=2) == NAME
    reply = running.client.post("/v1/completions", json={"prompt": "Once", "keep_as": NAME})
    assert reply.status_code == 200 and running.engine.conversations[-1] == NAME


def test_with_the_option_of_serve_every_client_may_be(serve: Serve) -> None:
    running = serve(keep_prompts=True)
    assert asked(running) == kv_files.UNNAMED
    assert asked(running, keep_as=NAME) == NAME


@pytest.mark.parametrize("name", ["", "a", "../" + "a" * 29, "A" * 32, "a" * 31 + "/", 7, True, ["a" * 32], "a" * 33])
def test_a_name_that_could_lead_elsewhere_is_refused_by_the_fields_name(serve: Serve, name: Any) -> None:
    running = serve()
    reply = running.ask(keep_as=name)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "keep_as"
    assert not running.engine.asked


def test_what_came_from_the_disk_is_told_with_the_answer_and_counted(serve: Serve) -> None:
    class Reading(FakeEngine):
        def stream_tokens(self, *given: Any, **options: Any) -> Any:
            for chunk in super().stream_tokens(*given, **options):
                if chunk.finish_reason is not None:
                    brought = {"ids": 100, "bytes": 5000, "seconds": 0.5, "saved": 2.5}
                    object.__setattr__(chunk, "facts", {**chunk.facts, "disk": brought})
                yield chunk

    running = serve(Reading())
    reply = running.ask(keep_as=NAME)
    assert reply.json()["glmchat"]["disk"]["ids"] == 100
    running.ask(keep_as=NAME)
    kv_files.open_folder()
    kv_files.kv_path("a" * 32, NAME).write_bytes(bytes(77))
    rows = dict(line.split() for line in running.client.get("/metrics").text.splitlines() if line[0] != "#")
    assert rows["glmchat_kv_disk_bytes"] == "77"
    assert rows["glmchat_kv_disk_tokens_total"] == "200"
    assert float(rows["glmchat_kv_disk_saved_seconds_total"]) == 5.0


def test_an_answer_without_the_disk_says_nothing_of_it(serve: Serve) -> None:
    assert "disk" not in serve().ask(keep_as=NAME).json()["glmchat"]


def test_the_engine_is_told_when_its_last_user_leaves(serve: Serve, tmp_path: Any) -> None:
    record = EngineRecord(socket=str(tmp_path / "0.sock"), pid=1, key="k", model="m", keep_alive=600.0)
    running = serve(record=record)
    first, second = (lease(running) for _ in range(2))
    first.close()
    assert running.engine.left == 0
    second.close()
    wait_until(lambda: running.engine.left == 1)


def lease(running: Running) -> socket.socket:
    """A program that uses the engine."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(running.uds))
    connection.sendall(b"GET /lease?pid=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    said = b""
    while b"lease" not in said.partition(b"\r\n\r\n")[2]:
        said += connection.recv(1000)
    return connection


@pytest.mark.parametrize("end", ["closed", "killed"])
def test_an_engine_whose_window_closes_at_once_has_written_and_a_killed_one_left_nothing_half(
    end: str, tmp_path: Any
) -> None:
    """The real program, which rests 20 seconds before it writes of itself."""
    folder = llamas.write_folder(tmp_path / "model", max_position_embeddings=2048)
    options = EngineOptions(folder, "tiny", threads=1, kv_cache=10**9)
    question = [Message("user", "Tell me of the sea and the ships. " * 20)]

    def answer(process: EngineProcess) -> Finished:
        process.wait_ready()
        sampling = Sampling(temperature=0, max_tokens=4)
        *_, finished = process.endpoint.stream(question, sampling, conversation=NAME)
        assert isinstance(finished, Finished)
        return finished

    command = (sys.executable, "-P", "-m", "glmchat.serve")
    for _ in range(3):  # it has a second for that, which a disk may need for others
        with EngineProcess(options, command) as first:
            answer(first)
            if end == "killed":
                os.kill(first.pid, signal.SIGKILL)
        if (files := kv_files.kv_files()) or end == "killed":
            break
    assert len(files) == (end == "closed") and all(file.conversation == NAME for file in files)
    with EngineProcess(options, command) as second:
        brought = answer(second).facts.get("disk")
    assert (brought is not None and brought["ids"] > 500) == (end == "closed")
