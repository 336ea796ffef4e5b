"""Clones without git-lfs: pointers are recognised, and replaced in place by exactly the objects they name.

Covers checkpoints/weight_files.py, hub/pull_into.py.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hub_helpers import glmchat
from hypothesis import given
from hypothesis import strategies as st
from loopback_hub import LoopbackHub, Synthetic

from glmchat.checkpoints.weight_files import Pointer, parse_pointer, parse_pointer_bytes, pointer_text, refuse_pointer
from glmchat.core.errors import Damaged, Failed, Usage
from glmchat.core.text import human_bytes
from glmchat.hub.git_lfs import find_pointers, pointer_blob, read_remote, web_address
from glmchat.hub.pull_into import execute_into, plan_into
from glmchat.hub.references import parse

SHARD, VOCABULARY = Synthetic(300_000, seed=3), b"sentencepiece " * 2000


def sha(data: bytes | Synthetic) -> str:
    return hashlib.sha256(data if isinstance(data, bytes) else data.read(0, len(data))).hexdigest()


def clone(folder: Path, *, remote: str = "", real: tuple[str, ...] = ()) -> Path:
    """What `GIT_LFS_SKIP_SMUDGE=1 git clone` leaves; the files in `real` were replaced by hand since."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    for name, data in (("model.bin", SHARD), ("ice_text.model", VOCABULARY)):
        whole = data if isinstance(data, bytes) else data.read(0, len(data))
        (folder / name).write_bytes(whole if name in real else pointer_text(Pointer(sha(data), len(data))))
    if remote:
        (folder / ".git").mkdir()
        text = f'[core]\n\tbare = false\n[remote "origin"]\n\turl = {remote}\n\tfetch = +refs/heads/*:refs/remotes/*\n'
        (folder / ".git/config").write_text(text)
        (folder / ".git/HEAD").write_text("ref: refs/heads/main\n")
        (folder / ".git/packed-refs").write_text(f"# pack-refs\n{'ab' * 20} refs/heads/main\n")
    return folder


@pytest.fixture
def hub(loopback_hub: LoopbackHub) -> LoopbackHub:
    loopback_hub.add("tiny/model", {"model.bin": SHARD, "ice_text.model": VOCABULARY, "config.json": b"{}"})
    return loopback_hub


def is_whole(folder: Path) -> bool:
    return (folder / "model.bin").read_bytes() == SHARD.read(0, len(SHARD)) and (
        folder / "ice_text.model"
    ).read_bytes() == VOCABULARY


def run(folder: Path, name: str | None = None, *endpoints: str) -> list[str]:
    plan = plan_into(folder, parse(name) if name else None, endpoints)
    return [one.path for one in execute_into(plan, lambda _: None, lambda: False)]


@given(st.from_regex(r"[0-9a-f]{64}", fullmatch=True), st.integers(0, 10**14))
def test_a_pointer_is_read_back_as_it_was_written(oid: str, size: int) -> None:
    assert parse_pointer_bytes(pointer_text(Pointer(oid, size))) == Pointer(oid, size)


@given(st.binary(max_size=300))
def test_no_other_bytes_are_a_pointer(data: bytes) -> None:
    assert parse_pointer_bytes(data) is None


def test_pointers_with_extensions_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    oid = "ab" * 32
    text = f"version https://git-lfs.github.com/spec/v1\next-0-foo sha256:{oid}\noid sha256:{oid}\nsize 12\n"
    (tmp_path / "p").write_bytes(text.replace("\n", "\r\n").encode())
    assert parse_pointer(tmp_path / "p") == Pointer(oid, 12)
    assert parse_pointer(tmp_path / "absent") is None
    (tmp_path / "long").write_bytes(text.encode() + b"x" * 2000)
    assert parse_pointer(tmp_path / "long") is None


