"""JSON files are read within bounds, and what cannot be read never hangs and never raises anything else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from glmchat.core.errors import Damaged
from glmchat.core.files import bound
from glmchat.core.json_files import read_json, small_json


def test_an_object_is_read_by_both(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"name": "词"}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == small_json(tmp_path / "a.json") == {"name": "词"}


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1} {'])
def test_what_is_no_object_is_refused_by_one_and_empty_for_the_other(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.json").write_bytes(data)
    assert small_json(tmp_path / "a.json") == {}
    with pytest.raises(Damaged) as refused:
        read_json(tmp_path / "a.json")
    assert refused.value.code == "config.damaged" and refused.value.hint


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "absent", tmp_path / "absent" / "below"):
        assert small_json(path) == {}
        with pytest.raises(Damaged) as refused:
            read_json(path)
        assert refused.value.code == "config.unreadable"


def test_a_small_file_that_would_fill_the_memory_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"a": [' + b"[]," * 3_000_000 + b"[]]}")
    assert small_json(tmp_path / "a.json") == {}
    with pytest.raises(Damaged, match="values"):
        read_json(tmp_path / "a.json")


def test_a_file_over_the_bound_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.write(b"{}")
        file.truncate(bound(tmp_path / "a.json") + 1)
    assert small_json(tmp_path / "a.json") == {}
    with pytest.raises(Damaged) as refused:
        read_json(tmp_path / "a.json")
    assert refused.value.code == "config.size" and "16 MB" in refused.value.message


def test_what_is_nested_deeper_than_readers_can_walk_is_no_json(tmp_path: Path) -> None:
    for levels, is_read in ((60, True), (70, False), (900, False)):
        (tmp_path / "a.json").write_bytes(b'{"a": ' * levels + b"1" + b"}" * levels)
        assert bool(small_json(tmp_path / "a.json")) is is_read


def test_a_configuration_holds_fewer_values_than_an_index(tmp_path: Path) -> None:
    data = b'{"a": [' + b"1," * 200_000 + b"1]}"
    for name, is_read in (("config.json", False), ("model.safetensors.index.json", True)):
        (tmp_path / name).write_bytes(data)
        assert bool(small_json(tmp_path / name)) is is_read
