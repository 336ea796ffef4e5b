"""Whatever a file is called, its first bytes say what it is, and a file without weights is refused by that."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from glmchat.checkpoints.adapter_files import find_weights
from glmchat.checkpoints.file_kinds import kind_of_file, refuse_no_weights
from glmchat.core.errors import GlmchatError


def zipped(name: str) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr(name, b"1")
    return made.getvalue()


def tar(path: str = "a/adapter_model.safetensors") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(path), io.BytesIO())
    return made.getvalue()


def tensors() -> bytes:
    head = json.dumps({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    return len(head).to_bytes(8, "little") + head + b"1"


NO_WEIGHTS: dict[str, tuple[bytes, str]] = {
    "config": (b'\n{"r": 8}', "is a JSON file"),
    "list": (b"[1]", "is a JSON file"),
    "tar.gz": (gzip.compress(tar()), "is an archive"),
    "tar": (tar(), "is an archive"),
    "zip": (zipped("lora/adapter_model.safetensors"), "is an archive"),
    "xz": (b"\xfd7zXZ\x00rest", "is an archive"),
    "zstandard": (b"\x28\xb5\x2f\xfdrest", "is an archive"),
    "page": (b"<!DOCTYPE html><html>sign in</html>", "is a web page"),
    "text": (b"Entry not found", "is no file of weights"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n", "git-lfs"),
    "nothing": (b"", "is empty"),
}


@pytest.mark.parametrize("name", ["adapter.pt", "adapter_model.safetensors", "x.bin", "x.gguf"])
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_a_file_without_weights_is_refused_by_what_it_is(tmp_path: Path, kind: str, name: str) -> None:
    data, reason = NO_WEIGHTS[kind]
    (tmp_path / name).write_bytes(data)
    for look in (refuse_no_weights, find_weights, lambda path: find_weights(path.parent)):
        with pytest.raises(GlmchatError, match=reason) as caught:
            look(tmp_path / name)
        assert caught.value.hint


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (lambda: b"GGUF\x03\x00\x00\x00", "gguf"),
        (tensors, "safetensors"),
        (lambda: zipped("archive/data.pkl"), "torch"),
        (lambda: zipped("archive/data.pkl")[:-8], "torch"),
        (lambda: pickle.dumps({"x": 1}), "torch"),
    ],
    ids=["gguf", "safetensors", "torch", "torch-cut-short", "pickle"],
)
def test_files_with_weights_are_known_under_any_name(tmp_path: Path, data: Callable[[], bytes], kind: str) -> None:
    (tmp_path / "file.txt").write_bytes(data())
    assert kind_of_file(tmp_path / "file.txt") == kind
    refuse_no_weights(tmp_path / "file.txt")


def test_a_folder_and_nothing_are_neither(tmp_path: Path) -> None:
    assert kind_of_file(tmp_path) == "folder"
    assert kind_of_file(tmp_path / "gone") == "nothing"
    with pytest.raises(GlmchatError, match="cannot be opened"):
        refuse_no_weights(tmp_path / "gone")
