"""Plans and pulls against a real server: what is fetched, what is reused, what ends up in the cache.

Covers hub/pull.py, hub/selection.py, cli/pull.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
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
from polling import wait_until

from glmchat.core import locations
from glmchat.hub import lookup, manifests, store
from glmchat.hub.catalogue import KnownFile
from glmchat.hub.lookup import find_installed
from glmchat.hub.plan import plan_pull
from glmchat.hub.references import parse
from glmchat.hub.selection import needed

FILES: dict[str, Any] = {
    "config.json": CONFIG,
    "tokenizer.json": b'{"t": 1}',
    "model.safetensors": Synthetic(3_000_000, 1),
    "pytorch_model.bin": Synthetic(3_000_000, 2),
    "modeling_tiny.py": b"raise SystemExit",
    "README.md": b"# tiny",
    "original/consolidated.pth": b"x" * 100,
}


@pytest.fixture
def hub(loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    monkeypatch.setenv("HF_ENDPOINT", loopback_hub.url)
    return loopback_hub


def test_a_catalogue_revision_is_planned_offline(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, _ = glmchat(capsys, "pull", "chatglm-6b@096f3de6", "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0
    assert plan["revision"] == "096f3de6b4959ce38bef7bb05f3129c931a3084e"
    assert plan["repo"] == "THUDM/chatglm-6b"
    assert plan["bytes_missing"] == plan["bytes_total"] > 13_700_000_000
    names = {f["path"] for f in plan["files"]}
    assert {"config.json", "ice_text.model", "pytorch_model-00008-of-00008.bin", "MODEL_LICENSE"} <= names
    assert not any(n.endswith(".py") for n in names)


def test_planning_loads_neither_torch_nor_the_hub_library() -> None:
    command = "from glmchat.cli.main import run; import sys; c = run(['pull', 'chatglm-6b', '--dry-run']); "
    command += "print(c, sorted({'torch', 'huggingface_hub', 'transformers', 'textual'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", command], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip().splitlines()[-1] == "0 []", done.stderr


def test_a_pull_lands_in_the_standard_cache_with_a_ref_a_manifest_and_no_code(hub: LoopbackHub, capsys: Any) -> None:
    commit = hub.add("tiny/model", FILES)
    code, out, _ = glmchat(capsys, "pull", "tiny/model", "--json")
    assert code == 0
    row = last_json(out)
    assert (row["name"], row["revision"], row["complete"], row["kind"]) == ("tiny/model", commit, True, "model")
    snapshot = store.snapshot("tiny/model", commit)
    assert sorted(p.name for p in snapshot.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert not Path(os.readlink(snapshot / "config.json")).is_absolute()
    assert store.ref("tiny/model", "main") == commit
    manifest = manifests.read_all()[0]
    assert {f.path for f in manifest.files} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert all(f.host and f.sha256 and f.date for f in manifest.files)
    assert "README.md" not in {one.file for one in hub.requests}
    from huggingface_hub import scan_cache_dir

    scan = scan_cache_dir(locations.hf_cache())
    assert scan.warnings == []
    assert {r.repo_id for r in scan.repos} == {"tiny/model"}


def test_nothing_is_asked_twice(hub: LoopbackHub, capsys: Any) -> None:
    hub.add("tiny/model", FILES)
    glmchat(capsys, "pull", "tiny/model")
    sent = hub.sent_for("model.safetensors")
    code, _, err = glmchat(capsys, "pull", "tiny/model")
    assert code == 0
    assert "is already here" in err
    assert hub.sent_for("model.safetensors") == sent


def test_no_ref_is_written_for_a_commit_nor_for_a_catalogue_model(hub: LoopbackHub, capsys: Any) -> None:
    commit = hub.add("tiny/model", FILES)
    assert glmchat(capsys, "pull", f"tiny/model@{commit}")[0] == 0
    assert not (store.repo_folder("tiny/model") / "refs").exists()
    files = {"config.json": CONFIG, "model.safetensors": b"w" * 5000}
    pinned = hub.add("me/mine", files)
    user_catalogue(hub_entry("mine", "me/mine", pinned, files))
    assert glmchat(capsys, "pull", "mine@main")[0] == 0
    assert not (store.repo_folder("me/mine") / "refs").exists()
    assert not any("api/models/me" in one.path for one in hub.requests)  # the catalogue knows; nobody is asked


def test_the_catalogues_hashes_win_over_what_the_server_has(hub: LoopbackHub, capsys: Any) -> None:
    files = {"config.json": CONFIG, "model.safetensors": b"w" * 5000}
    pinned = hub.add("me/mine", {**files, "model.safetensors": b"v" * 5000})
    user_catalogue(hub_entry("mine", "me/mine", pinned, files))
    code, out, err = glmchat(capsys, "pull", "mine", "--json")
    assert code in (1, 3)
    assert "model.safetensors" in err
    assert last_json(out)["event"] == "error"
    assert find_installed(parse("mine")) is None


def test_a_branch_and_a_tag_are_resolved_and_a_missing_one_is_said(hub: LoopbackHub, capsys: Any) -> None:
    commit = hub.add("tiny/model", FILES, tag="v1")
    hub.add("tiny/model", {**FILES, "tokenizer.json": b"{}"})
    code, out, _ = glmchat(capsys, "pull", "tiny/model", "--revision", "v1", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["revision"] == commit
    code, _, err = glmchat(capsys, "pull", "tiny/model@v9")
    assert code == 1
    assert "no revision 'v9'" in err


def test_a_renamed_repository_is_followed(hub: LoopbackHub, capsys: Any) -> None:
    hub.add("new/name", FILES)
    hub.moved["old/name"] = "new/name"
    code, out, _ = glmchat(capsys, "pull", "old/name", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["renamed"] == "new/name"


def test_include_decides_alone_exclude_takes_away_and_all_means_all(hub: LoopbackHub, capsys: Any) -> None:
    hub.add("tiny/model", FILES)

    def planned(*flags: str) -> set[str]:
        _, out, _ = glmchat(capsys, "pull", "tiny/model", "--dry-run", "--json", *flags)
        return {f["path"] for f in json.loads(out)["files"]}

    assert planned("--include", "*.py") == {"modeling_tiny.py"}
    assert planned("--exclude", "tok*") == {"config.json", "model.safetensors"}
    assert planned("--all") == set(FILES)
    assert glmchat(capsys, "pull", "tiny/model", "--include", "*.json")[0] == 0
    assert find_installed(parse("tiny/model")) is None  # configs alone are no model
    code, _, err = glmchat(capsys, "pull", "tiny/model", "--include", "*.nothing")
    assert code == 2
    assert "no file" in err


def test_weights_are_chosen_in_one_format() -> None:
    def chosen(*names: str) -> list[str]:
        return [f.path for f in needed([KnownFile(n, 1, "0" * 64) for n in names])]

    assert chosen("config.json", "pytorch_model.bin", "model.safetensors") == ["config.json", "model.safetensors"]
    assert chosen("config.json", "pytorch_model.bin", "x.gguf") == ["config.json", "pytorch_model.bin"]
    assert chosen("a-Q8_0.gguf", "a-Q4_0.gguf", "a-Q2_K.gguf", "mmproj-a.gguf") == ["a-Q4_0.gguf"]
    parts = [f"a-Q4_0-0000{i}-of-00002.gguf" for i in (1, 2)]
    assert chosen(*parts, "a-f16.gguf") == parts
    assert chosen("adapter_config.json", "adapter_model.bin", "trainer_state.json") == [
        "adapter_config.json",
        "adapter_model.bin",
    ]


def test_a_listing_without_one_of_its_shards_is_refused(hub: LoopbackHub, capsys: Any) -> None:
    hub.add(
        "tiny/model",
        {"config.json": CONFIG, "model-00001-of-00003.safetensors": b"1", "model-00003-of-00003.safetensors": b"3"},
    )
    code, _, err = glmchat(capsys, "pull", "tiny/model")
    assert code == 3
    assert "model-00002-of-00003.safetensors" in err


def test_too_little_disk_is_refused_before_the_first_byte(hub: LoopbackHub, capsys: Any) -> None:
    free = store.free_bytes(locations.hf_cache())
    files = {"config.json": CONFIG}
    entry = hub_entry("huge", "me/huge", COMMIT_A, files)
    entry += f'\n[[model.file]]\npath = "model.safetensors"\nsize = {free * 2}\nsha256 = "{"1" * 64}"'
    user_catalogue(entry)
    code, out, err = glmchat(capsys, "pull", "huge", "--json")
    assert code == 4
    assert last_json(out)["code"] == "pull.disk"
    assert "of free space" in err
    assert hub.requests == []
    assert json.loads(glmchat(capsys, "pull", "huge", "--dry-run", "--json")[1])["fits"] is False


def test_blobs_of_another_revision_and_of_a_renamed_copy_are_reused(hub: LoopbackHub, capsys: Any) -> None:
    weights = Synthetic(2_000_000, 5)
    hub.add("tiny/model", {"config.json": CONFIG, "model.safetensors": weights})
    glmchat(capsys, "pull", "tiny/model")
    hub.add("tiny/model", {"config.json": b'{"model_type": "llama", "v": 2}', "model.safetensors": weights})
    out = glmchat(capsys, "pull", "tiny/model", "--dry-run", "--json")[1]
    assert json.loads(out)["bytes_missing"] < 100
    assert glmchat(capsys, "pull", "tiny/model")[0] == 0
    hub.add("other/copy", {"config.json": CONFIG, "model.safetensors": weights})
    assert glmchat(capsys, "pull", "other/copy")[0] == 0
    assert len(hub.requests_for("model.safetensors")) == 1
    row = find_installed(parse("other/copy"))
    assert row is not None and row.complete
    first = next(store.repo_folder("tiny/model").glob("blobs/" + hub.file("other/copy", "model.safetensors").sha256))
    assert first.samefile(row.path / "model.safetensors")  # a hard link: the bytes are on the disk once


def test_modelscopes_own_cache_is_used_if_the_bytes_are_right(hub: LoopbackHub, capsys: Any, own_home: Path) -> None:
    files = {"config.json": CONFIG, "model.safetensors": b"w" * 5000, "tokenizer.json": b"{}"}
    commit = hub.add("tiny/model", files)
    folder = own_home / ".cache" / "modelscope" / "hub" / "models" / "tiny" / "model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(files["model.safetensors"])
    (folder / "tokenizer.json").write_bytes(b"[]")  # right size, wrong bytes
    assert glmchat(capsys, "pull", "tiny/model")[0] == 0
    assert hub.requests_for("model.safetensors") == []
    assert (store.snapshot("tiny/model", commit) / "tokenizer.json").read_bytes() == b"{}"


def test_a_half_download_counts_in_the_plan_and_is_continued(hub: LoopbackHub, capsys: Any) -> None:
    hub.add("tiny/model", FILES)
    one = hub.file("tiny/model", "model.safetensors")
    half = store.partial("tiny/model", one.sha256)
    half.parent.mkdir(parents=True)
    half.write_bytes(b"".join(one.content.read(at, 1 << 20) for at in range(0, 1 << 20, 1 << 20)))
    plan = plan_pull(parse("tiny/model"))
    assert next(f.state for f in plan.files if f.path == "model.safetensors") == "partial"
    assert plan.bytes_missing < 2_000_000
    assert glmchat(capsys, "pull", "tiny/model")[0] == 0
    assert hub.requests_for("model.safetensors")[0].range == (1 << 20, None)


def test_a_killed_pull_is_listed_as_half_here_and_goes_on(hub: LoopbackHub, capsys: Any) -> None:
    hub.add("tiny/model", {"config.json": CONFIG, "model.safetensors": Synthetic(20_000_000, 3)})
    hub.rate = 8_000_000
    pull = subprocess.Popen([sys.executable, "-P", "-m", "glmchat", "pull", "tiny/model", "-q"], cwd="/")
    wait_until(lambda: hub.sent_for("model.safetensors") > 3_000_000)
    pull.kill()
    pull.wait()
    row = json.loads(glmchat(capsys, "list", "--json")[1])[0]
    assert row["name"] == "tiny/model"
    assert row["complete"] is False
    assert 0 < row["size_bytes"] < 20_000_000
    assert find_installed(parse("tiny/model")) is None
    hub.rate = None
    assert glmchat(capsys, "pull", "tiny/model")[0] == 0
    assert hub.requests_for("model.safetensors")[-1].range is not None
    assert find_installed(parse("tiny/model")) is not None


def test_ctrl_c_exits_130_and_keeps_what_arrived(hub: LoopbackHub) -> None:
    hub.add("tiny/model", {"config.json": CONFIG, "model.safetensors": Synthetic(20_000_000, 3)})
    hub.rate = 4_000_000
    pull = subprocess.Popen(
        [sys.executable, "-P", "-m", "glmchat", "pull", "tiny/model", "--json"],
        cwd="/", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_until(lambda: hub.sent_for("model.safetensors") > 2_000_000)
    pull.send_signal(signal.SIGINT)
    out, _ = pull.communicate(timeout=60)
    assert pull.returncode == 130
    assert last_json(out)["exit"] == 130
    assert store.partial("tiny/model", hub.file("tiny/model", "model.safetensors").sha256).stat().st_size > 1_000_000


def test_two_pulls_of_one_model_fetch_it_once(hub: LoopbackHub) -> None:
    hub.add("tiny/model", {"config.json": CONFIG, "model.safetensors": Synthetic(5_000_000, 4)})
    hub.rate = 4_000_000
    command = [sys.executable, "-P", "-m", "glmchat", "pull", "tiny/model", "-q"]
    both = [subprocess.Popen(command, cwd="/", stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=60)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert hub.sent_for("model.safetensors") < 7_500_000
    assert sum("waiting for it" in s for s in said) <= 1


def test_the_next_endpoint_serves_when_the_first_is_gone(hub: LoopbackHub, capsys: Any) -> None:
    hub.add("tiny/model", FILES)
    flags = ["--endpoint", "http://127.0.0.1:9", "--endpoint", hub.url]
    code, _, _ = glmchat(capsys, "pull", "tiny/model", *flags)
    assert code == 0
    row = find_installed(parse("tiny/model"))
    assert row is not None and {f.host for f in row.files} == {hub.url.removeprefix("http://")}


def test_offline_says_so_and_the_message_names_the_way_out(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = glmchat(capsys, "pull", "tiny/model", "--json")
    assert code == 1
    assert last_json(out)["code"] == "pull.offline"
    assert "HF_HUB_OFFLINE" in err


def test_offline_a_model_that_is_whole_here_is_here(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    hub.add("tiny/model", {"config.json": CONFIG, "model.safetensors": b"w" * 100}, tag="v1")
    assert glmchat(capsys, "pull", "tiny/model")[0] == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = len(hub.requests)
    code, _, err = glmchat(capsys, "pull", "tiny/model")
    assert code == 0, err
    assert len(hub.requests) == before
    assert glmchat(capsys, "pull", "tiny/model@v1")[0] == 1  # nobody here knows what v1 is


def test_offline_a_catalogue_model_asks_nobody(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = glmchat(capsys, "pull", "chatglm-6b", "--json")
    assert code == 1
    assert last_json(out)["code"] == "pull.offline"
    assert "13.4 GB of chatglm-6b are not on this machine" in err
    assert hub.requests == []


def test_without_a_network_each_host_is_named_once(capsys: Any) -> None:
    places = ["--endpoint", "http://127.0.0.1:9", "--endpoint", "http://localhost:9"]
    code, _, err = glmchat(capsys, "pull", "chatglm-6b", *places)
    assert code == 1
    notes = [line for line in err.splitlines() if line.startswith("cannot reach")]
    assert len(notes) == len(set(notes)) <= 2
    assert "127.0.0.1:9 cannot reach" not in err


def test_a_pull_of_what_is_here_changes_neither_dates_nor_names(hub: LoopbackHub, capsys: Any) -> None:
    commit = hub.add("tiny/model", FILES)
    assert glmchat(capsys, "pull", "tiny/model")[0] == 0
    before = manifests.read_all()
    assert glmchat(capsys, "pull", f"tiny/model@{commit}")[0] == 0
    assert manifests.read_all() == before


def test_what_another_tool_put_into_the_cache_is_listed_and_found() -> None:
    put_into_cache("some/model", COMMIT_A, {"config.json": CONFIG, "model.safetensors": b"w" * 100}, ref="main")
    put_into_cache("some/model", COMMIT_B, {"config.json": CONFIG, "model.safetensors": b"v" * 100})
    put_into_cache("some/dataset", COMMIT_A, {"README.md": b"no model"})
    names = {r.name: r for r in lookup.list_installed()}
    assert set(names) == {"some/model", f"some/model@{COMMIT_B[:12]}"}
    assert names["some/model"].manifest is None
    found = find_installed(parse("some/model"))
    assert found is not None and found.revision == COMMIT_A
    found = find_installed(parse("some/model@bbbbbbb"))
    assert found is not None and found.revision == COMMIT_B


def test_a_cache_with_the_shared_blob_store_is_read_and_not_broken(capsys: Any) -> None:
    """huggingface_hub 2.4 may keep a blob once for all repositories; the repository's blob is then a link."""
    weights = b"w" * 5000
    snapshot = put_into_cache("some/model", COMMIT_A, {"config.json": CONFIG, "model.safetensors": weights}, ref="main")
    shared = locations.hf_cache() / "blobs"
    xet = "ab" * 32
    (shared / "ab").mkdir(parents=True)
    (shared / ".huggingface-shared-blobs").write_text("1\n")
    blob = snapshot.parent.parent / "blobs" / sha256(weights)
    blob.rename(shared / "ab" / xet)
    blob.symlink_to(f"../../blobs/ab/{xet}")
    (shared / "ab" / f"{xet}.refs").write_text(f"models--some--model/blobs/{blob.name}\n")
    row = find_installed(parse("some/model"))
    assert row is not None and row.size_bytes == len(weights) + len(CONFIG)
    assert glmchat(capsys, "verify", "some/model")[0] == 0
    assert json.loads(glmchat(capsys, "prune", "--dry-run", "--json")[1])["steps"] == []
    assert glmchat(capsys, "rm", "some/model", "--yes")[0] == 0
    assert not (shared / "ab" / xet).exists()