def test_the_blob_id_of_a_pointer_is_gits_own(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(pointer_text(Pointer("cd" * 32, 5)))
    told = subprocess.run(["git", "hash-object", str(tmp_path / "p")], capture_output=True, text=True, check=True)
    assert pointer_blob("cd" * 32, 5) == told.stdout.strip()


def test_a_folder_full_of_pointers_becomes_the_model(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = clone(tmp_path / "chatglm")
    assert [path for path, _ in find_pointers(folder)] == ["ice_text.model", "model.bin"]
    assert sorted(run(folder, "tiny/model", hub.url)) == ["ice_text.model", "model.bin"]
    assert is_whole(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "ice_text.model", "model.bin"]


def test_a_half_replaced_folder_fetches_only_what_is_still_a_pointer(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = clone(tmp_path / "chatglm", real=("model.bin",))
    assert run(folder, "tiny/model", hub.url) == ["ice_text.model"]
    assert is_whole(folder) and hub.sent_for("model.bin") == 0
    assert run(folder, "tiny/model", hub.url) == []
    assert "no git-lfs pointers" in plan_into(folder).lines()[0]


def test_a_clone_with_a_git_remote_needs_no_name(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = clone(tmp_path / "chatglm", remote=f"{hub.url}/tiny/model")
    plan = plan_into(folder)
    assert human_bytes(plan.bytes_total) in plan.lines()[0]
    run(folder)
    assert is_whole(folder)
    assert len(hub.lfs_batches[-1]["objects"]) == 2
    gets = [one for one in hub.requests if one.method == "GET" and one.file == "model.bin"]
    assert gets[0].headers["x-store"] == "1", "the batch answer's own header was not sent"


def test_an_object_of_an_older_revision_is_found_by_its_oid(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = clone(tmp_path / "chatglm")
    hub.add("tiny/model", {"model.bin": b"newer" * 60_000, "ice_text.model": VOCABULARY})
    run(folder, "tiny/model", hub.url)
    assert is_whole(folder)


def test_objects_that_git_lfs_fetched_but_did_not_check_out_are_taken_from_there(tmp_path: Path) -> None:
    folder = clone(tmp_path / "chatglm", remote="git@example.invalid:tiny/model.git")
    for data in (SHARD.read(0, len(SHARD)), VOCABULARY):
        oid = hashlib.sha256(data).hexdigest()
        place = folder / ".git/lfs/objects" / oid[:2] / oid[2:4] / oid
        place.parent.mkdir(parents=True)
        place.write_bytes(data)
    run(folder)
    assert is_whole(folder)


def test_a_wrong_object_never_takes_the_pointers_place(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = clone(tmp_path / "chatglm", real=("model.bin",))
    hub.fault("ice_text.model", content=b"x" * len(VOCABULARY), omit=("etag", "x-linked-etag"), times=None)
    plan = plan_into(folder, parse("tiny/model"), (hub.url,))
    with pytest.raises(Damaged, match=r"ice_text\.model"):
        execute_into(plan, lambda _: None, lambda: False)
    assert parse_pointer(folder / "ice_text.model") == Pointer(sha(VOCABULARY), len(VOCABULARY))


def test_a_folder_nobody_knows_asks_for_a_name(tmp_path: Path) -> None:
    folder = clone(tmp_path / "mine")
    with pytest.raises(Usage) as caught:
        plan_into(folder)
    assert "NAME --into" in caught.value.hint and caught.value.exit == 2


def test_the_catalogues_hashes_tell_which_model_a_pointer_belongs_to(
    hub: LoopbackHub, tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = json.loads((shared / "catalogue/THUDM--chatglm-6b@096f3de6b495.json").read_text())
    real = next(f for f in listed["files"] if f["path"] == "ice_text.model")
    folder = tmp_path / "chatglm-6b"
    folder.mkdir()
    (folder / "ice_text.model").write_bytes(pointer_text(Pointer(real["sha256"], real["size"])))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    plan = plan_into(folder)
    assert any("THUDM/chatglm-6b" in c.url or "zai-org/chatglm-6b" in c.url for c in plan.files[0].candidates)
    with pytest.raises(Failed):  # the loopback hub has no such repository, and no other place is asked
        execute_into(plan, lambda _: None, lambda: False)


@pytest.mark.parametrize(
    ("remote", "address"),
    [
        ("https://huggingface.co/THUDM/chatglm-6b", "https://huggingface.co/THUDM/chatglm-6b"),
        ("https://user:hf_secret@huggingface.co/THUDM/chatglm-6b.git", "https://huggingface.co/THUDM/chatglm-6b"),
        ("git@hf.co:THUDM/chatglm-6b.git", "https://hf.co/THUDM/chatglm-6b"),
        ("ssh://git@example.org:2222/a/b.git", "https://example.org/a/b"),
        ("http://10.0.0.5:8090/a/b/", "http://10.0.0.5:8090/a/b"),
        ("/srv/git/b.git", None),
        ("../b", None),
        ("file:///srv/b", None),
        ("ext::sh -c evil", None),
        ("http://[::1/a", None),
    ],
)
def test_a_remote_is_an_address_without_its_password(remote: str, address: str | None) -> None:
    assert web_address(remote) == address


def test_head_is_read_without_running_git(tmp_path: Path) -> None:
    found = read_remote(clone(tmp_path / "a", remote="https://huggingface.co/tiny/model"))
    assert found is not None and (found.repo, found.commit, found.is_hub) == ("tiny/model", "ab" * 20, True)
    assert read_remote(tmp_path) is None


def test_the_command_line_replaces_pointers_and_says_so(hub: LoopbackHub, tmp_path: Path, capsys: Any) -> None:
    folder = clone(tmp_path / "chatglm")
    command = ["pull", "tiny/model", "--into", str(folder), "--endpoint", hub.url]
    code, out, err = glmchat(capsys, *command, "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["bytes_total"] == len(SHARD) + len(VOCABULARY) and not is_whole(folder)
    code, _, err = glmchat(capsys, *command)
    assert code == 0, err
    assert is_whole(folder) and "2 files are in place" in err


@pytest.mark.parametrize("more", [["--quant", "4"], ["--keep"]])
def test_files_put_in_place_are_not_quantised_and_that_is_said(more: list[str], tmp_path: Path, capsys: Any) -> None:
    code, out, err = glmchat(capsys, "pull", "--into", str(tmp_path), *more)
    assert code == 2 and out == "" and f"then glmchat quantize {tmp_path}" in err


@pytest.mark.parametrize("host", ["git-lfs.github.com", "hawser.github.com"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_pointer_of_either_age_and_with_either_line_end_is_refused_with_its_size(
    tmp_path: Path, host: str, end: str
) -> None:
    lines = (f"version https://{host}/spec/v1", f"oid sha256:{'ab' * 32}", "size 12000000", "")
    (tmp_path / "p").write_bytes(end.join(lines).encode())
    with pytest.raises(Damaged, match="12"):
        refuse_pointer(tmp_path / "p")
