"""What lies on the disk: the history, records of answers, manifests, lock files, quantised folders, packed caches.

Covers jobs/quantise.py.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from golden_files import HERE, Golden

from glmchat.cli.main import run
from glmchat.core import locations

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS), str(TESTS / "engine"), str(TESTS / "hub")]

import adapter_builders as adapters  # noqa: E402
import engine_builders as llamas  # noqa: E402
from loopback_hub import LoopbackHub  # noqa: E402

HASH = re.compile(r"[0-9a-f]{32,64}")


@pytest.fixture
def database() -> Path:
    """The history's file, as the first command that needs it makes it."""
    assert run(["history", "list"]) == 0
    return locations.history_file()


def schema(path: Path) -> str:
    with closing(sqlite3.connect(path)) as rows:
        version = rows.execute("PRAGMA user_version").fetchone()[0]
        found = rows.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY type, name").fetchall()
    return "\n".join([f"PRAGMA user_version = {version};", *(" ".join(sql.split()) + ";" for (sql,) in found), ""])


# The history


def test_the_history_keeps_its_tables(golden: Golden, database: Path) -> None:
    golden("history_schema.sql", schema(database))


def talk(history: Any) -> None:
    """Two conversations with branches, a mark, a deletion, an answer with ids, and one that was being written."""
    tree = history.new("smollm2")
    question = history.append(tree, "user", "关于量化 and rounding")
    history.append(tree, "assistant", "It rounds.")
    answer = history.begin_answer(tree, parent=question.id)
    answer = history.add_piece(tree, answer, "It is ", [5, 7])
    answer = history.describe_answer(tree, answer, {"model": "smollm2", "seed": 11})
    answer = history.add_piece(tree, answer, "rounding 😀", [9])
    history.finish_answer(tree, answer, "stopped")
    history.append_clear(tree)
    history.append(tree, "user", "and then?")
    history.pin(tree, True)
    history.save_draft(tree, "not sent")
    other = history.new()
    history.append(other, "user", "gone")
    history.delete_conversation(other.conversation.id)


def dump(path: Path) -> str:
    """A file as SQL that makes it again; the search index is written as what it was made of."""
    with closing(sqlite3.connect(path)) as rows:
        lines = [f"PRAGMA user_version = {rows.execute('PRAGMA user_version').fetchone()[0]};"]
        made = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'search_%' ORDER BY rowid"
        for name, sql in rows.execute(made).fetchall():
            lines.append(" ".join(sql.split()) + ";")
            if not sql.upper().startswith("CREATE INDEX"):
                columns = [row[1] for row in rows.execute(f"PRAGMA table_info({name})")]
                columns = ["rowid", *columns] if name == "search" else columns
                for row in rows.execute(f"SELECT {', '.join(columns)} FROM {name}"):
                    values = ", ".join(literal(value) for value in row)
                    lines.append(f"INSERT INTO {name} ({', '.join(columns)}) VALUES ({values});")
    return "\n".join(lines) + "\n"


def literal(value: Any) -> str:
    if isinstance(value, bytes):
        return f"X'{value.hex()}'"
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return "NULL" if value is None else repr(value)


