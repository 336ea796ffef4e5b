"""`glmchat serve`: what it refuses, and with which words."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from http.client import HTTPConnection, RemoteDisconnected
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fakes import model_in
from tiny_checkpoints import build

from glmchat.cli.main import run
from glmchat.cli.serve import choose_key
from glmchat.core.errors import Usage


def serve(*arguments: str) -> int:
    return run(["serve", *arguments])


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder that looks like a model until somebody loads it."""
    return str(model_in(tmp_path))


def test_a_port_in_use_is_one_line_with_a_hint_and_exit_1(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve(model, "--port", str(port), "--json") == 1
    out, err = capsys.readouterr()
    assert f"port {port} is in use" in err and "--port" in err and "Traceback" not in err
    assert json.loads(out.splitlines()[-1])["code"] == "serve.port_in_use"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "gpu-box"])
def test_without_a_key_only_loopback_is_served(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve("x", "--host", host, "--no-api-key") == 2
    assert "without a key" in capsys.readouterr().err


def test_a_key_comes_from_the_file_the_environment_or_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\n")
    monkeypatch.setenv("GLMCHAT_API_KEY", "from-environment")
    assert choose_key("127.0.0.1", file, no_key=False) == ("from-file", False)
    assert choose_key("127.0.0.1", None, no_key=False) == ("from-environment", False)
    assert choose_key("127.0.0.1", None, no_key=True) == (None, False)
    monkeypatch.delenv("GLMCHAT_API_KEY")
    made, is_new = choose_key("127.0.0.1", None, no_key=False)
    assert is_new and made is not None and len(made) > 30 and made != choose_key("127.0.0.1", None, no_key=False)[0]


def test_a_key_that_no_client_can_send_is_refused_without_showing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLMCHAT_API_KEY", "schlüssel")
    with pytest.raises(Usage) as refused:
        choose_key("127.0.0.1", None, no_key=False)
    assert "schlüssel" not in str(refused.value)
    for words in ("", "  \n"):
        (tmp_path / "empty").write_text(words)
        with pytest.raises(Usage, match="empty"):
            choose_key("127.0.0.1", tmp_path / "empty", no_key=False)
    with pytest.raises(Usage, match="conflict"):
        choose_key("127.0.0.1", tmp_path / "empty", no_key=True)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--quant", "5"], "4 or 8"),
        (["--dtype", "int3"], "float32"),
        (["--context", "3"], "context"),
        (["--port", "x"], "port"),
        (["no-such-model-here"], "no-such-model-here"),
        ([], "no model"),
    ],
)
def test_wrong_words_are_exit_2(arguments: list[str], word: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve(*arguments) == 2
    assert word in capsys.readouterr().err


def test_a_file_that_is_no_model_is_refused_before_there_is_a_key(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + b"\xff" * 200)
    command = [sys.executable, "-P", "-m", "glmchat", "serve", str(broken), "--port", "0"]
    done = subprocess.run(command, cwd="/", env={**os.environ}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 3 and "big-endian" in done.stderr
    assert "key" not in done.stderr and done.stdout == ""


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_own_exit_code(model: Path) -> None:
    command = [sys.executable, "-P", "-m", "glmchat", "serve", str(model), "--port", "0"]
    done = subprocess.run(command, cwd="/", env={**os.environ}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 3, done.stderr
    assert "key (shown only now): glmchat-" in done.stderr and done.stdout == ""


def test_a_server_whose_weights_are_cut_under_it_ends_with_a_sentence(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "model")  # weights of float32 stay mapped
    command = [sys.executable, "-P", "-m", "glmchat", "serve", str(folder), "--no-api-key", "--port", "0", "--json"]
    server = subprocess.Popen(
        [*command, "--dtype", "float32"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    with server:
        try:
            assert server.stdout is not None and server.stderr is not None
            address = urlsplit(json.loads(server.stdout.readline())["url"])
            assert json.loads(server.stdout.readline())["event"] == "ready"
            with (folder / "model.safetensors").open("r+b") as weights:
                weights.truncate(0)
            client = HTTPConnection(str(address.hostname), address.port, timeout=60)
            question = json.dumps({"prompt": "hello", "max_tokens": 2})
            client.request("POST", "/v1/completions", question, {"Content-Type": "application/json"})
            with pytest.raises((RemoteDisconnected, ConnectionResetError)):
                client.getresponse()
            client.close()
            assert server.wait(60) == 3
        finally:
            server.kill()
        said = server.stderr.read()
    assert "cut or replaced while it was being read" in said and "glmchat verify" in said and "Traceback" not in said
