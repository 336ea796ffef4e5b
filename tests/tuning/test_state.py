"""A checkpoint is whole or not there, whatever happens while it is written, and a run goes on from it bit by bit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from learning import documents, learn, losses, plain
from safetensors.torch import load_file
from tiny_checkpoints import build

from glmchat.core.errors import DoesNotFit, Usage
from glmchat.tuning import state


def write(folder: Path, step: int, keep: int = 9) -> Path:
    def adapter(place: Path) -> None:
        (place / "adapter_config.json").write_text("{}")

    tensors = {"a.step": torch.tensor(float(step))}
    return state.save(folder, step, {"tokens": step}, tensors, torch.zeros(3, dtype=torch.uint8), adapter, keep)


def test_the_newest_whole_one_is_taken_and_older_ones_go(tmp_path: Path) -> None:
    for step in (3, 12, 7):
        write(tmp_path, step)
    saved = state.newest(tmp_path)
    assert saved is not None and (saved.step, saved.position["tokens"]) == (12, 12)
    assert float(saved.tensors(state.OPTIMISER)["a.step"]) == 12
    write(tmp_path, 13, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000012", "step-00000013"]


@pytest.mark.parametrize("harm", ["cut", "changed", "gone", "no state", "half state", "wrong name"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, harm: str) -> None:
    write(tmp_path, 1)
    place = write(tmp_path, 2)
    file = place / state.OPTIMISER
    data = file.read_bytes()
    if harm == "cut":
        file.write_bytes(data[:-1])
    elif harm == "changed":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif harm == "gone":
        file.unlink()
    elif harm == "no state":
        (place / state.STATE).unlink()
    elif harm == "half state":
        (place / state.STATE).write_text((place / state.STATE).read_text()[:40])
    else:
        place.rename(tmp_path / "step-00000009")
    saved = state.newest(tmp_path)
    assert saved is not None and saved.step == 1


def test_what_was_being_written_is_no_checkpoint_and_goes(tmp_path: Path) -> None:
    write(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".writing-00000002-77")
    saved = state.newest(tmp_path)
    assert saved is not None and saved.step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_on_a_full_disk_the_one_before_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def full(number: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DoesNotFit):
        write(tmp_path, 2)
    saved = state.newest(tmp_path)
    assert saved is not None and saved.step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("at", [1, 5, 8])  # the last in the second epoch
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path, at: int) -> None:
    folder, data = build("llama", tmp_path / "base"), documents("llama", 18)
    settings = plain(epochs=2, rows_per_step=3, dropout=0.2, learning_rate=1e-2, save_every=2)
    whole, events = learn(tmp_path / "whole", folder, data, settings)
    asked = iter(range(100))
    stopped, first = learn(tmp_path / "parts", folder, data, settings, lambda: next(asked) == at)
    assert stopped.stopped and stopped.step == at and not stopped.adapter.exists()
    going_on, second = learn(tmp_path / "parts", folder, data, settings)
    assert going_on.step == whole.step == 12 and not going_on.stopped
    assert losses(first) + losses(second) == losses(events)
    parts, once = (load_file(result.adapter / "adapter_model.safetensors") for result in (going_on, whole))
    assert parts.keys() == once.keys() and all(torch.equal(parts[name], once[name]) for name in once)


@pytest.mark.parametrize("other", ["data", "settings"])
def test_another_run_is_not_gone_on_with(tmp_path: Path, other: str) -> None:
    folder, data = build("llama", tmp_path / "base"), documents("llama", 4)
    learn(tmp_path / "run", folder, data, plain(steps=1))
    if other == "data":
        data = documents("llama", 4, seed=9)
    with pytest.raises(Usage):
        learn(tmp_path / "run", folder, data, plain(steps=1, rank=4 if other == "data" else 5))
