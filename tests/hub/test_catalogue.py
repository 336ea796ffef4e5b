"""The catalogue, the user's own, and what an error in it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hub_helpers import COMMIT_A, COMMIT_B, glmchat, hub_entry, last_json, user_catalogue

from glmchat.core.errors import UnknownModel, Usage
from glmchat.hub import catalogue
from glmchat.hub.lookup import find_installed
from glmchat.hub.references import parse

FIRST = "096f3de6b4959ce38bef7bb05f3129c931a3084e"


def find(text: str) -> catalogue.Entry | None:
    return catalogue.load().find(parse(text))


@pytest.mark.parametrize(
    ("text", "commit"),
    [
        ("chatglm-6b", "8b7d33596d18c5e83e2da052d05ca4db02e60620"),
        ("THUDM/chatglm-6b", "8b7d33596d18c5e83e2da052d05ca4db02e60620"),
        ("zai-org/chatglm-6b@main", "8b7d33596d18c5e83e2da052d05ca4db02e60620"),
        ("chatglm-6b@096f3de6", FIRST),
        ("THUDM/ChatGLM-6B@v0.1.0", "f83182484538e663a03d3f73647f10f89878f438"),
        ("chatglm-6b@v1.1.0", "942945df047dee66f653c68ae0e56655045f1741"),
        ("chatglm3", "456aa875cf1f46623006edaa23103774ea9c0eae"),
        ("zai-org/chatglm2-6b-int4", "382cc704867dc2b78368576166799ace0f89d9ef"),
    ],
)
def test_names_labels_and_both_owners_lead_to_the_pinned_commit(text: str, commit: str) -> None:
    entry = find(text)
    assert entry is not None
    assert entry.revision == commit


def test_an_unlisted_repository_is_no_error_and_an_unknown_name_suggests_the_nearest() -> None:
    assert find("someone/something") is None
    assert find("chatglm-6b@deadbeef") is None
    with pytest.raises(UnknownModel) as caught:
        find("chatglm6b")
    assert "chatglm-6b" in caught.value.hint
    assert caught.value.exit == 2


def test_the_catalogue_says_what_the_repositories_own_records_say(shared: Path) -> None:
    recorded = 0
    for path in sorted((shared / "catalogue").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        entry = catalogue.load().of_repo(record["repo"], record["revision"])
        assert entry is not None, path.name
        ours = {f.path: (f.size, f.sha256, f.git_blob) for f in entry.files}
        assert ours == {f["path"]: (f["size"], f["sha256"], f.get("git_blob")) for f in record["files"]}
        recorded += 1
    assert recorded == 6


def test_every_entry_has_what_the_window_and_the_engine_ask_for() -> None:
    for entry in catalogue.load():
        assert entry.family
        assert entry.licence is not None and entry.licence.url.startswith("https://")
        assert entry.parameters and entry.context and entry.sampling and entry.files
        assert all(f.size and f.sha256 for f in entry.files)
        assert find(entry.reference) == entry


def test_the_users_own_file_adds_and_overrides() -> None:
    files = {"config.json": b"{}", "model.safetensors": b"x" * 10}
    user_catalogue(hub_entry("mine", "me/mine", COMMIT_A, files), hub_entry("chatglm3-6b", "me/glm", COMMIT_B, files))
    assert find("mine").revision == COMMIT_A  # type: ignore[union-attr]
    assert find("chatglm3-6b").revision == COMMIT_B  # type: ignore[union-attr]
    assert find("chatglm-6b") is not None


def test_a_folder_named_as_a_source_is_the_model_and_serves_pulls(tmp_path: Path, capsys: Any) -> None:
    files = {"config.json": b"{}", "model.safetensors": b"x" * 10}
    folder = tmp_path / "nas"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    source = f'[[model.source]]\nkind = "path"\nrepo = "{folder}"\n\n[[model.file]]'
    in_place = hub_entry("in-place", "x/y", COMMIT_A, files).replace("[[model.file]]", source, 1)
    start, stop = in_place.index("[[model.source]]"), in_place.index(source)
    user_catalogue(in_place[:start] + in_place[stop:])  # the folder alone, no hub
    row = find_installed(parse("in-place"))
    assert row is not None and row.path == folder and row.complete
    assert glmchat(capsys, "verify", "in-place")[0] == 0
    assert glmchat(capsys, "pull", "in-place")[0] == 2
    user_catalogue(hub_entry("copied", "x/y", COMMIT_A, files).replace("[[model.file]]", source, 1))
    code, out, err = glmchat(capsys, "pull", "copied", "--endpoint", "http://127.0.0.1:9", "--json")
    assert code == 0, err
    assert last_json(out)["repo"] == "x/y"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('[[model]]\nname = "x"\n\nsize = = 3\n', 4, "line 4"),
        ('[[model]]\nname = "x"\nnmae = "y"\n', 3, "nmae"),
        ('[[model]]\nname = "ok"\n\n[[model]]\nlabel = "no name"\n', 4, "name is missing"),
        ('[[model]]\nname = "x"\n[[model.file]]\npath = "../up"\n', 4, "points outside its folder"),
        ('[[model]]\nname = "x"\n[[model.file]]\npath = "a"\n[[model.file]]\npath = "b"\nsha256 = "12"\n', 7, "sha256"),
        ('[[model]]\nname = "x"\n[[model.source]]\nkind = "ftp"\nrepo = "a/b"\n', 4, "kind"),
        ('[[model]]\nname = "x"\n[[model.source]]\nkind = "hf"\nrepo = "a/b"\nrevision = "main"\n', 6, "full commit"),
        ('[[model]]\nname = "x"\nsampling = { temperature = 99.0 }\n', 3, "temperature"),
        ('[[model]]\nname = "x"\naliases = "one"\n', 3, "aliases"),
        ("[other]\na = 1\n", 1, "model"),
        ('[[model]]\nname = ["x"]\n', 2, "name"),
        ('[[model]]\nname = "../x"\n', 2, "name"),
        ('[[model]]\nname = "x"\n[[model.source]]\nkind = "pypi"\nrepo = "six\\n-e ."\n', 5, "repo"),
    ],
)
def test_a_broken_file_names_the_file_and_the_line(text: str, line: int, words: str) -> None:
    user_catalogue(text)
    with pytest.raises(Usage) as caught:
        catalogue.load()
    assert "models.toml" in caught.value.message
    assert f"line {line}" in caught.value.message
    assert words in caught.value.message


def test_a_file_that_is_nested_without_end_is_broken() -> None:
    user_catalogue("a = " + "[" * 20_000)
    with pytest.raises(Usage):
        catalogue.load()


def test_the_command_line_lists_what_is_known_and_exits_2_for_an_unknown_name(capsys: Any) -> None:
    code, out, _ = glmchat(capsys, "list", "--known", "--json")
    assert code == 0
    assert {"chatglm-6b", "chatglm3-6b", "smollm2"} <= {row["name"] for row in json.loads(out)}
    code, out, err = glmchat(capsys, "pull", "smollm3", "--json")
    assert code == 2
    assert json.loads(out)["code"] == "model.unknown"
    assert "smollm2" in err
