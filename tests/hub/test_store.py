"""Caches as they are found: without links, shared by several users, finished by another program, in a home that is full
or read-only. What counts is what lies on the disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hub_helpers import CONFIG, glmchat, last_json, put_into_cache
from loopback_hub import LoopbackHub

from glmchat.core import locations
from glmchat.core.errors import Failed
from glmchat.hub import manifests, store
from glmchat.hub.lookup import find_installed, list_installed
from glmchat.hub.references import parse

FILES = {
    "config.json": CONFIG,
    "tokenizer.json": b"{}",
    "LICENSE": b"free",
    "license.txt": b"free",  # the same content twice
    "model.safetensors": b"w" * 50_000,
}
OTHER_USER = 20_001
HF_DOWNLOAD = "from huggingface_hub import snapshot_download; import sys; print(snapshot_download(sys.argv[1]))"


@pytest.fixture
def hub(loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    monkeypatch.setenv("HF_ENDPOINT", loopback_hub.url)
    return loopback_hub


def bytes_on_disk(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def download_with_the_hubs_own_tool(name: str) -> Path:
    command = [sys.executable, "-c", HF_DOWNLOAD, name]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.split()[-1])


def row_of(capsys: Any) -> dict[str, Any]:
    return last_json(glmchat(capsys, "list", "--json")[1])[0]


def test_a_cache_without_links_holds_each_model_once_as_the_hubs_own_tool_leaves_it(
    hub: LoopbackHub, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", "1")
    commit = hub.add("acme/tiny", FILES)
    assert glmchat(capsys, "pull", "acme/tiny")[0] == 0
    snapshot = store.snapshot("acme/tiny", commit)
    assert {path.name: path.read_bytes() for path in snapshot.iterdir()} == FILES
    assert not any(path.is_symlink() for path in snapshot.iterdir())
    assert bytes_on_disk(store.repo_folder("acme/tiny")) == sum(map(len, FILES.values())) + len(commit)
    asked = len(hub.requests_for("model.safetensors"))
    assert glmchat(capsys, "pull", "acme/tiny")[0] == 0
    assert glmchat(capsys, "pull", "acme/tiny", "--check")[0] == 0
    assert glmchat(capsys, "verify", "acme/tiny")[0] == 0
    assert len(hub.requests_for("model.safetensors")) == asked  # nothing came twice
    assert download_with_the_hubs_own_tool("acme/tiny") == snapshot
    assert len(hub.requests_for("model.safetensors")) == asked  # the hub's own tool takes it as it is
    damaged = snapshot / "model.safetensors"
    damaged.write_bytes(b"v" + damaged.read_bytes()[1:])
    assert glmchat(capsys, "verify", "acme/tiny")[0] == 3
    assert glmchat(capsys, "pull", "acme/tiny", "--check")[0] == 0
    assert damaged.read_bytes() == FILES["model.safetensors"]
    assert glmchat(capsys, "prune", "--yes")[0] == 0
    assert row_of(capsys)["complete"] is True
    assert glmchat(capsys, "rm", "acme/tiny", "-y")[0] == 0
    assert not snapshot.exists() and list_installed() == []


def test_a_second_revision_in_a_cache_without_links_fetches_only_what_changed(
    hub: LoopbackHub, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", "1")
    first = hub.add("acme/tiny", FILES)
    assert glmchat(capsys, "pull", "acme/tiny")[0] == 0
    second = hub.add("acme/tiny", {**FILES, "tokenizer.json": b'{"new": 1}'})
    assert glmchat(capsys, "pull", "acme/tiny")[0] == 0
    assert len(hub.requests_for("model.safetensors")) == 1
    for commit in (first, second):
        assert (store.snapshot("acme/tiny", commit) / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_links_that_others_need_stay_where_links_are_switched_off_later(
    hub: LoopbackHub, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hub.add("acme/tiny", FILES)
    assert glmchat(capsys, "pull", "acme/tiny")[0] == 0
    monkeypatch.setenv("HF_HUB_DISABLE_SYMLINKS", "1")
    second = hub.add("acme/tiny", {**FILES, "tokenizer.json": b'{"new": 1}'})
    assert glmchat(capsys, "pull", "acme/tiny")[0] == 0
    for commit in (first, second):
        assert (store.snapshot("acme/tiny", commit) / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def half_pull(hub: LoopbackHub, capsys: Any, name: str = "acme/tiny") -> str:
    """A pull that breaks off in the weights; -> the commit."""
    commit = hub.add(name, FILES)
    hub.fault("model.safetensors", times=None, status=404)
    assert glmchat(capsys, "pull", name)[0] != 0
    hub.heal()
    return commit


def test_a_pull_that_another_program_finished_is_whole(hub: LoopbackHub, capsys: Any) -> None:
    half_pull(hub, capsys)
    code, _, err = glmchat(capsys, "run", "acme/tiny", "hi")
    assert code == 1 and "only partly here" in err and "50.0 kB of" in err and "glmchat pull acme/tiny" in err
    download_with_the_hubs_own_tool("acme/tiny")
    assert row_of(capsys)["complete"] is True
    assert glmchat(capsys, "verify", "acme/tiny")[0] == 0
    assert find_installed(parse("acme/tiny")) is not None
    code, _, err = glmchat(capsys, "pull", "acme/tiny")
    assert code == 0 and "is already here" in err


def test_a_link_without_its_blob_is_named_also_where_nobody_wrote_a_record(hub: LoopbackHub, capsys: Any) -> None:
    snapshot = put_into_cache("acme/tiny", "a" * 40, {**FILES, "pytorch_model.bin": b"x"}, ref="main")
    (snapshot / "model.safetensors").resolve().unlink()
    assert row_of(capsys)["complete"] is False
    code, _, err = glmchat(capsys, "run", "acme/tiny", "hi")
    assert code == 1 and "model.safetensors" in err  # and pytorch_model.bin does not answer in its place


def test_a_narrow_pull_that_another_program_widened_is_a_model_and_all_of_it_is_verified(
    hub: LoopbackHub, capsys: Any
) -> None:
    commit = hub.add("acme/tiny", FILES)
    assert glmchat(capsys, "pull", "acme/tiny", "--include", "*.json")[0] == 0
    assert row_of(capsys)["complete"] is False
    download_with_the_hubs_own_tool("acme/tiny")
    assert row_of(capsys)["complete"] is True
    weights = (store.snapshot("acme/tiny", commit) / "model.safetensors").resolve()
    weights.write_bytes(b"v" * 50_000)
    assert glmchat(capsys, "verify", "acme/tiny")[0] == 3


def test_a_name_means_what_main_is_also_after_another_program_moved_it(hub: LoopbackHub, capsys: Any) -> None:
    commits = []
    for number, pull in enumerate((False, False, True)):
        commits.append(hub.add("acme/tiny", {**FILES, "tokenizer.json": b"%d" % number}))
        if pull:
            download_with_the_hubs_own_tool("acme/tiny")
        else:
            assert glmchat(capsys, "pull", "acme/tiny")[0] == 0
    rows = {row.name: row.revision for row in list_installed()}
    assert rows == {
        "acme/tiny": commits[2],
        f"acme/tiny@{commits[0][:12]}": commits[0],
        f"acme/tiny@{commits[1][:12]}": commits[1],
    }
    for name, commit in rows.items():
        found = find_installed(parse(name))
        assert found is not None and found.revision == commit


@pytest.mark.parametrize("with_links", [True, False])
def test_a_cache_that_was_moved_is_judged_where_it_lies_now(
    with_links: bool, hub: LoopbackHub, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add("acme/tiny", FILES)
    assert glmchat(capsys, "pull", "acme/tiny")[0] == 0
    shutil.copytree(locations.hf_cache(), tmp_path / "moved", symlinks=with_links)
    shutil.rmtree(locations.hf_cache())
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "moved"))
    assert row_of(capsys)["complete"] is True
    assert glmchat(capsys, "verify", "acme/tiny")[0] == 0
    assert glmchat(capsys, "pull", "acme/tiny")[0] == 0
    assert len(hub.requests_for("model.safetensors")) == 1


def test_a_home_that_cannot_be_written_costs_the_record_and_not_the_model(
    hub: LoopbackHub, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add("acme/tiny", FILES)
    blocked = tmp_path / "home"
    blocked.mkdir()
    for name in ("data", "state", "cache"):
        (blocked / name).write_text("a file where a folder should be")  # so that root cannot write there either
    monkeypatch.setenv("GLMCHAT_HOME", str(blocked))
    for _ in range(2):
        assert glmchat(capsys, "pull", "acme/tiny")[0] == 0
    row = row_of(capsys)
    assert row["complete"] is True and manifests.read_all() == []
    assert glmchat(capsys, "verify", "acme/tiny")[0] == 0
    assert not locations.can_write(locations.models_dir())


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files to another user")
def test_prune_leaves_alone_what_another_user_began(hub: LoopbackHub, capsys: Any) -> None:
    put_into_cache("acme/whole", "a" * 40, FILES)
    blobs = store.repo_folder("acme/whole") / "blobs"
    long_ago = time.time() - 100_000
    mine: list[Path] = []
    theirs: list[Path] = []
    for owner, files in ((os.getuid(), mine), (OTHER_USER, theirs)):
        for name in (f"{owner:040d}.glmchat.incomplete", f"{owner:040d}.incomplete", f"{owner:064d}"):
            (blobs / name).write_bytes(b"half")
            os.utime(blobs / name, (long_ago, long_ago))
            os.chown(blobs / name, owner, -1)
            files.append(blobs / name)
    assert glmchat(capsys, "prune", "--yes")[0] == 0
    assert not any(path.exists() for path in mine)
    assert all(path.exists() for path in theirs)


def test_a_file_that_cannot_be_written_is_one_error_of_the_tree_where_nothing_can_be_taken_away_either(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(Failed) as caught:
        store.write_whole(tmp_path / "file" / "inside", b"content")
    assert caught.value.code == "disk.write"
