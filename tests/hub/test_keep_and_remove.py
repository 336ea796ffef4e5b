"""What is kept, named and taken away: rm, prune, add, alias, lock, quantised copies.

Covers hub/removal.py, hub/aliases.py, hub/lockfile.py, hub/registration.py, hub/store.py.
"""

from __future__ import annotations

import json
import os
import time
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
from loopback_hub import LoopbackHub, Synthetic

from glmchat.core import kv_files, locations
from glmchat.hub import lookup, manifests, store
from glmchat.hub.lookup import find_installed
from glmchat.hub.manifests import FileRecord, Manifest
from glmchat.hub.references import parse

WEIGHTS = Synthetic(1_000_000, 7)


@pytest.fixture
def hub(loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    monkeypatch.setenv("HF_ENDPOINT", loopback_hub.url)
    return loopback_hub


def pulled(hub: LoopbackHub, capsys: Any, repo: str = "tiny/model", config: bytes = CONFIG) -> str:
    commit = hub.add(repo, {"config.json": config, "model.safetensors": WEIGHTS})
    assert glmchat(capsys, "pull", f"{repo}@{commit}")[0] == 0
    return commit


def test_rm_never_breaks_another_revision(hub: LoopbackHub, capsys: Any) -> None:
    first, second = pulled(hub, capsys), pulled(hub, capsys, config=b'{"model_type": "llama", "v": 2}')
    code, out, _ = glmchat(capsys, "rm", f"tiny/model@{first[:10]}", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["bytes_freed"] == len(CONFIG)  # the weights belong to the other revision too
    assert glmchat(capsys, "rm", f"tiny/model@{first[:10]}", "--yes")[0] == 0
    assert not store.snapshot("tiny/model", first).exists()
    assert glmchat(capsys, "verify", f"tiny/model@{second[:10]}")[0] == 0
    assert [r.revision for r in lookup.list_installed()] == [second]


def test_rm_of_one_name_leaves_the_same_commit_of_a_renamed_copy(hub: LoopbackHub, capsys: Any) -> None:
    files = {"config.json": CONFIG, "model.safetensors": b"w" * 100}
    put_into_cache("old/name", COMMIT_A, files)
    put_into_cache("new/name", COMMIT_A, files)
    assert glmchat(capsys, "rm", "old/name", "-y")[0] == 0
    assert [r.repo for r in lookup.list_installed()] == ["new/name"]


def test_rm_asks_and_without_a_terminal_that_is_an_error(hub: LoopbackHub, capsys: Any) -> None:
    pulled(hub, capsys)
    code, out, _ = glmchat(capsys, "rm", "tiny/model", "--json")
    assert code == 2
    assert last_json(out)["code"] == "question.no_terminal"
    assert find_installed(parse("tiny/model")) is not None


def test_a_half_download_can_be_removed(hub: LoopbackHub, capsys: Any) -> None:
    hub.add("tiny/model", {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    hub.fault("model.safetensors", status=404, times=None)
    assert glmchat(capsys, "pull", "tiny/model")[0] == 1
    half = store.partial("tiny/model", hub.file("tiny/model", "model.safetensors").sha256)
    half.write_bytes(b"x" * 1000)
    assert [r.complete for r in lookup.list_installed()] == [False]
    code, out, _ = glmchat(capsys, "rm", "tiny/model", "--yes", "--json")
    assert code == 0
    assert last_json(out)["bytes_freed"] >= 1000
    assert not half.exists()
    assert lookup.list_installed() == []
    assert manifests.read_all() == []


def test_rm_takes_the_whole_files_of_a_half_download_too(hub: LoopbackHub, capsys: Any) -> None:
    """Links are made when all files are here, so what a kill leaves is mostly whole blobs that nothing links to."""
    hub.add("tiny/model", {"config.json": CONFIG, "model.safetensors": WEIGHTS})
    hub.fault("config.json", status=404, times=None)
    assert glmchat(capsys, "pull", "tiny/model")[0] == 1
    whole = store.blob("tiny/model", hub.file("tiny/model", "model.safetensors").sha256)
    store.partial("tiny/model", whole.name).unlink(missing_ok=True)
    whole.write_bytes(b"w" * len(WEIGHTS))
    assert [(r.complete, r.size_bytes >= len(WEIGHTS)) for r in lookup.list_installed()] == [(False, True)]
    assert glmchat(capsys, "prune", "--yes")[0] == 0
    assert len(manifests.read_all()) == 1  # it describes bytes that stay
    assert glmchat(capsys, "rm", "tiny/model", "--yes")[0] == 0
    assert not whole.exists()
    assert lookup.list_installed() == []


def test_rm_says_what_it_may_not_delete_and_forgets_nothing(
    hub: LoopbackHub, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's own deletion logs a refusal and returns as if all were well. (root may do anything, so it is acted.)"""
    commit = pulled(hub, capsys)
    blobs = store.repo_folder("tiny/model") / "blobs"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != blobs)
    code, _, err = glmchat(capsys, "rm", "tiny/model", "--yes")
    assert code == 1 and "freed" not in err
    assert (store.snapshot("tiny/model", commit) / "model.safetensors").exists()
    assert [r.complete for r in lookup.list_installed()] == [True]


def test_rm_mends_a_repository_with_a_dead_link_on_its_way(hub: LoopbackHub, capsys: Any) -> None:
    """A link without its blob makes huggingface_hub's scan skip the repository; rm must still get rid of it."""
    commit = pulled(hub, capsys)
    (store.snapshot("tiny/model", commit) / "model.safetensors").resolve().unlink()
    assert [r.complete for r in lookup.list_installed()] == [False]
    assert glmchat(capsys, "rm", "tiny/model", "--yes")[0] == 0
    assert not store.snapshot("tiny/model", commit).exists()
    assert lookup.list_installed() == []


def test_a_manifest_without_its_blobs_counts_as_not_installed(hub: LoopbackHub, capsys: Any) -> None:
    import shutil

    pulled(hub, capsys)
    shutil.rmtree(store.repo_folder("tiny/model"))
    assert lookup.list_installed() == []
    code, _, err = glmchat(capsys, "show", "tiny/model")
    assert code == 1
    assert "glmchat pull tiny/model" in err
    assert glmchat(capsys, "prune", "--yes")[0] == 0
    assert manifests.read_all() == []


def test_json_that_is_nested_without_end_is_broken_and_nothing_more(hub: LoopbackHub, capsys: Any) -> None:
    deep = "[" * 100_000
    pulled(hub, capsys, config=deep.encode())
    (locations.manifests_dir() / "deep.json").write_text(deep)
    assert glmchat(capsys, "list")[0] == 0
    assert glmchat(capsys, "verify", "tiny/model")[0] == 0
    (locations.data_dir() / "aliases.json").write_text(deep)
    assert glmchat(capsys, "list")[0] == 0
    assert glmchat(capsys, "alias")[0] == 0
    assert list(locations.data_dir().glob("aliases.json.*")), "set aside, and begun anew"
    lock = locations.data_dir() / "deep.lock"
    lock.write_text(deep)
    assert glmchat(capsys, "pull", "--locked", str(lock))[0] == 3


def test_prune_takes_what_nothing_refers_to_and_nothing_else(hub: LoopbackHub, capsys: Any) -> None:
    pulled(hub, capsys)
    blobs = store.repo_folder("tiny/model") / "blobs"
    (blobs / f"{'1' * 64}{store.PARTIAL}").write_bytes(b"h" * 500)
    (blobs / ("2" * 64)).write_bytes(b"l" * 300)
    (blobs / f"{'3' * 64}.incomplete").write_bytes(b"f" * 200)
    old = time.time() - 7200
    os.utime(blobs / ("2" * 64), (old, old))
    (locations.manifests_dir() / "broken.json").write_text("{")
    code, out, _ = glmchat(capsys, "prune", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["bytes_freed"] == 800  # the young partial of another tool may still be growing
    assert glmchat(capsys, "prune", "--yes")[0] == 0
    assert not (locations.manifests_dir() / "broken.json").exists()
    assert (blobs / f"{'3' * 64}.incomplete").exists()
    assert glmchat(capsys, "verify", "tiny/model")[0] == 0
    assert json.loads(glmchat(capsys, "prune", "--dry-run", "--json")[1])["steps"] == []


def test_prune_empties_the_caches_of_conversations(capsys: Any) -> None:
    folder = kv_files.open_folder()
    cache = kv_files.kv_path("a" * 32, "b" * 32)
    half, mark, mine = folder / f"{cache.name}.1-0.incomplete", folder / f"{'c' * 32}.gone", folder / "notes.txt"
    for path, size in ((cache, 700), (half, 50), (mark, 0), (mine, 9)):
        path.write_bytes(bytes(size))
    code, out, _ = glmchat(capsys, "prune", "--dry-run", "--json")
    assert code == 0 and json.loads(out)["bytes_freed"] == 750
    assert {Path(step["path"]) for step in json.loads(out)["steps"]} == {cache, half, mark}
    assert cache.exists()
    assert glmchat(capsys, "prune", "--yes")[0] == 0
    assert list(folder.iterdir()) == [mine]


def test_prune_leaves_a_running_pull_alone(hub: LoopbackHub, capsys: Any, tmp_path: Path) -> None:
    from filelock import FileLock

    half = store.partial("tiny/model", "1" * 64)
    half.parent.mkdir(parents=True)
    half.write_bytes(b"h" * 500)
    lock = store.lock_path("tiny/model", "1" * 64)
    lock.parent.mkdir(parents=True)
    record = FileRecord("model.safetensors", 900, "1" * 64)
    manifest = Manifest("tiny/model", "model", "hf", tmp_path, "tiny/model", "a" * 40, complete=False, files=(record,))
    manifests.write(manifest)
    with FileLock(lock):
        assert json.loads(glmchat(capsys, "prune", "--dry-run", "--json")[1])["steps"] == []
    assert json.loads(glmchat(capsys, "prune", "--dry-run", "--json")[1])["bytes_freed"] == 500
    assert glmchat(capsys, "prune", "--yes")[0] == 0
    assert manifests.read_all() == []


def model_folder(path: Path, weights: bytes = b"w" * 100) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_bytes(CONFIG)
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_add_registers_a_folder_without_copying_and_rm_only_forgets_it(tmp_path: Path, capsys: Any) -> None:
    folder = model_folder(tmp_path / "我的 模型")
    code, out, _ = glmchat(capsys, "add", str(folder), "--name", "mine", "--json")
    assert code == 0
    assert json.loads(out)["path"] == str(folder)
    row = find_installed(parse("mine"))
    assert row is not None and row.path == folder and row.complete
    assert lookup.last_used() == row
    code, _, err = glmchat(capsys, "rm", "mine", "--yes")
    assert code == 0
    assert "stays" in err
    assert (folder / "model.safetensors").exists()
    assert lookup.list_installed() == []


def test_a_folder_whose_name_is_no_utf8_is_added_and_found(tmp_path: Path, capsys: Any) -> None:
    folder = model_folder(tmp_path / os.fsdecode(b"bad\xff"))
    assert glmchat(capsys, "add", str(folder), "--name", "latin")[0] == 0
    found = find_installed(parse("latin"))
    assert found is not None and found.path == folder


def test_a_name_of_the_catalogue_is_not_given_to_another_model(tmp_path: Path, capsys: Any) -> None:
    folder = str(model_folder(tmp_path / "m"))
    assert glmchat(capsys, "add", folder, "--name", "SmolLM2")[0] == 2
    assert glmchat(capsys, "alias", "short", "smollm2")[0] == 0
    assert glmchat(capsys, "add", folder, "--name", "short")[0] == 2


def test_an_alias_does_not_hide_a_model_that_is_here(tmp_path: Path, capsys: Any) -> None:
    assert glmchat(capsys, "add", str(model_folder(tmp_path / "m")), "--name", "mine")[0] == 0
    assert glmchat(capsys, "alias", "mine", "smollm2")[0] == 2


def test_add_recognises_a_known_revision_by_its_bytes(tmp_path: Path, capsys: Any) -> None:
    folder = model_folder(tmp_path / "m")
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    user_catalogue(hub_entry("known", "me/known", COMMIT_A, files))
    code, _, err = glmchat(capsys, "add", str(folder))
    assert code == 0
    assert f"me/known at {COMMIT_A}" in err
    row = find_installed(parse("known"))
    assert row is not None and row.path == folder and row.revision == COMMIT_A


def test_add_refuses_what_is_no_model_and_a_name_that_is_taken(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = glmchat(capsys, "add", str(tmp_path / "empty"))
    assert code == 2
    assert "does not contain a model" in err
    assert glmchat(capsys, "add", str(tmp_path / "nowhere"))[0] == 2
    assert glmchat(capsys, "add", str(model_folder(tmp_path / "a")), "--name", "mine")[0] == 0
    code, _, err = glmchat(capsys, "add", str(model_folder(tmp_path / "b")), "--name", "mine")
    assert code == 2
    assert "already" in err


def test_a_folder_added_under_a_second_name_is_listed_under_that_name_alone(tmp_path: Path, capsys: Any) -> None:
    folder = model_folder(tmp_path / "我的 模型")
    assert glmchat(capsys, "add", str(folder), "--name", "one")[0] == 0
    assert glmchat(capsys, "add", str(folder), "--name", "二")[0] == 0
    assert [r.name for r in lookup.list_installed()] == ["二"]
    assert glmchat(capsys, "verify", "二")[0] == 0
    assert glmchat(capsys, "show", "one")[0] == 0


def test_two_gguf_files_of_one_folder_are_two_models(tmp_path: Path, capsys: Any) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF" + name.encode())
        assert glmchat(capsys, "add", str(tmp_path / name))[0] == 0
    assert [(r.name, r.path.name) for r in lookup.list_installed()] == [("a", "a.gguf"), ("b", "b.gguf")]


def test_add_names_the_pointer_files_of_a_clone_without_lfs(tmp_path: Path, capsys: Any) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'5' * 64}\nsize 2706249\n".encode()
    folder = model_folder(tmp_path / "clone", pointer)
    code, _, err = glmchat(capsys, "add", str(folder))
    assert code == 3
    assert "model.safetensors" in err and "2706249" in err and "--into" in err


def test_an_alias_stands_for_its_model_and_keeps_a_revision_given_with_it(hub: LoopbackHub, capsys: Any) -> None:
    commit = pulled(hub, capsys)
    assert glmchat(capsys, "alias", "我的", "tiny/model")[0] == 0
    assert glmchat(capsys, "alias", "mine", "我的")[0] == 0
    row = find_installed(parse(f"mine@{commit[:8]}"))
    assert row is not None and row.revision == commit
    assert json.loads(glmchat(capsys, "alias", "--json")[1]) == {"我的": "tiny/model", "mine": "tiny/model"}
    assert "mine" in lookup.complete_names("mi")
    assert glmchat(capsys, "alias", "self", "self")[0] == 2
    assert glmchat(capsys, "alias", "lost", "smollm3")[0] == 2
    assert glmchat(capsys, "alias", "a/b", "tiny/model")[0] == 2
    assert glmchat(capsys, "alias", "smollm2", "tiny/model")[0] == 2  # it would hide the catalogue's
    assert glmchat(capsys, "alias", "mine", "--remove")[0] == 0
    assert glmchat(capsys, "show", "mine")[0] == 2


def test_a_lock_file_brings_the_same_bytes_elsewhere(
    hub: LoopbackHub, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = pulled(hub, capsys)
    code, out, _ = glmchat(capsys, "lock")
    assert code == 0
    file = tmp_path / "glmchat.lock"
    file.write_text(out)
    monkeypatch.setenv("GLMCHAT_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere-hf"))
    hub.add("tiny/model", {"config.json": b"{}", "model.safetensors": b"later"})  # main has moved on
    asked = len([r for r in hub.requests if "/api/" in r.path])
    assert glmchat(capsys, "pull", "--locked", str(file))[0] == 0
    row = find_installed(parse(f"tiny/model@{commit[:10]}"))
    assert row is not None and row.revision == commit
    assert glmchat(capsys, "lock")[1] == out
    assert len([r for r in hub.requests if "/api/" in r.path]) == asked  # the lock knows; no hub decides
    assert store.ref("tiny/model", "main") is None


PACKAGE = {"kind": "pypi", "repo": "six", "revision": "1.16.0", "sha256": "0" * 64, "member": "six.py"}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda d: d["models"][0]["files"][0].update(path="../../x"), 3),
        (lambda d: d["models"][0]["files"][0].update(sha256="zz"), 3),
        (lambda d: d["models"][0]["source"].update(revision="main"), 3),
        (lambda d: d["models"][0]["source"].update(repo="../../x/y"), 2),
        (lambda d: d.update(format=9), 3),
        (lambda d: d["models"].append({}), 3),
        (lambda d: d["models"][0]["files"][0].update(size=float("inf")), 3),
        (lambda d: d["models"][0].update(family=3), 3),
        (lambda d: d["models"][0].update(source=PACKAGE, name="../../outside"), 2),
        (lambda d: d["models"][0].update(source={**PACKAGE, "repo": "six\n--index-url=http://127.0.0.1:9/"}), 3),
        (lambda d: d["models"][0].update(source={**PACKAGE, "revision": "1 --no-index"}), 3),
        (lambda d: d["models"][0].update(source={**PACKAGE, "sha256": None}), 3),
    ],
)
def test_a_lock_file_that_was_tampered_with_is_refused(
    change: Any, code: int, hub: LoopbackHub, capsys: Any, tmp_path: Path
) -> None:
    pulled(hub, capsys)
    data = json.loads(glmchat(capsys, "lock")[1])
    change(data)
    (tmp_path / "l").write_text(json.dumps(data))
    got, _, err = glmchat(capsys, "pull", "--locked", str(tmp_path / "l"))
    assert got == code, err
    assert err.count("\n") <= 3


@pytest.mark.parametrize("content", [b"", b"smollm2\n", b"[1, 2", b"\xff\xfe", b"[" * 10**5])
def test_a_lock_file_that_is_none_is_told_in_words(content: bytes, capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "l").write_bytes(content)
    code, out, err = glmchat(capsys, "pull", "--locked", str(tmp_path / "l"))
    assert code == 3 and out == ""
    assert "l: this is not a lock file\n" in err and "create it again: glmchat lock" in err and err.count("\n") == 2


def test_a_quantised_copy_is_listed_found_by_its_quantisation_and_survives_its_base(
    hub: LoopbackHub, capsys: Any
) -> None:
    commit = pulled(hub, capsys)
    folder = locations.models_dir() / "tiny--model-int4"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"q" * 50)
    record = {
        "format": 1, "kind": "quantized", "name": "tiny/model:int4", "base": "tiny/model", "repo": "tiny/model",
        "revision": commit, "family": "llama", "quant": "int4-g32", "date": "",
        "files": [{"path": "model.safetensors", "size": 50, "sha256": sha256(b"q" * 50)}],
    }  # fmt: skip
    (folder / "glmchat.json").write_text(json.dumps(record))
    rows = {r["kind"]: r for r in json.loads(glmchat(capsys, "list", "--json")[1])}
    assert rows["quantized"]["quant"] == "int4-g32"
    assert rows["quantized"]["base"] == "tiny/model"
    assert rows["quantized"]["complete"] is True
    found = find_installed(parse("tiny/model:int4"))
    assert found is not None and found.path == folder
    assert find_installed(parse("tiny/model:int8")) is None
    base = find_installed(parse("tiny/model"))
    assert base is not None and base.kind == "model"
    assert glmchat(capsys, "verify", "tiny/model:int4")[0] == 0
    code, _, err = glmchat(capsys, "rm", f"tiny/model@{commit[:12]}", "--yes")
    assert code == 0
    assert "stays" in err
    assert find_installed(parse("tiny/model:int4")) is not None
    assert glmchat(capsys, "rm", "tiny/model:int4", "--yes")[0] == 0
    assert not folder.exists()


def test_the_quantised_copy_of_a_plain_folder_is_found_by_its_path(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "plain")
    assert find_installed(parse(f"{folder}:int4")) is None
    copy = model_folder(locations.models_dir() / "plain-int4", b"q" * 50)
    files = [{"path": "model.safetensors", "size": 50, "sha256": sha256(b"q" * 50)}]
    record = {"format": 1, "kind": "quantized", "name": f"{folder}:int4", "base": str(folder), "quant": "int4-g32"}
    (copy / "glmchat.json").write_text(json.dumps({**record, "root": str(copy), "files": files}))
    row = find_installed(parse(f"{folder}:int4"))
    assert row is not None and row.path == copy


def test_a_quantised_copy_from_elsewhere_is_added_as_what_it_is(tmp_path: Path, capsys: Any) -> None:
    folder = model_folder(tmp_path / "mine-int4")
    record = {
        "format": 1,
        "kind": "quantized",
        "name": "mine:int4",
        "base": "mine",
        "quant": "int4-g32",
        "family": "llama",
    }
    (folder / "glmchat.json").write_text(json.dumps({**record, "root": "/gone", "files": []}))
    row = json.loads(glmchat(capsys, "add", str(folder), "--json")[1])
    assert (row["kind"], row["quant"], row["base"], row["name"]) == ("quantized", "int4-g32", "mine", "mine-int4")


def test_show_tells_files_hosts_memory_and_licence(hub: LoopbackHub, capsys: Any) -> None:
    pulled(hub, capsys)
    code, out, _ = glmchat(capsys, "show", "tiny/model", "--json")
    assert code == 0
    shown = json.loads(out)
    row = {"name", "kind", "repo", "revision", "family", "quant", "path", "size_bytes", "complete", "base"}
    assert row | {"files", "memory", "architecture", "licence", "problem", "readers", "evaluations"} == set(shown)
    assert {f["host"] for f in shown["files"]} == {hub.url.removeprefix("http://")}
    assert shown["memory"]["none"] == 1_000_000
    assert shown["memory"]["int4"] < shown["memory"]["int8"] < shown["memory"]["none"]


def test_folders_are_private(hub: LoopbackHub, capsys: Any) -> None:
    pulled(hub, capsys)
    for folder in (locations.data_dir(), locations.manifests_dir(), locations.state_dir()):
        assert folder.stat().st_mode & 0o077 == 0, folder
    assert manifests.read_all()[0].file.stat().st_mode & 0o077 == 0
    put_into_cache("x/y", COMMIT_B, {"config.json": CONFIG})
