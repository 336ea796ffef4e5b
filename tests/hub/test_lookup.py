"""A lookup finds the row that the list shows, for every kind of row, and looks at no other model's files.

Covers hub/installed.py, hub/manifests.py.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import adapter_builders
import numpy as np
import pytest
from gguf import GGUFWriter
from hub_helpers import (
    COMMIT_A,
    COMMIT_B,
    CONFIG,
    glmchat,
    hub_entry,
    make_wheel,
    put_into_cache,
    sha256,
    user_catalogue,
    wheel_entry,
)
from loopback_hub import LoopbackHub, Synthetic

from glmchat.chat.launch import locate
from glmchat.core import locations
from glmchat.core.errors import GlmchatError
from glmchat.hub import adapters, aliases, installed, lookup, manifests, store
from glmchat.hub.installed import Installed
from glmchat.hub.manifests import FileRecord, Manifest
from glmchat.hub.references import parse

KNOWN = {"config.json": CONFIG, "model.safetensors": b"known" * 20}
OLDER = {"config.json": CONFIG, "model.safetensors": b"older" * 20}
DIGITS = "0123456789" * 4


def made(name: str, quant: str, base: str, kind: str = "quantized", revision: str | None = None) -> Path:
    """A folder that glmchat made."""
    folder = locations.models_dir() / name.replace(":", "-").replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    weights = name.encode() * 9
    (folder / "model.safetensors").write_bytes(weights)
    files = (FileRecord("model.safetensors", len(weights), sha256(weights)),)
    record = Manifest(name, kind, "made", folder, revision=revision, quant=quant, base=base, files=files)
    (folder / manifests.BESIDE).write_text(json.dumps(record.to_json()))
    return folder


def plain(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes(CONFIG)
    for name in names or ("model.safetensors",):
        (folder / name).write_bytes(f"{folder.name}/{name}".encode() * 3)
    return folder


def record(name: str, root: Path, *files: str, **more: Any) -> None:
    records = tuple(FileRecord(f, (root / f).stat().st_size) for f in files)
    more.setdefault("source", "path")
    manifests.write(Manifest(name=name, kind="model", root=root, files=records, **more))


def half_pulled() -> None:
    size = 500
    file = FileRecord("model.safetensors", size, sha256(b"half"))
    root = store.snapshot("half/pulled", COMMIT_A)
    manifests.write(
        Manifest("half/pulled", "model", "hf", root, "half/pulled", COMMIT_A, complete=False, files=(file,))
    )
    partial = store.partial("half/pulled", sha256(b"half"))
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(b"h" * 100)


def stranger_in_the_cache(ref: str = "") -> None:
    if not store.repo_folder("some/one").exists():
        put_into_cache("some/one", COMMIT_A, {"config.json": CONFIG, "model.safetensors": b"a" * 30})
        put_into_cache("some/one", COMMIT_B, {"config.json": CONFIG, "model.safetensors": b"b" * 30})
    if ref:
        (refs := store.repo_folder("some/one") / "refs").mkdir(exist_ok=True)
        (refs / ref).write_text(COMMIT_A)


def pulled() -> None:
    """A manifest for a snapshot, in case that it is there."""
    root = store.snapshot("new/known", COMMIT_A)
    files = tuple(FileRecord(name, len(content), sha256(content)) for name, content in KNOWN.items())
    manifests.write(Manifest("new/known", "model", "hf", root, "new/known", COMMIT_A, files=files))


def damaged_manifests() -> None:
    locations.manifests_dir().mkdir(parents=True, exist_ok=True)
    (locations.manifests_dir() / "some--one@aaaa.json").write_text("{")
    (locations.manifests_dir() / "known@path.json").write_text('{"name": "known", "files": [{"path": "../x"}]}')
    (locations.models_dir() / "broken").mkdir(parents=True, exist_ok=True)
    (locations.models_dir() / "broken" / manifests.BESIDE).write_text("[1]")


def adapter_by_hand(name: str) -> None:
    folder = locations.adapters_dir() / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/one"}')


def kept_adapter(tmp: Path) -> None:
    source = adapter_builders.write_lora(tmp / "lora", adapter_builders.factors(2), base_model_name_or_path="some/one")
    if adapters.by_name("poet") is None:
        adapters.keep("poet", sorted(source.iterdir()), {"kind": "lora"}, adapters.Origin("x"), base="some/one")


def two_names_of_one_folder(tmp: Path) -> None:
    folder = plain(tmp / "shared", "model.safetensors", "other.safetensors")
    record("first", folder, "model.safetensors")
    record("second", folder, "other.safetensors")
    record("tiny/pulled", folder, "model.safetensors", source="modelscope", repo="tiny/pulled", revision="v1")


def two_ggufs_of_one_folder(tmp: Path) -> None:
    folder = plain(tmp / "ggufs", "a-q4_0.gguf", "b-f16.gguf")
    record("gguf-a", folder, "a-q4_0.gguf")
    record("gguf-b", folder, "b-f16.gguf")


def recognised(tmp: Path) -> None:
    """A folder of the user's own that holds a revision of the catalogue."""
    folder = plain(tmp / "recognised")
    record("mine", folder, "config.json", "model.safetensors", repo="new/known", revision=COMMIT_A)


