"""`glmchat mirror NAME DIR`: complete, self-describing, resumable, verified; and read with suspicion.

Covers hub/mirror.py, cli/mirror.py.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hub_helpers import glmchat
from loopback_hub import LoopbackHub, Synthetic

from glmchat.core.errors import Damaged, DoesNotFit, Failed, GlmchatError, Hostile, NetworkFailed, Usage
from glmchat.hub import store
from glmchat.hub.mirror import MirrorPlan, execute_mirror, plan_mirror
from glmchat.hub.mirror_folder import MARKER, MirrorFolder, Snapshot
from glmchat.hub.plan import PullOptions, plan_pull
from glmchat.hub.pull import execute
from glmchat.hub.references import parse
from glmchat.hub.safe_paths import check_listing, inside, safe_path

WEIGHTS = Synthetic(700_000, seed=5)
FILES: dict[str, bytes | Synthetic] = {
    "config.json": b'{"model_type": "gpt2"}',
    "model.safetensors": WEIGHTS,
    "modeling_code.py": b"raise SystemExit",
    "LICENSE": b"free",
    "deep/er/LICENSE": b"free",
}


@pytest.fixture
def hub(loopback_hub: LoopbackHub) -> LoopbackHub:
    loopback_hub.add("tiny/model", FILES, tag="v1.0")
    return loopback_hub


def planned(hub: LoopbackHub, folder: Path, name: str = "tiny/model", **options: tuple[str, ...]) -> MirrorPlan:
    return plan_mirror(parse(name), folder, PullOptions(endpoints=(hub.url,), **options))  # type: ignore[arg-type]


def mirrored(hub: LoopbackHub, folder: Path, name: str = "tiny/model", **options: tuple[str, ...]) -> Snapshot:
    return execute_mirror(planned(hub, folder, name, **options), lambda _: None, lambda: False)


def pulled(name: str, *endpoints: str) -> Path:
    plan = plan_pull(parse(name), PullOptions(endpoints=endpoints))
    return execute(plan, lambda _: None, lambda: False).path


def test_a_mirror_holds_every_file_and_says_what_it_is(hub: LoopbackHub, tmp_path: Path) -> None:
    commit = hub.repos["tiny/model"].refs["main"]
    snapshot = mirrored(hub, tmp_path / "m")
    assert {file.path for file in snapshot.files} == set(FILES) and snapshot.commit == commit
    place = tmp_path / "m/tiny--model"
    for path, data in FILES.items():
        whole = data if isinstance(data, bytes) else data.read(0, len(data))
        assert (place / commit / path).read_bytes() == whole
    assert "glmchat" in (tmp_path / "m/README.txt").read_text()
    assert json.loads((place / "refs.json").read_text()) == {"branches": {"main": commit}, "tags": {"v1.0": commit}}
    told = subprocess.run(["sha256sum", "-c", f"{commit}.sha256"], cwd=place, capture_output=True, text=True)
    assert told.returncode == 0 and told.stdout.count(": OK") == len(FILES)
    assert not (place / ".partial").exists()


def test_the_listing_gives_the_hashes_that_a_hub_gives(hub: LoopbackHub, tmp_path: Path) -> None:
    for file in mirrored(hub, tmp_path / "m").files:
        known = hub.file("tiny/model", file.path)
        assert (file.sha256, file.git_blob, file.lfs) == (known.sha256, known.git_blob, known.lfs)


def test_a_mirror_that_was_broken_off_goes_on_and_is_nothing_until_it_is_whole(
    hub: LoopbackHub, tmp_path: Path
) -> None:
    hub.fault("model.safetensors", cut_after=300_000)
    hub.fault("model.safetensors", status=404, times=None)
    with pytest.raises(GlmchatError):
        mirrored(hub, tmp_path / "m")
    assert MirrorFolder(tmp_path / "m").repos() == []
    with pytest.raises(Failed, match="has no tiny/model"):
        pulled("tiny/model", str(tmp_path / "m"))
    hub.heal()
    before = hub.sent_for("model.safetensors")
    mirrored(hub, tmp_path / "m")
    assert hub.sent_for("model.safetensors") - before == len(WEIGHTS) - 300_000
    assert MirrorFolder(tmp_path / "m").repos() == ["tiny/model"]


def test_a_complete_mirror_plans_nothing_and_check_finds_a_flipped_byte(hub: LoopbackHub, tmp_path: Path) -> None:
    snapshot = mirrored(hub, tmp_path / "m")
    plan = planned(hub, tmp_path / "m")
    assert plan.done and plan.bytes_needed == 0 and "is in the mirror" in plan.lines()[0]
    weights = tmp_path / "m/tiny--model" / snapshot.commit / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[1000] ^= 1
    weights.write_bytes(damaged)
    mirrored(hub, tmp_path / "m")
    assert weights.read_bytes() == WEIGHTS.read(0, len(WEIGHTS))


def test_what_this_machine_has_is_copied_and_not_fetched(hub: LoopbackHub, tmp_path: Path) -> None:
    pulled("tiny/model", hub.url)
    before = hub.sent_for("model.safetensors")
    plan = planned(hub, tmp_path / "m")
    assert plan.bytes_local >= len(WEIGHTS)
    execute_mirror(plan, lambda _: None, lambda: False)
    assert hub.sent_for("model.safetensors") == before


def test_a_second_commit_shares_the_files_that_did_not_change(hub: LoopbackHub, tmp_path: Path) -> None:
    first = mirrored(hub, tmp_path / "m")
    hub.add("tiny/model", {**FILES, "config.json": b'{"model_type": "gpt2", "v": 2}'})
    before = hub.sent_for("model.safetensors")
    second = mirrored(hub, tmp_path / "m")
    assert hub.sent_for("model.safetensors") == before
    mirror = MirrorFolder(tmp_path / "m")
    assert mirror.commits("tiny/model") == sorted([first.commit, second.commit])
    assert mirror.resolve("tiny/model", "main") == second.commit
    assert mirror.resolve("tiny/model", "v1.0") == first.commit
    assert mirror.resolve("tiny/model", first.commit[:8]) == first.commit
    assert mirror.resolve("tiny/model", "nothing") is None


def test_included_files_add_up(hub: LoopbackHub, tmp_path: Path) -> None:
    assert [f.path for f in mirrored(hub, tmp_path / "m", include=("*.json",)).files] == ["config.json"]
    both = mirrored(hub, tmp_path / "m", include=("LICENSE",))
    assert {f.path for f in both.files} == {"config.json", "LICENSE"}


def test_a_mirror_folder_is_an_endpoint_without_any_network(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrored(hub, tmp_path / "m")
    asked = len(hub.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = pulled("tiny/model", str(tmp_path / "m"))
    assert (path / "model.safetensors").read_bytes() == WEIGHTS.read(0, len(WEIGHTS))
    assert len(hub.requests) == asked
    assert pulled("TINY/model@v1.0", str(tmp_path / "m")).name == path.name


def test_a_mirror_of_a_mirror_folder_is_the_same(hub: LoopbackHub, tmp_path: Path) -> None:
    one = mirrored(hub, tmp_path / "one")
    options = PullOptions(endpoints=(str(tmp_path / "one"),))
    two = execute_mirror(plan_mirror(parse("tiny/model"), tmp_path / "two", options), lambda _: None, lambda: False)
    assert one.files == two.files and one.commit == two.commit


def test_a_damaged_mirror_is_found_out_when_pulled_from(hub: LoopbackHub, tmp_path: Path) -> None:
    snapshot = mirrored(hub, tmp_path / "m")
    (tmp_path / "m/tiny--model" / snapshot.commit / "model.safetensors").write_bytes(b"\0" * len(WEIGHTS))
    with pytest.raises(Damaged) as caught:
        pulled("tiny/model", str(tmp_path / "m"))
    assert "model.safetensors" in caught.value.message
    path = pulled("tiny/model", str(tmp_path / "m"), hub.url)
    assert (path / "model.safetensors").read_bytes() == WEIGHTS.read(0, len(WEIGHTS)), "no second source was asked"


def test_links_in_a_mirror_that_lead_outside_are_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    snapshot = mirrored(hub, tmp_path / "m")
    (tmp_path / "secret").write_bytes(b'{"model_type": "gpt2"}')
    config = tmp_path / "m/tiny--model" / snapshot.commit / "config.json"
    config.unlink()
    config.symlink_to(tmp_path / "secret")
    with pytest.raises(Damaged, match="link"):
        pulled("tiny/model", str(tmp_path / "m"))
    with pytest.raises(Hostile):
        MirrorFolder(tmp_path / "m").path("tiny/model", snapshot.commit, "config.json")
    refs = tmp_path / "m/tiny--model/refs.json"
    shutil.move(refs, tmp_path / "refs.json")
    refs.symlink_to(tmp_path / "refs.json")
    with pytest.raises(Hostile):
        MirrorFolder(tmp_path / "m").refs("tiny/model")


HOSTILE = [
    "../../x", "/etc/passwd", "a/../../x", "C:/x", "c:x", "a\\b", "\\\\server\\x", "a\0b", "a\nb", "a\x1b[31m",
    "CON", "nul.txt", "a/COM1.bin", "lpt9", "x.", "x ", "", ".", "a//b", "./a", "~/x", ".git/hooks/pre-commit",
    "a/.GIT/config", "x" * 300, "a/" * 600 + "b", "\ud800", "a\u202eb",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_hostile_name_is_refused_in_a_line(name: str) -> None:
    with pytest.raises(Hostile) as caught:
        safe_path(name, source="evil.example")
    assert caught.value.exit == 3 and "\n" not in caught.value.message and "\x1b" not in caught.value.message
    assert "evil.example" in caught.value.message


@pytest.mark.parametrize(
    "name",
    ["config.json", "a/b/c.bin", "模型.bin", "console.txt", ".gitattributes", "a b", "...x", "x-00001-of-00008.bin"],
)
def test_an_ordinary_name_stays_as_it_is(name: str) -> None:
    assert safe_path(name) == name


@pytest.mark.parametrize("names", [["a", "a"], ["A", "a"], ["a", "a/b"], ["x/y", "X"]])
def test_names_that_collide_are_refused(names: list[str]) -> None:
    with pytest.raises(Hostile):
        check_listing(names)


def test_a_hostile_listing_in_a_mirror_writes_nothing(hub: LoopbackHub, tmp_path: Path) -> None:
    snapshot = mirrored(hub, tmp_path / "m")
    listing = tmp_path / "m/tiny--model" / f"{snapshot.commit}.json"
    data = json.loads(listing.read_text())
    data["files"][0]["path"] = "../../../escaped"
    listing.write_text(json.dumps(data))
    with pytest.raises(Hostile):
        pulled("tiny/model", str(tmp_path / "m"))
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"files": 3}', '{"files": [{"path": "a"}]}', "[" * 100_000])
def test_a_listing_that_is_none_is_damaged(hub: LoopbackHub, tmp_path: Path, text: str) -> None:
    snapshot = mirrored(hub, tmp_path / "m")
    (tmp_path / "m/tiny--model" / f"{snapshot.commit}.json").write_text(text)
    with pytest.raises(Damaged):
        MirrorFolder(tmp_path / "m").snapshot("tiny/model", snapshot.commit)


def test_a_folder_that_is_no_mirror_is_told(tmp_path: Path) -> None:
    with pytest.raises(Usage, match="not a mirror"):
        MirrorFolder(tmp_path)
    (tmp_path / MARKER).write_text('{"format": 99}')
    with pytest.raises(Usage, match="99"):
        MirrorFolder(tmp_path)


def test_inside_follows_links_that_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/real").write_text("x")
    (tmp_path / "m/link").symlink_to("real")
    (tmp_path / "m/out").symlink_to("..")
    assert inside(tmp_path / "m", "link") == (tmp_path / "m/real").resolve()
    with pytest.raises(Hostile):
        inside(tmp_path / "m", "out/m/real/../../x")
    with pytest.raises(Hostile):
        inside(tmp_path / "m", "out")


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(hub, tmp_path / "m")
    monkeypatch.setattr(store, "free_bytes", lambda _: 100_000)
    with pytest.raises(DoesNotFit):
        execute_mirror(plan, lambda _: None, lambda: False)
    assert hub.sent_for("model.safetensors") == 0


def test_a_pinned_model_is_planned_offline_and_becomes_main(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    listed = json.loads((shared / "catalogue/THUDM--chatglm-6b@096f3de6b495.json").read_text())
    plan = plan_mirror(parse("chatglm-6b@096f3de6b495"), tmp_path / "m")
    assert {f.path for f in plan.files} == {f["path"] for f in listed["files"]}
    assert plan.commit == listed["revision"] and plan.branches == ("main",)
    assert plan.bytes_total == listed["total_bytes"]


def test_a_dead_hub_leaves_one_sentence(tmp_path: Path) -> None:
    with LoopbackHub() as gone:
        pass
    with pytest.raises(NetworkFailed):
        mirrored(gone, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_command_line_writes_lists_and_repeats(hub: LoopbackHub, tmp_path: Path, capsys: Any) -> None:
    folder = str(tmp_path / "m")
    code, out, err = glmchat(capsys, "mirror", "tiny/model", folder, "--endpoint", hub.url, "--json")
    assert code == 0, err
    events = [json.loads(line) for line in out.splitlines()]
    assert events[0]["event"] == "plan" and events[-1]["event"] == "done"
    assert hashlib.sha256(b"free").hexdigest() in {f["sha256"] for f in events[-1]["files"]}
    asked = len(hub.requests_for("model.safetensors"))
    assert glmchat(capsys, "mirror", "tiny/model", folder, "--endpoint", hub.url)[0] == 0
    assert len(hub.requests_for("model.safetensors")) == asked
    listed = glmchat(capsys, "mirror", "list", folder, "--json")[1]
    assert json.loads(listed)[0]["names"] == ["main", "v1.0"]
    assert glmchat(capsys, "mirror", "list", str(tmp_path))[0] == 2
    code, out, err = glmchat(capsys, "mirror")
    assert (code, out) == (2, "") and "Missing command" in err


def test_nothing_is_written_through_a_link_that_leads_out(hub: LoopbackHub, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "tiny--model").symlink_to(outside)
    with pytest.raises(Hostile):
        mirrored(hub, tmp_path / "mirror")
    assert list(outside.iterdir()) == []


def test_a_branch_that_names_no_commit_is_left_out(hub: LoopbackHub, tmp_path: Path) -> None:
    mirrored(hub, tmp_path / "mirror")
    (tmp_path / "mirror/tiny--model/refs.json").write_text('{"branches": {"main": ["x"]}}')
    assert MirrorFolder(tmp_path / "mirror").refs("tiny/model") == ({}, {})
