"""Packed weights on disk: made once, mapped afterwards, never trusted blindly.

Covers engine/formats/folder_writer.py.
"""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from glmchat.core import locations
from glmchat.engine import Engine
from glmchat.engine.formats import packed_cache
from glmchat.engine.formats.folder_writer import MappedWriter
from glmchat.engine.formats.weights import let_go
from glmchat.engine.native.cpu import NativeCpu
from glmchat.engine.quantize.linear import QuantLinear

pytestmark = pytest.mark.skipif(
    NativeCpu().unavailable() is not None, reason=f"the C kernel is not here: {NativeCpu().unavailable()}"
)
IDS = [1, 9690, 198, 2683]


def load(path: Path) -> Engine:
    return Engine.load(path, dtype="float32", threads=1)


def files() -> list[Path]:
    folder = locations.packed_dir()
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_the_second_load_maps_what_the_first_one_packed(starter_model: Path) -> None:
    first = load(starter_model).logits(IDS)
    assert len(files()) == 1 and locations.cache_dir().stat().st_mode & 0o077 == 0
    written = files()[0].stat().st_size
    engine = load(starter_model)
    assert torch.equal(engine.logits(IDS), first)
    assert str(files()[0]) in Path("/proc/self/maps").read_text()
    assert files()[0].stat().st_size == written


def test_the_first_load_maps_what_it_wrote_and_keeps_no_copy(starter_model: Path) -> None:
    linear = load(starter_model).model.get_submodule("model.layers.3.mlp.down_proj")
    assert isinstance(linear, QuantLinear)
    address = linear.packed["codes"].data_ptr()
    spans = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(files()[0]) in line]
    assert any(int(low, 16) <= address < int(high, 16) for low, high in (span[0].split("-") for span in spans))
    assert not [path for path in files() if path.name.endswith(".incomplete")]


def test_weights_that_were_put_elsewhere_are_freed_at_once() -> None:
    linear = QuantLinear.from_int8(torch.ones(32, 32, dtype=torch.int8), torch.ones(32))
    old = weakref.ref(linear.packed["codes"])
    gc.disable()
    try:
        linear.hold({name: tensor.clone() for name, tensor in linear.packed.items()})
        assert old() is None
    finally:
        gc.enable()
    assert torch.equal(linear(torch.ones(1, 32)), torch.full((1, 32), 32.0))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="no /proc here")
def test_pages_of_a_file_that_was_read_leave_the_process_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 4096)
    tensor = torch.from_file(str(path), shared=False, size=1 << 20, dtype=torch.uint8)

    def held() -> int:
        rest = Path("/proc/self/smaps").read_text().partition(str(path))[2]
        return int(rest.partition("Rss:")[2].split()[0])

    expected = int(tensor.sum())
    assert held() > 900
    let_go([path])
    assert held() == 0
    assert int(tensor.sum()) == expected


def test_a_disk_that_fills_while_the_cache_is_written_costs_only_the_cache(
    starter_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load(starter_model).logits(IDS)
    files()[0].unlink()
    real, calls = MappedWriter.write, []

    def write(writer: Any, *given: Any) -> Any:
        calls.append(given)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")
        return real(writer, *given)

    monkeypatch.setattr(MappedWriter, "write", write)
    assert torch.equal(load(starter_model).logits(IDS), expected)
    assert files() == [] and len(calls) == 21


def test_a_changed_checkpoint_is_not_served_from_the_cache(starter_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / starter_model.name
    shutil.copy(starter_model, copy)
    load(copy)
    before = files()
    copy.touch()
    load(copy)
    assert len(files()) == len(before) + 1


@pytest.mark.parametrize("how", ["cut", "wrong sizes", "wrong shapes", "nonsense"])
def test_a_damaged_cache_is_made_anew(starter_model: Path, how: str) -> None:
    expected = load(starter_model).logits(IDS)
    path = files()[0]
    if how == "cut":
        path.write_bytes(path.read_bytes()[:100_000])
    elif how == "nonsense":
        path.write_bytes(b"nonsense" * 100)
    else:
        with safe_open(path, framework="pt") as file:
            shapes = json.loads(file.metadata()["shapes"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        if how == "wrong sizes":
            tensors = {n: t[: len(t) // 2].clone() if n.endswith("codes") else t for n, t in tensors.items()}
        else:
            shapes = {name: [10**9, *rest] for name, (_, *rest) in shapes.items()}
        save_file(tensors, path, {"shapes": json.dumps(shapes)})
    assert torch.equal(load(starter_model).logits(IDS), expected)
    assert torch.equal(load(starter_model).logits(IDS), expected)


def test_without_room_for_the_cache_the_model_loads_all_the_same(
    starter_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda path: type("Disk", (), {"free": 1000})())
    assert load(starter_model).logits(IDS).shape[0] == len(IDS)
    assert files() == []