def test_a_history_that_was_written_once_is_read_as_it_was(
    golden: Golden, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if golden.writing:
        from glmchat.chat.history.history import History

        with History.default() as history:
            talk(history)
        golden.write("history.sql", dump(database))
    for beside in database.parent.glob(f"{database.name}*"):
        beside.unlink()
    with closing(sqlite3.connect(database)) as rows:
        rows.executescript((HERE / "history.sql").read_text(encoding="utf-8"))
    read: dict[str, Any] = {}
    for words in (["list"], ["show", "1"], ["search", "rounding"], ["search", "量化"], ["search", "gone"]):
        capsys.readouterr()
        assert run(["history", *words, "--json"]) == 0
        read[" ".join(words)] = json.loads(capsys.readouterr().out)
    capsys.readouterr()
    assert run(["history", "export", "1", "-f", "json"]) == 0
    read["export 1"] = json.loads(capsys.readouterr().out)
    golden("history_read.json", read)


# Manifests, lock files, folders that glmchat makes


def steady(value: Any, roots: dict[str, str]) -> Any:
    """Folders of this run by name, dates and hashes of what is random by what they are."""
    if isinstance(value, dict):
        return {steady(k, roots): "<date>" if k == "date" and v else steady(v, roots) for k, v in value.items()}
    if isinstance(value, list):
        return [steady(item, roots) for item in value]
    if isinstance(value, str):
        for root, name in roots.items():
            value = value.replace(root, name)
    return value


def test_manifests_and_lock_files_are_written_as_they_were(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"\x02" + bytes(7) + b"{}" + bytes(99)}
    lora = {"adapter_config.json": b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}'}
    tensors = {name: (tensor * 0 + 1) for name, tensor in adapters.factors(2).items()}
    adapters.write_lora(tmp_path / "poet", tensors)
    lora["adapter_model.safetensors"] = (tmp_path / "poet" / "adapter_model.safetensors").read_bytes()
    with LoopbackHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.add("tiny/model", files)
        hub.add("tiny/poet", lora)
        assert run(["pull", "tiny/model", "--quiet"]) == 0
        assert run(["adapters", "add", "tiny/poet"]) == 0
        roots = {str(Path(os.environ["HOME"])): "<home>", str(tmp_path): "<here>", hub.url.partition("//")[2]: "<hub>"}
    written = {}
    for path in [*locations.manifests_dir().glob("*.json"), *locations.adapters_dir().glob("*/glmchat.json")]:
        name = path.relative_to(locations.data_dir())
        written[str(name)] = steady(json.loads(path.read_text(encoding="utf-8")), roots)
    capsys.readouterr()
    assert run(["lock"]) == 0
    written["lock"] = steady(json.loads(capsys.readouterr().out), roots)
    golden("manifests.json", written)


def test_a_lock_file_that_was_written_once_is_still_understood(
    golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "glmchat.lock").write_text(json.dumps(golden.read("manifests.json")["lock"]))
    assert run(["pull", "--locked", str(tmp_path / "glmchat.lock"), "--dry-run", "--json"]) == 0
    plans = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(plan["repo"], len(plan["files"])) for plan in plans] == [("tiny/model", 2), ("tiny/poet", 2)]


def test_a_quantised_folder_says_of_itself_what_it_said(golden: Golden, tmp_path: Path) -> None:
    source = llamas.write_folder(tmp_path / "tiny")
    told = {}
    for bits in ("8", "4"):
        out = tmp_path / f"int{bits}"
        assert run(["quantize", str(source), "--bits", bits, "--out", str(out), "--quiet"]) == 0
        written = steady(json.loads((out / "glmchat.json").read_text()), {str(tmp_path): "<here>"})
        header = header_of(next(out.glob("*.safetensors")))
        header.pop("__metadata__", None)
        tensors = {n: [t["dtype"], t["shape"]] for n, t in header.items() if "layers.1" in n or "layers" not in n}
        config = json.loads((out / "config.json").read_text())
        told[f"int{bits}"] = {
            "glmchat.json": json.loads(
                HASH.sub("<hash>", json.dumps(written))
            ),  # of random numbers, whose last bits may differ
            "files": sorted(path.name for path in out.iterdir()),
            "config.json": {key: value for key, value in config.items() if key not in llamas.CONFIG},
            "tensors": tensors,
        }
    golden("quantised_folder.json", told)


def test_the_packed_cache_of_a_fixed_file_keeps_its_name_and_form(
    golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glmchat.engine import Engine
    from glmchat.engine.formats import packed_cache

    monkeypatch.setattr(packed_cache, "_SMALLEST", 0)  # a tiny one is otherwise not worth a file
    source, made = llamas.write_folder(tmp_path / "tiny"), tmp_path / "int4"
    assert run(["quantize", str(source), "--bits", "4", "--out", str(made), "--quiet"]) == 0
    record = json.loads((made / "glmchat.json").read_text())
    for file in record["files"]:
        file["sha256"] = "ab" * 32
    (made / "glmchat.json").write_text(json.dumps(record))
    for weights in made.glob("*.safetensors"):
        os.utime(weights, ns=(10**18, 10**18))
    engine = Engine.load(made, dtype="float32", threads=1)
    if not engine.facts()["kernel"].startswith("native"):
        pytest.skip("without the C kernel nothing is packed")
    (packed,) = (path for path in locations.packed_dir().iterdir() if path.suffix == ".safetensors")
    told = header_of(packed)
    shapes = json.loads(told.pop("__metadata__")["shapes"])
    tensors = {n: [t["dtype"], t["shape"], t["data_offsets"]] for n, t in told.items() if "layers.1" in n}
    where = steady(str(packed), {os.environ["HOME"]: "<home>"})
    golden("packed_cache.json", {"path": where, "tensors": tensors, "shapes": {n: s[:4] for n, s in shapes.items()}})


def header_of(path: Path) -> Any:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