@pytest.mark.parametrize("command", [("pull", "mine"), ("mirror", "mine", "somewhere")])
def test_a_folder_that_was_added_is_not_an_unknown_model(command: tuple[str, ...], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_bytes(CONFIG)
    (tmp_path / "mine" / "model.safetensors").write_bytes(b"weights")
    assert glmchat(capsys, "add", str(tmp_path / "mine"))[0] == 0
    code, _, err = glmchat(capsys, *command)
    assert code == 2 and "mine is a folder on this machine; there is nothing to pull" in err


UNUSABLE: dict[str, tuple[dict[str, Any], str]] = {
    "quantised": ({"model_type": "llama", "quantization_config": {"quant_method": "aqlm"}}, "quant.method"),
    "gptq of three bits": (
        {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 3, "group_size": 128}},
        "quant.method",
    ),
    "encoder": ({"model_type": "bert"}, "model.encoder"),
    "pictures": ({"model_type": "vit"}, "model.kind"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_could_not_be_run_is_refused_before_its_weights_are_fetched(
    case: str, hub: LoopbackHub, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmchat.checkpoints import quantised

    monkeypatch.setattr(quantised, "find_spec", lambda name: None)  # no package that reads what others quantised
    config, code = UNUSABLE[case]
    hub.add("tiny/model", {**FILES, "config.json": json.dumps(config).encode()})
    for extra in ([], ["--dry-run"]):
        done, out, err = glmchat(capsys, "pull", "tiny/model", "--json", *extra)
        told = last_json(out)
        assert (done, told["code"]) == (2, code) and "--all fetches every file all the same" in told["hint"]
    assert hub.sent_for("model.safetensors") == 0 and not store.repo_folder("tiny/model").is_dir()
    done, _, err = glmchat(capsys, "pull", "tiny/model", "--all", "--quiet")
    assert done == 0 and "does not run" in err
