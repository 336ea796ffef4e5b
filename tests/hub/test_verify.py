"""verify: which file is wrong, what was expected, and what it is instead. No network anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub_helpers import (
    COMMIT_A,
    COMMIT_B,
    CONFIG,
    glmchat,
    hub_entry,
    last_json,
    put_into_cache,
    sha256,
    user_catalogue,
)

from glmchat.hub import store

SLIM = {
    "config.json": CONFIG,
    "pytorch_model-00001-of-00002.bin": b"slim 1" * 50,
    "pytorch_model-00002-of-00002.bin": b"same" * 50,
}
EARLY = {**SLIM, "config.json": b'{"early": 1}', "pytorch_model-00001-of-00002.bin": b"early 1" * 60}


@pytest.fixture(autouse=True)
def two_generations() -> None:
    user_catalogue(
        hub_entry("glm", "me/glm", COMMIT_A, SLIM), hub_entry("glm", "me/glm", COMMIT_B, EARLY, label="first")
    )


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def verdicts(out: str) -> dict[str, Any]:
    return {f["path"]: f for f in json.loads(out.splitlines()[0])["files"]}


def test_a_flipped_byte_is_found_and_named(capsys: Any) -> None:
    snapshot = put_into_cache("me/glm", COMMIT_A, SLIM)
    assert glmchat(capsys, "verify", "glm")[0] == 0
    blob = (snapshot / "pytorch_model-00002-of-00002.bin").resolve()
    content = bytearray(blob.read_bytes())
    content[7] ^= 1
    blob.write_bytes(content)
    code, out, err = glmchat(capsys, "verify", "glm", "--json")
    assert code == 3
    assert verdicts(out)["pytorch_model-00002-of-00002.bin"]["state"] == "hash"
    assert last_json(out)["code"] == "verify.damaged"
    assert "pytorch_model-00002-of-00002.bin" in err
    assert "--check" in err


def test_a_shard_of_the_other_generation_is_called_by_its_name(tmp_path: Path, capsys: Any) -> None:
    name = "pytorch_model-00001-of-00002.bin"
    folder = folder_of(tmp_path / "mixed", {**SLIM, name: EARLY[name]})
    code, out, err = glmchat(capsys, "verify", str(folder), "--json")
    assert code == 3
    report = json.loads(out.splitlines()[0])
    assert report["against"] == "glm"
    assert {p: f["state"] for p, f in verdicts(out).items() if f["state"] != "ok"} == {name: "size"}
    assert verdicts(out)[name]["belongs_to"] == [f"glm@{COMMIT_B[:12]}"]
    assert verdicts(out)[name]["expected_sha256"] == sha256(SLIM[name])
    assert f"it belongs to glm@{COMMIT_B[:12]}" in err


def test_wrong_bytes_under_published_names_are_each_told(tmp_path: Path, capsys: Any) -> None:
    folder = folder_of(tmp_path / "wrong", dict.fromkeys(SLIM, b"nonsense"))
    code, out, _ = glmchat(capsys, "verify", str(folder), "--json")
    assert code == 3
    found = verdicts(out)
    assert {f["state"] for f in found.values()} <= {"size", "hash"}
    assert all(f["expected_size"] and f["expected_sha256"] for f in found.values())
    assert set(found) == set(SLIM)


def test_the_real_published_names_with_wrong_bytes(tmp_path: Path, capsys: Any) -> None:
    names = ["config.json", "ice_text.model", *(f"pytorch_model-{i:05d}-of-00008.bin" for i in range(1, 9))]
    folder = folder_of(tmp_path / "wrong", dict.fromkeys(names, b"nonsense"))
    code, out, _ = glmchat(capsys, "verify", str(folder))
    assert code == 3
    for name in names:
        assert any(name in line and "expected" in line for line in out.splitlines()), name


def test_pointers_tell_the_revision_that_a_clone_is_of(tmp_path: Path, capsys: Any) -> None:
    files = {
        name: f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(data)}\nsize {len(data)}\n".encode()
        for name, data in EARLY.items()
        if name.endswith(".bin")
    }
    folder = folder_of(tmp_path / "clone", {"config.json": b"{}", **files})
    code, out, _ = glmchat(capsys, "verify", str(folder), "--json")
    assert code == 3
    assert json.loads(out.splitlines()[0])["against"] == f"glm@{COMMIT_B[:12]}"
    one = verdicts(out)["pytorch_model-00001-of-00002.bin"]
    assert (one["state"], one["expected_size"]) == ("pointer", len(EARLY["pytorch_model-00001-of-00002.bin"]))


def test_a_missing_file_and_a_pointer_are_told_apart(tmp_path: Path, capsys: Any) -> None:
    one, two = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(SLIM[one])}\nsize {len(SLIM[one])}\n"
    folder = folder_of(tmp_path / "clone", {"config.json": CONFIG, one: pointer.encode()})
    code, out, err = glmchat(capsys, "verify", str(folder), "--json")
    assert code == 3
    assert verdicts(out)[one]["state"] == "pointer"
    assert verdicts(out)[one]["expected_size"] == len(SLIM[one])
    assert verdicts(out)[two]["state"] == "missing"
    assert "--into" in err


def test_a_cache_that_nobody_describes_is_verified_by_the_names_of_its_blobs(capsys: Any) -> None:
    snapshot = put_into_cache("un/known", COMMIT_A, {"config.json": CONFIG, "model.safetensors": b"w" * 99})
    assert glmchat(capsys, "verify", "un/known")[0] == 0
    (snapshot / "config.json").resolve().write_bytes(CONFIG.replace(b"llama", b"lamma"))
    code, _, err = glmchat(capsys, "verify", "un/known")
    assert code == 3
    assert "config.json" in err


def test_a_folder_of_nobody_is_said_to_be_unchecked(tmp_path: Path, capsys: Any) -> None:
    folder = folder_of(tmp_path / "own", {"model.safetensors": b"mine", "strange.json": b"{}"})
    code, _, err = glmchat(capsys, "verify", str(folder))
    assert code == 0
    assert "its 2 files could not be checked" in err and "intact" not in err


def test_pull_check_mends_what_verify_found(loopback_hub: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", loopback_hub.url)
    loopback_hub.add("me/glm", dict(SLIM), commit=COMMIT_A)
    assert glmchat(capsys, "pull", "glm")[0] == 0
    blob = (store.snapshot("me/glm", COMMIT_A) / "pytorch_model-00001-of-00002.bin").resolve()
    blob.write_bytes(b"x" * len(SLIM["pytorch_model-00001-of-00002.bin"]))
    assert glmchat(capsys, "verify", "glm")[0] == 3
    assert glmchat(capsys, "pull", "glm")[0] == 0  # sizes are right: a plain pull sees nothing to do
    assert glmchat(capsys, "pull", "glm", "--check")[0] == 0
    assert glmchat(capsys, "verify", "glm")[0] == 0
    assert len(loopback_hub.requests_for("pytorch_model-00002-of-00002.bin")) == 1


def test_verify_opens_no_socket(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    put_into_cache("me/glm", COMMIT_A, SLIM)
    monkeypatch.setattr(socket, "socket", refuse)
    assert glmchat(capsys, "verify", "glm")[0] == 0
