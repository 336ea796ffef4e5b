"""Packed weights on disk: made once, mapped afterwards, never trusted blindly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from glmchat.core import locations
from glmchat.engine import Engine
from glmchat.engine.quantize import packed_cache
from glmchat.engine.quantize.cpu_native import NativeCpu

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