def copy_added_by_hand(tmp: Path) -> None:
    folder = made("brought:int8", "int8", "known")
    record("brought", folder, "model.safetensors")
    target = tmp / "link"
    if not target.is_symlink():
        target.symlink_to(folder)


def kinds(tmp: Path) -> list[Callable[[], object]]:
    """What may be in a store, each alone; a test puts some of it there."""
    return [
        lambda: put_into_cache("new/known", COMMIT_A, KNOWN, ref="main"),
        lambda: put_into_cache("new/known", COMMIT_B, OLDER),
        lambda: put_into_cache("old/known", COMMIT_A, KNOWN),
        lambda: put_into_cache("fork/of-it", COMMIT_A, KNOWN),
        pulled,
        stranger_in_the_cache,
        lambda: stranger_in_the_cache("main"),
        lambda: put_into_cache("gguf/repo", COMMIT_A, {"x-q4_0.gguf": b"g" * 50}),
        lambda: put_into_cache("gguf/repo", COMMIT_B, {"x-q4_0.gguf": b"g" * 50, "README.md": b"r"}),
        lambda: put_into_cache("lonely", DIGITS, {"config.json": CONFIG, "model.safetensors": b"l"}),
        lambda: put_into_cache("no/model", COMMIT_A, {"README.md": b"r"}),
        lambda: put_into_cache(
            "half/shards", COMMIT_A, {"config.json": CONFIG, "model-00001-of-00002.safetensors": b"1"}
        ),
        half_pulled,
        damaged_manifests,
        lambda: made("known:int4", "int4-g128", "known"),
        lambda: made("known:int8", "int8", f"known@{COMMIT_A[:12]}", revision=COMMIT_A),
        lambda: made("some/one:int4", "int4-g32", "some/one"),
        lambda: made(f"some/one@{COMMIT_A[:12]}:int8", "int8", f"some/one@{COMMIT_A[:12]}"),
        lambda: made("gguf-a:int4", "int4", "gguf-a"),
        lambda: made("merged", "none", "known", kind="model"),
        lambda: made("odd-adapter", "none", "known", kind="adapter"),
        lambda: copy_added_by_hand(tmp),
        lambda: two_names_of_one_folder(tmp),
        lambda: two_ggufs_of_one_folder(tmp),
        lambda: recognised(tmp),
        lambda: kept_adapter(tmp),
        lambda: adapter_by_hand("hand"),
        lambda: adapter_by_hand(".growing"),
        lambda: plain(tmp / "source"),
        lambda: put_into_cache("in/cache", COMMIT_A, {"x.gguf": b"cached" * 9}),
        lambda: aliases.set_alias("nick", "known"),
        lambda: aliases.set_alias("chosen", "some/one"),
    ]


