"""What is told of NVIDIA cards: read from a driver that exists on paper, and from the torch that is installed."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import pytest
import torch
from pretend_machine import GB, become, card

from glmchat.core import cards as reading
from glmchat.core.cards import Card, TorchBuild


def names(visible: tuple[Card, ...]) -> list[str]:
    return [one.name for one in visible]


def test_cards_are_told_in_the_order_of_the_bus_with_what_is_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become(monkeypatch, tmp_path, card("A", (8, 6), 24, 20.5), card("B", (9, 0), 80, number=1))
    found = reading.look()
    assert (found.driver, found.cuda, found.installed) == ("580.95.05", (13, 0), 2)
    first, second = found.visible
    assert (first.device, first.name, first.capability, first.total, first.free) == (
        "cuda:0", "A", (8, 6), 24 * GB, int(20.5 * GB),
    )  # fmt: skip
    assert second.device == "cuda:1" and found.at("cuda") == first and found.at("cuda:1") == second
    assert found.at("cuda:2") is None


def test_without_a_driver_there_are_no_cards_and_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    become(monkeypatch, tmp_path)
    assert reading.look() == reading.Cards()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["A", "B", "C"]),
        ("1", ["B"]),
        ("2,0", ["C", "A"]),
        ("", []),
        ("-1", []),
        ("none", []),
        ("0,7,1", ["A"]),
        ("0,0", []),
        ("GPU-00000002", ["C"]),
        ("GPU-0000000", []),  # of all three
        ("GPU-00000001-3090,GPU-00000000-3090", ["B", "A"]),
        ("GPU-ffff", []),
    ],
)
def test_cuda_visible_devices_hides_and_orders_cards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str | None, expected: list[str]
) -> None:
    cards = [card(name, number=number) for number, name in enumerate("ABC")]
    become(monkeypatch, tmp_path, *cards, visible=visible)
    found = reading.look()
    assert names(found.visible) == expected and found.installed == 3
    assert [one.number for one in found.visible] == list(range(len(expected)))


@pytest.mark.parametrize(
    "text", ["0", "1,0", "", "-1", "abc", "0,x,1", "1gpu2,2ampere", "0, 1", "0,0", "+1", "GPU-1,GPU-2", "GPU-1,0",
             "GPU-1,GPU-1", "MIG-a,MIG-b", "MIG-a,GPU-1", "NoDevFiles", " 2", ",1"],
)  # fmt: skip
def test_the_variable_is_read_as_torch_reads_it(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
    assert reading.visible_entries(text) == torch.cuda._parse_visible_devices()


def test_of_cards_that_are_cut_up_one_instance_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cut = card("NVIDIA A100", (8, 0), 80, mig=[(10, 9), (20, 19)])
    become(monkeypatch, tmp_path, cut, card("B", number=1))
    (seen,) = reading.look().visible
    assert (seen.uuid, seen.total, seen.free, seen.capability) == ("MIG-00000000-0", 10 * GB, 9 * GB, (8, 0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-00000000-1")
    (seen,) = reading.look().visible
    assert seen.free == 19 * GB and seen.device == "cuda:0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-nobody")
    assert reading.look().visible == ()


def test_the_pretend_driver_has_functions_of_the_real_librarys_names_and_parameters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = importlib.import_module("pynvml")
    become(monkeypatch, tmp_path, card())
    pretend = sys.modules["pynvml"]
    mine = {name: value for name, value in vars(pretend).items() if name.startswith("nvml")}
    assert len(mine) > 8 and real is not pretend
    for name, function in mine.items():
        theirs = inspect.signature(getattr(real, name))
        assert len(inspect.signature(function).parameters) <= len(theirs.parameters)
    assert {name for name in vars(pretend) if name.startswith("NVMLError_")} <= set(dir(real))


@pytest.mark.parametrize(("cuda", "built"), [("13.0", (13, 0)), ("12.6", (12, 6)), (None, None)])
def test_what_torch_was_built_with_is_read_and_torch_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cuda: str | None, built: tuple[int, int] | None
) -> None:
    become(monkeypatch, tmp_path, torch_cuda=cuda)
    loaded = sys.modules["torch"]
    build = reading.installed_torch()
    assert build is not None and build.cuda == built
    assert build.runs_on((8, 9)) and sys.modules["torch"] is loaded
    assert build.runs_on((7, 0)) == (cuda != "13.0")
    assert build.runs_on((12, 0)) == (cuda != "12.6")


def test_the_installed_torch_is_read_as_it_says_itself() -> None:
    build = reading.installed_torch()
    assert build is not None and build.version == torch.__version__
    assert (build.cuda is None) == (torch.version.cuda is None)


def test_a_driver_that_is_too_old_is_told_with_its_number_and_the_wheel_that_suits_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become(monkeypatch, tmp_path, card(), driver="550.54.15", cuda=12040)
    obstacle = reading.driver_obstacle(reading.look(), reading.installed_torch())
    assert obstacle is not None
    assert "550.54.15" in obstacle.message and "12.4" in obstacle.message and "13.0" in obstacle.message
    assert "580" in obstacle.hint and "cu126" in obstacle.hint
    become(monkeypatch, tmp_path, card(), driver="550.54.15", cuda=12040, torch_cuda="12.6")
    assert reading.driver_obstacle(reading.look(), reading.installed_torch()) is None


def test_a_torch_without_cuda_beside_a_card_is_told_with_the_wheel_that_its_driver_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for cuda, wheel in ((13000, "cu130"), (12080, "cu126")):
        become(monkeypatch, tmp_path, card(), cuda=cuda, torch_cuda=None)
        obstacle = reading.driver_obstacle(reading.look(), reading.installed_torch())
        assert obstacle is not None and "without CUDA" in obstacle.message and wheel in obstacle.hint


def test_a_card_that_is_too_old_or_too_new_for_torch_is_named_with_what_helps() -> None:
    old = Card(0, "Tesla V100", "GPU-1", (7, 0), 16 * GB, 16 * GB)
    new = Card(0, "RTX 5090", "GPU-2", (12, 0), 32 * GB, 32 * GB)
    ancient = Card(0, "Tesla K80", "GPU-3", (3, 7), 12 * GB, 12 * GB)
    of_13 = TorchBuild("2.13.0+cu130", (13, 0), ((7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)))
    of_12 = TorchBuild("2.13.0+cu126", (12, 6), ((5, 0), (6, 0), (7, 0), (7, 5), (8, 0), (8, 6), (9, 0)))
    told = reading.card_obstacle(old, of_13)
    assert told is not None and "Tesla V100" in told.message and "7.0" in told.message and "cu126" in told.hint
    told = reading.card_obstacle(new, of_12)
    assert told is not None and "cu130" in told.hint
    told = reading.card_obstacle(ancient, of_12)
    assert told is not None and "--device cpu" in told.hint
    assert reading.card_obstacle(old, of_12) is None and reading.card_obstacle(new, of_13) is None


def test_what_triton_lacks_to_start_its_kernels_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = reading.compiler_obstacle({"PATH": str(tmp_path)})
    assert told is not None and "compiler" in told.message and "gcc" in told.hint
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(reading.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    told = reading.compiler_obstacle({"PATH": str(tmp_path)})
    assert told is not None and "Python.h" in told.message and "-dev" in told.hint
    (tmp_path / "Python.h").write_text("")
    assert reading.compiler_obstacle({"PATH": str(tmp_path)}) is None
