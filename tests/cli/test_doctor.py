"""`glmchat doctor`: facts, and problems with a hint each.

Covers cli/doctor.py, jobs/probe.py.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_machine import NVML, become, card
from tiny_checkpoints import build

from glmchat.chat import shared_engine
from glmchat.cli import doctor as checks
from glmchat.cli.main import run
from glmchat.core import kv_files, locations


@pytest.fixture
def without_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part that imports torch has a test of its own; the others need not wait for it."""
    monkeypatch.setattr(checks, "_engine", lambda trouble: {"device": "cpu"})


def doctor(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run(["doctor", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_tells_versions_device_kernels_paths_and_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor(capsys)
    assert set(found) == {
        "versions",
        "machine",
        "conversation caches",
        "evaluations and runs",
        "engine",
        "paths",
        "history",
        "proxies",
        "servers",
        "terminal",
        "problems",
    }
    assert found["versions"]["glmchat"] and found["versions"]["torch"]
    assert found["engine"]["device"] in ("cpu", "cuda")
    assert {row["bits"] for row in found["engine"]["kernels"]} == {4, 8}
    if found["engine"]["device"] == "cpu":
        assert found["engine"]["not_chosen"]["cuda"]
    assert found["machine"]["physical_cores"] >= 1 and found["machine"]["memory_bytes"] > 0
    assert found["history"]["journal"] == "wal" and found["history"]["network_file_system"] is False
    assert found["problems"] == []


def test_for_people_it_is_plain_lines_on_stdout(without_engine: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert "no problems found" in out and "glmchat:" in out and "Traceback" not in out + err


def test_kernels_and_devices_are_sentences_not_tables_of_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passed_over = {"native-avx512": "this CPU has no AVX-512\x1b[31m"}
    kernels = [{"device": "cpu", "bits": 4, "kernel": "native-avx2", "passed_over": passed_over}]
    found = {"device": "cpu", "not_chosen": {"cuda": "no driver answers"}, "kernels": kernels}
    monkeypatch.setattr(checks, "_engine", lambda trouble: found)
    assert run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  cuda is not used: no driver answers" in lines
    at = lines.index("  4 bits on cpu: native-avx2")
    assert lines[at + 1].startswith("    not native-avx512: this CPU has no AVX-512") and "\x1b" not in lines[at + 1]


def test_open_folders_and_broken_proxies_are_problems_with_hints(
    without_engine: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    locations.data_dir().mkdir(parents=True)
    locations.data_dir().chmod(0o755)
    locations.history_file().write_bytes(b"this is no database, but something else entirely")
    monkeypatch.setenv("HTTPS_PROXY", "ftp://user:secret@proxy")
    found = doctor(capsys)
    told = " ".join(p["message"] for p in found["problems"])
    assert all(p["hint"] for p in found["problems"])
    assert "can be read by others" in told and "history is damaged" in told and "HTTPS_PROXY" in told
    assert "secret" not in json.dumps(found)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_file_of_certificates_that_is_not_there_is_a_problem(
    without_engine: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "company.pem"))
    problems = [one for one in checks.diagnose()["problems"] if "SSL_CERT_FILE" in one["message"]]
    assert len(problems) == 1 and "company.pem" in problems[0]["message"] and problems[0]["hint"]


def test_a_socket_folder_of_somebody_else_is_told(
    without_engine: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="rt"))
    (folder / "glmchat").mkdir()
    os.chown(folder / "glmchat", 12345, 12345)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    assert any("someone else" in p["message"] for p in doctor(capsys)["problems"])


@pytest.mark.parametrize(
    ("environ", "colours"),
    [
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, "truecolor"),
        ({"TERM": "xterm-256color"}, "256"),
        ({"TERM": "linux"}, "16"),
        ({"TERM": "dumb"}, "none"),
        ({"TERM": "xterm-256color", "NO_COLOR": ""}, "none"),
    ],
)
def test_the_terminal_is_read_from_what_it_says_of_itself(environ: Any, colours: Any) -> None:
    assert checks.terminal(environ)["colours"] == colours
    assert checks.terminal({**environ, "TMUX": "/tmp/x", "SSH_TTY": "/dev/pts/1"})["tmux"] is True


def test_an_engine_that_cannot_start_is_a_problem_and_not_a_crash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks.sys, "executable", "/bin/false")
    found = doctor(capsys)
    assert found["engine"] == {} and any("cannot start" in p["message"] for p in found["problems"])


def test_cards_are_told_with_what_keeps_them_from_being_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch was built with CUDA, and would look for the card itself")
    become(monkeypatch, tmp_path, card("RTX 3090", free=20.5))
    monkeypatch.setenv("PYTHONPATH", str(NVML))  # the child reads cards too
    found = doctor(capsys)
    assert found["engine"]["device"] == "cpu" and found["engine"]["driver"] == "580.95.05"
    (told,) = found["engine"]["cards"]
    assert (told["device"], told["name"], told["capability"]) == ("cuda:0", "RTX 3090", "8.6")
    assert told["free_bytes"] == 20_500_000_000
    (problem,) = found["problems"]
    assert "without CUDA" in problem["message"] and "cu130" in problem["hint"]
    assert run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "  cuda:0: RTX 3090, compute capability 8.6, 20.5 GB of 24.0 GB free" in out.splitlines()


def test_a_card_that_cannot_be_used_is_refused_before_an_engine_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = build("llama", tmp_path / "llama")
    become(monkeypatch, tmp_path, card(), driver="535.183.01", cuda=12020)
    monkeypatch.setattr(shared_engine, "start_engine", None)  # none may be started
    for device in ("cuda", "cuda:0", "cuda:0,cuda:1"):
        assert run(["run", str(folder), "hello", "--device", device]) == 2
        err = capsys.readouterr().err
        assert "535.183.01" in err and "580 or later" in err and "cu126" in err and "Traceback" not in err
    assert run(["show", str(folder), "--fit"]) == 0
    told = capsys.readouterr()
    assert "535.183.01" in told.out + told.err and "cu126" in told.out + told.err


def test_an_answer_from_the_cpu_beside_a_card_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch was built with CUDA")
    folder = build("llama", tmp_path / "llama")
    become(monkeypatch, tmp_path, card(), torch_cuda=None)
    monkeypatch.setenv("PYTHONPATH", str(NVML))
    answer = ["run", str(folder), "hello", "--dtype", "float32", "--max-tokens", "2"]
    assert run(answer) == 0
    err = capsys.readouterr().err
    assert "on the CPU: the installed torch was built without CUDA; `glmchat doctor` says what helps" in err
    assert run([*answer, "--device", "cpu"]) == 0
    assert "on the CPU" not in capsys.readouterr().err
    become(monkeypatch, tmp_path)
    assert run(answer) == 0
    assert "on the CPU" not in capsys.readouterr().err


def test_servers_of_the_config_are_listed_and_a_key_that_others_can_read_is_a_problem(
    without_engine: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    key = tmp_path / "box.key"
    key.write_text("sk-secret")
    key.chmod(0o644)
    locations.config_file().parent.mkdir(parents=True, exist_ok=True)
    locations.config_file().write_text(f'[servers.box]\nurl = "http://gpu-box:8000/v1"\nkey_file = "{key}"\n')
    found = doctor(capsys)
    assert found["servers"] == {"box": {"url": "http://gpu-box:8000/v1", "key_file": True, "model": None}}
    assert any("can be read by others" in problem["message"] for problem in found["problems"])
    locations.config_file().write_text("bananas = 1\n")
    assert any("bananas" in problem["message"] for problem in doctor(capsys)["problems"])


@pytest.mark.usefixtures("without_engine")
def test_the_caches_of_conversations_are_shown_with_their_limit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLMCHAT_KV_CACHE", "3GB")
    kv_files.open_folder()
    kv_files.kv_path("a" * 32, "b" * 32).write_bytes(bytes(700))
    shown = doctor(capsys)["conversation caches"]
    assert shown["path"] == str(locations.cache_dir() / "kv") and shown["mode"] == "700"
    assert (shown["files"], shown["size_bytes"], shown["limit_bytes"]) == (1, 700, 3 * 10**9)
