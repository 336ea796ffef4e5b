"""What ModelScope's own tools fetched is found, by every layout of their cache, and is left as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub_helpers import COMMIT_A, CONFIG, glmchat, put_into_cache, sha256, user_catalogue

from glmchat.core import locations
from glmchat.hub import lookup
from glmchat.hub.modelscope_cache import folders_of
from glmchat.hub.references import parse

# Where modelscope 1.9 to 1.40 put models, below MODELSCOPE_CACHE or ~/.cache/modelscope.
LAYOUTS = (
    "hub/Zhipu/tiny-1___5",
    "Zhipu/tiny-1___5",
    "hub/models/Zhipu/tiny-1___5",
    "models/Zhipu/tiny-1___5",
    "models/Zhipu--tiny-1.5/snapshots/master",
)
FILES = {"config.json": CONFIG, "model.safetensors": b"weights" * 20}


def fill(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    folder.mkdir(parents=True)
    for name, content in {**files, ".mv": b"Revision:master", ".msc": b"\x80\x04"}.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("is_set", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_listed_under_its_name_which_finds_it(
    layout: str, is_set: bool, own_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    root = own_home / ".cache" / "modelscope"
    if is_set:
        monkeypatch.setenv("MODELSCOPE_CACHE", "~/elsewhere")
        root = own_home / "elsewhere"
    folder = fill(root / layout)
    fill(root / layout.replace("Zhipu", "._____temp/Zhipu"))  # half a download
    fill(root / "datasets" / "Zhipu" / "rows", {"rows.jsonl": b"{}"})
    if "___" in layout:
        (folder.parent / "tiny-1.5").symlink_to(folder)
    (row,) = json.loads(glmchat(capsys, "list", "--json")[1])
    assert (row["name"], Path(row["path"])) == ("Zhipu/tiny-1.5", folder)
    assert (row["family"], row["complete"]) == ("llama", True)
    for name in ("Zhipu/tiny-1.5", "zhipu/Tiny-1.5", str(folder)):
        found = lookup.find_installed(parse(name))
        assert found is not None and found.path == folder
    assert folders_of("zhipu/tiny-1.5") == [folder]
    before = sorted(root.rglob("*"))
    assert glmchat(capsys, "rm", "Zhipu/tiny-1.5", "--yes")[0] == 2  # the files are another program's
    assert glmchat(capsys, "prune", "--yes")[0] == 0
    assert sorted(root.rglob("*")) == before


def test_a_shard_that_is_still_to_come_makes_it_incomplete(own_home: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    files = {"config.json": CONFIG, "model.safetensors.index.json": json.dumps(index).encode()}
    fill(own_home / ".cache/modelscope/hub/models/a/b", {**files, "model-00001-of-00002.safetensors": b"w"})
    (row,) = lookup.list_installed()
    assert not row.complete


def test_a_model_of_the_catalogue_has_its_name_if_its_files_have_their_sizes(own_home: Path) -> None:
    listed = "".join(
        f'[[model.file]]\npath = "{name}"\nsize = {len(content)}\nsha256 = "{sha256(content)}"\n\n'
        for name, content in FILES.items()
    )
    source = '[[model.source]]\nkind = "modelscope"\nrepo = "Zhipu/tiny-1.5"\n'
    user_catalogue(f'[[model]]\nname = "little"\nlabel = "main"\nfamily = "llama"\n\n{source}{listed}')
    folder = fill(own_home / ".cache/modelscope" / LAYOUTS[2])
    for name in ("little", "Zhipu/tiny-1.5"):
        row = lookup.find_installed(parse(name))
        assert row is not None and row.path == folder and row.name.startswith("little")
    (folder / "model.safetensors").write_bytes(b"others")
    row = lookup.find_installed(parse("Zhipu/tiny-1.5"))
    assert row is not None and (row.name, row.path) == ("Zhipu/tiny-1.5", folder)
    assert lookup.find_installed(parse("little")) is None


def test_beside_the_hubs_cache_the_second_is_named_by_its_path(own_home: Path) -> None:
    first = put_into_cache("Zhipu/tiny-1.5", COMMIT_A, FILES, ref="main")
    folder = fill(own_home / ".cache/modelscope" / LAYOUTS[2])
    rows = lookup.told_apart(lookup.list_installed())
    assert [(row.name, row.path) for row in rows] == [("Zhipu/tiny-1.5", first), (str(folder), folder)]
    shutil.rmtree(locations.hf_cache())
    assert [row.name for row in lookup.list_installed()] == ["Zhipu/tiny-1.5"]