def catalogue(tmp: Path) -> None:
    """One model in two revisions, one that a folder is the source of, and one whose source is a snapshot."""
    folder, cached = tmp / "source", store.snapshot("in/cache", COMMIT_A)
    content = b"source/model.safetensors" * 3
    user_catalogue(
        hub_entry("known", "new/known", COMMIT_A, KNOWN).replace(
            'label = "main"', 'label = "main"\naliases = ["old/known", "bekannt"]'
        ),
        hub_entry("known", "new/known", COMMIT_B, OLDER, label="old"),
        f'[[model]]\nname = "placed"\n[[model.source]]\nkind = "path"\nrepo = "{folder}"\n'
        f'[[model.file]]\npath = "model.safetensors"\nsize = {len(content)}\nsha256 = "{sha256(content)}"',
        f'[[model]]\nname = "snapped"\n[[model.source]]\nkind = "path"\nrepo = "{cached}"\n'
        f'[[model.file]]\npath = "x.gguf"\nsize = 54\nsha256 = "{sha256(b"cached" * 9)}"',
    )


def store_of(tmp: Path, seed: int) -> None:
    """Seed 0: one of everything; else a random half, in a random order."""
    catalogue(tmp)
    pieces = kinds(tmp)
    chance = random.Random(seed)
    if seed:
        pieces = chance.sample(pieces, len(pieces) // 2)
    for put in pieces:
        put()


def meaning(text: str, *, incomplete: bool) -> object:
    """What a reference means: a row, None, or the words of an error."""
    try:
        return lookup.find_installed(parse(text), incomplete=incomplete)
    except GlmchatError as error:
        return (type(error), error.code, error.message, error.hint)


def references(rows: list[Installed]) -> list[str]:
    """Everything one may type for these rows, and names that mean nothing."""
    words = {"known", "bekannt", "old/known", "placed", "snapped", "nick", "chosen", "nobody", "poet", "hand", "lonely"}
    words |= {"first", "second", "mine", "some/one", "fork/of-it", "odd-adapter", "no/such", "Known"}
    words |= {row.name.partition(":")[0] for row in rows}
    revisions = {"", "@main", "@old", f"@{COMMIT_A}", f"@{COMMIT_B[:7]}", "@nonsense"}
    plain = {f"{word}{revision}" for word in words for revision in (revisions if "@" not in word else {""})}
    return sorted({f"{word}{quant}" for word in plain for quant in ("", ":int4", ":int8")})


@pytest.mark.parametrize("seed", range(6))
def test_a_lookup_agrees_with_the_list_for_every_kind_of_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    store_of(tmp_path, seed)
    rows = lookup.list_installed()
    if not seed:
        assert {row.kind for row in rows} == {"model", "quantized", "adapter"} and len(rows) > 25
        assert {row.source for row in rows} == {"hf", "path", "made"} and not all(row.complete for row in rows)
    for row in rows:
        assert lookup.by_path(row.path) == next(r for r in rows if r.path == row.path)
        assert lookup.by_name(row.name.upper()) == [r for r in rows if r.name.lower() == row.name.lower()]
        copies = [r for r in rows if r.kind == "quantized" and r.base == row.name]
        assert lookup.made_from(row.name) == copies
        if row.kind == "adapter" and row.path.parent == locations.adapters_dir():
            assert adapters.by_name(row.name) == row
    adapter_rows = [row for row in rows if row.path.parent == locations.adapters_dir()]
    assert adapters.list_adapters() == adapter_rows
    assert lookup.by_name("nobody") == [] and lookup.by_path(tmp_path) is None
    texts = random.Random(seed).sample(references(rows), 60)
    narrow = {(text, half): meaning(text, incomplete=half) for text in texts for half in (False, True)}
    monkeypatch.setattr(lookup, "_may_mean", lambda *_: True)  # now the whole store is looked at for every reference
    assert not [(text, half) for text, half in narrow if narrow[text, half] != meaning(text, incomplete=half)]
    assert sum(isinstance(row, Installed) for row in narrow.values()) > 5


def test_a_row_is_found_by_every_path_that_leads_to_it(tmp_path: Path) -> None:
    store_of(tmp_path, 0)
    rows = {row.name: row for row in lookup.list_installed()}
    assert lookup.by_path(tmp_path / "link") == rows["brought"]
    first, second = (store.snapshot("gguf/repo", commit) / "x-q4_0.gguf" for commit in (COMMIT_A, COMMIT_B))
    assert first.resolve() == second.resolve()
    for path in (first, second):  # one blob, two revisions: each path is its own
        row = lookup.by_path(path)
        assert row is not None and row.path == path
    elsewhere = tmp_path / "elsewhere.gguf"
    elsewhere.symlink_to(second)
    row = lookup.by_path(elsewhere)
    assert row is not None and row.repo == "gguf/repo"
    (loop := tmp_path / "around").symlink_to(tmp_path / "around")
    assert lookup.by_path(tmp_path / "nowhere") is None and loop.is_symlink()


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders whose files were looked at. The list of everything raises."""

    def forbidden() -> NoReturn:
        raise AssertionError("the whole store was looked at for one row")

    monkeypatch.setattr(lookup, "list_installed", forbidden)
    seen: list[Path] = []

    def noting(name: str, root: Callable[[Any], Path]) -> None:
        real = getattr(installed, name)

        def note(subject: Any, *more: Any) -> Any:
            seen.append(root(subject))
            return real(subject, *more)

        monkeypatch.setattr(installed, name, note)

    noting("row_of_manifest", lambda manifest: manifest.root)
    for name in ("row_of_made", "row_of_snapshot", "row_of_adapter"):
        noting(name, lambda folder: folder)
    return seen


def test_the_commands_for_one_name_look_at_that_model_alone(
    tmp_path: Path, capsys: Any, looked_at: list[Path], loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", loopback_hub.url)
    for number in range(5):
        put_into_cache(f"other/m{number}", COMMIT_A, {"config.json": CONFIG, "model.safetensors": b"o" * 9})
    loopback_hub.add("tiny/model", {"config.json": CONFIG, "model.safetensors": Synthetic(9_000, 7)})
    assert glmchat(capsys, "pull", "tiny/model")[0] == 0
    folder = plain(tmp_path / "folder")
    assert glmchat(capsys, "add", str(folder), "--name", "mine")[0] == 0
    assert glmchat(capsys, "add", str(plain(tmp_path / "unnamed")))[0] == 0
    assert glmchat(capsys, "alias", "nick", "tiny/model")[0] == 0
    for name, bits in (("tiny/model", None), ("nick", 4), ("mine", None), (str(folder), 8)):
        assert locate(name, quant=bits)[1] == bits
        for command in ("show", "verify", "lock"):
            if command != "lock" or (name != str(folder) and name != "mine"):
                assert glmchat(capsys, command, name)[0] == 0, (command, name)
    row = lookup.last_used()
    assert row is not None and row.name == "unnamed"
    assert glmchat(capsys, "rm", "mine", "tiny/model", "--yes")[0] == 0
    assert not [path for path in looked_at if "other" in str(path)]
    assert looked_at


def test_the_commands_for_one_adapter_look_at_it_alone(tmp_path: Path, capsys: Any, looked_at: list[Path]) -> None:
    kept_adapter(tmp_path)
    shutil.copytree(locations.adapters_dir() / "poet", locations.adapters_dir() / "bard")
    adapter_by_hand("other")
    stranger_in_the_cache()
    for command in (("verify", "poet"), ("adapters", "show", "bard"), ("adapters", "rm", "bard", "--yes")):
        assert glmchat(capsys, *command)[0] == 0, command
    assert {path.name for path in looked_at} == {"poet", "bard"}


def test_a_folder_that_gets_another_name_is_still_known_by_the_one_before(tmp_path: Path, capsys: Any) -> None:
    folder = plain(tmp_path / "model")
    assert glmchat(capsys, "add", str(folder), "--name", "first")[0] == 0
    copy = made("first:int4", "int4", "first")
    assert glmchat(capsys, "add", str(folder), "--name", "second")[0] == 0
    assert [row.name for row in lookup.list_installed() if row.kind == "model"] == ["second"]
    for name in ("first", "second"):
        row = lookup.find_installed(parse(name))
        assert row is not None and row.path == folder
        quantised = lookup.find_installed(parse(f"{name}:int4"))
        assert quantised is not None and quantised.path == copy
    assert glmchat(capsys, "add", str(folder), "--name", "first")[0] == 0
    assert aliases.load() == {"second": "first"}
    assert glmchat(capsys, "add", str(plain(tmp_path / "other")), "--name", "second")[0] == 2


def test_a_copied_home_has_its_own_models_and_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"weights" * 9
    user_catalogue(wheel_entry(make_wheel(tmp_path, content), content))
    folder = locations.models_dir() / "tiny"
    folder.mkdir(parents=True)
    (folder / "model.gguf").write_bytes(content)
    file = FileRecord("model.gguf", len(content), sha256(content))
    manifests.write(Manifest("tiny", "model", "pypi", folder, revision="1.0", files=(file,)))
    (first,) = lookup.list_installed()
    home = tmp_path / "elsewhere"
    shutil.copytree(os.environ["GLMCHAT_HOME"], home)
    monkeypatch.setenv("GLMCHAT_HOME", str(home))
    (row,) = lookup.list_installed()
    assert row.name == first.name and row.path == home / first.path.relative_to(folder.parents[2])


def test_of_one_model_in_two_caches_each_has_a_name_that_finds_it_and_rm_takes_the_one_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    places = {}
    for name in ("old", "new"):
        monkeypatch.setenv("HF_HOME", str(tmp_path / name))
        places[name] = put_into_cache("acme/tiny", COMMIT_A, KNOWN, ref="main")
        if name == "old":  # as after a pull
            sizes = tuple(FileRecord(path, len(data), sha256(data)) for path, data in KNOWN.items())
            manifests.write(Manifest("acme/tiny", "model", "hf", places["old"], "acme/tiny", COMMIT_A, files=sizes))
    rows = lookup.told_apart(lookup.list_installed())
    listed = json.loads(glmchat(capsys, "list", "--json")[1])
    assert [(row["name"], Path(row["path"])) for row in listed] == [(row.name, row.path) for row in rows]
    assert [(row.name, row.path) for row in rows] == [
        ("acme/tiny", places["new"]),
        (str(places["old"]), places["old"]),
    ]
    for row in rows:
        found = lookup.find_installed(parse(row.name))
        assert found is not None and found.path == row.path
        assert json.loads(glmchat(capsys, "show", row.name, "--json")[1])["path"] == str(row.path)
    assert glmchat(capsys, "rm", str(places["old"]), "--yes")[0] == 0
    assert not places["old"].exists() and places["new"].is_dir()
    assert [(row.name, row.path) for row in lookup.list_installed()] == [("acme/tiny", places["new"])]
    assert glmchat(capsys, "rm", "acme/tiny", "--yes")[0] == 0
    assert lookup.list_installed() == []


def test_of_one_name_the_whole_model_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "old"))
    whole = put_into_cache("acme/tiny", COMMIT_A, KNOWN, ref="main")
    sizes = tuple(FileRecord(path, len(data), sha256(data)) for path, data in KNOWN.items())
    manifests.write(Manifest("acme/tiny", "model", "hf", whole, "acme/tiny", COMMIT_A, files=sizes))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "new"))
    half = put_into_cache("acme/tiny", COMMIT_A, KNOWN, ref="main")
    (half / "model.safetensors").resolve().unlink()
    found = lookup.find_installed(parse("acme/tiny"))
    assert found is not None and found.path == whole


def test_the_family_of_a_gguf_file_is_in_the_list_also_of_one_that_is_not_read(tmp_path: Path, capsys: Any) -> None:
    for name in ("llama", "phi3"):
        writer = GGUFWriter(tmp_path / f"{name}.gguf", name)
        writer.add_tensor("token_embd.weight", np.zeros((32, 32), np.float32))
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        data = (tmp_path / f"{name}.gguf").read_bytes()
        put_into_cache(f"acme/{name}", COMMIT_A, {f"{name}.gguf": data}, ref="main")
        record(f"my-{name}", tmp_path, f"{name}.gguf")
    rows = {row["name"]: row["family"] for row in json.loads(glmchat(capsys, "list", "--json")[1])}
    assert rows == {"acme/llama": "llama", "acme/phi3": "phi3", "my-llama": "llama", "my-phi3": "phi3"}
    assert "?" not in glmchat(capsys, "list")[1]
