"""The models screen: what fits, plans that are asked for, verifying, unloading, deleting, and what goes wrong.

Covers tui/list_screen.py, tui/model_rows.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hub_helpers import COMMIT_A, CONFIG, hub_entry, put_into_cache, user_catalogue
from loopback_hub import LoopbackHub
from windows import Window, hold_reading, open_window

from glmchat.chat import launch
from glmchat.hub.catalogue import Entry, KnownFile
from glmchat.hub.lookup import list_installed
from glmchat.tui import model_rows
from glmchat.tui.screens.models import ModelScreen

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))  # engine_builders


def shown(window: Window) -> str:
    screen = window.app.screen
    assert isinstance(screen, ModelScreen)
    return window.screen_text()


@pytest.mark.parametrize(
    ("parameters", "size", "free", "fits"),
    [
        (6_000_000_000, 12_000_000_000, 14_000_000_000, "yes"),
        (6_000_000_000, 12_000_000_000, 6_000_000_000, "quantised"),
        (6_000_000_000, 12_000_000_000, 2_000_000_000, "no"),
        (None, 0, 2_000_000_000, "unknown"),
    ],
)
def test_what_fits_is_told_before_a_pull(parameters: int | None, size: int, free: int, fits: str) -> None:
    entry = Entry("m", "main", parameters=parameters, files=(KnownFile("w.safetensors", size),))
    assert model_rows.fits_before_pull(entry, free) == fits


async def test_the_screen_lists_what_can_be_pulled_and_closes_without_touching_the_engine() -> None:
    async with open_window() as window:
        await window.press("f4")
        await window.until(lambda: "chatglm3-6b" in shown(window) and "Enter pulls" in shown(window))
        await window.press("escape")
        await window.until(lambda: not isinstance(window.app.screen, ModelScreen))
        await window.ask("still there?")
        assert window.said("assistant") == ["one two"]


async def test_a_plan_is_asked_for_before_anything_is_fetched_and_escape_takes_it_back() -> None:
    async with open_window() as window:
        await window.press("f4")
        await window.until(lambda: "Enter pulls" in shown(window))
        await window.press("enter")
        await window.until(lambda: "to fetch from pip" in shown(window))
        assert "Enter confirms" in shown(window)
        await window.press("escape")
        await window.until(lambda: "Enter pulls" in shown(window))
        assert not list_installed()


async def test_unloading_stops_the_engine_and_f5_starts_it_again() -> None:
    async with open_window() as window:
        await window.press("f4", "u")
        await window.until(lambda: "is unloaded" in shown(window))
        await window.press("escape")
        await window.until(lambda: window.chat.connection.link.process is None)
        assert window.chat.status.facts.lost
        await window.press("f5")
        await window.ready()
        await window.ask("again")
        assert window.said("assistant") == ["one two"]


def tiny_model_is_here() -> None:
    files = {"config.json": CONFIG, "model.safetensors": b"weights" * 100}
    user_catalogue(hub_entry("tiny", "owner/tiny", COMMIT_A, files))
    put_into_cache("owner/tiny", COMMIT_A, files)


async def test_a_model_is_verified_and_a_wrong_byte_is_told() -> None:
    tiny_model_is_here()
    async with open_window() as window:
        await window.press("f4")
        await window.until(lambda: "v verifies" in shown(window))
        await window.press("v")
        await window.until(lambda: "2 files of tiny are intact" in shown(window))
        weights = list_installed()[0].path / "model.safetensors"
        weights.resolve().write_bytes(b"Weights" + b"weights" * 99)
        await window.press("v")
        await window.until(lambda: "model.safetensors does not match" in shown(window))


async def test_deleting_says_what_it_frees_and_waits_for_enter() -> None:
    tiny_model_is_here()
    async with open_window() as window:
        await window.press("f4")
        await window.until(lambda: "d deletes" in shown(window))
        await window.press("d")
        await window.until(lambda: "delete tiny" in shown(window))
        await window.press("escape")
        await window.until(lambda: "delete tiny" not in shown(window))
        assert list_installed()
        await window.press("d")
        await window.until(lambda: "delete tiny" in shown(window))
        await window.press("enter")
        await window.until(lambda: "deleted" in shown(window))
        assert not list_installed()


async def test_a_pull_that_cannot_reach_its_hub_says_so_in_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    user_catalogue(hub_entry("tiny", "owner/tiny", COMMIT_A, {"config.json": CONFIG, "model.safetensors": b"w"}))
    async with open_window() as window:
        await window.press("f4")
        await window.until(lambda: "tiny" in shown(window))
        await window.press("enter")
        await window.until(lambda: "tiny: " in shown(window))
        await window.press("enter")
        await window.until(lambda: "HF_HUB_OFFLINE is set" in shown(window))
        await window.press("escape")
        await window.until(lambda: not isinstance(window.app.screen, ModelScreen))


async def test_a_model_is_quantised_as_it_arrives_and_only_the_copy_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine_builders import write_folder

    files = {path.name: path.read_bytes() for path in write_folder(tmp_path / "llama").iterdir()}
    with LoopbackHub() as hub:
        user_catalogue(hub_entry("tiny", "owner/tiny", hub.add("owner/tiny", files), files))
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        async with open_window() as window:
            await window.press("f4")
            await window.until(lambda: "4 / 8 pull and quantise" in shown(window))
            await window.press("4")
            await window.until(lambda: "to int4" in shown(window), 60)
            assert not list_installed()
            await window.press("enter")
            await window.until(lambda: "Enter loads it" in shown(window), 60)
    assert [row.quant[:4] for row in list_installed()] == ["int4"]


async def test_the_window_answers_keys_while_the_models_are_read_and_those_keys_act_when_the_list_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_model_is_here()
    may_read = hold_reading(monkeypatch, launch, "pickable")
    async with open_window() as window:
        await window.press("f4")
        await window.until(lambda: "reading which models are here" in shown(window))
        await window.press("escape")
        await window.until(lambda: not isinstance(window.app.screen, ModelScreen))
        await window.type("still here")
        assert window.chat.prompt.text == "still here"
        await window.press("f4", "v")
        await window.until(lambda: "reading which models are here" in shown(window))
        may_read.set()
        await window.until(lambda: "2 files of tiny are intact" in shown(window))


async def test_a_store_that_cannot_be_read_is_an_error_in_the_dialog() -> None:
    user_catalogue("not [toml")
    async with open_window() as window:
        await window.press("f4")
        await window.until(lambda: "models.toml" in shown(window) and "reading" not in shown(window))
        await window.press("escape")
        await window.until(lambda: not isinstance(window.app.screen, ModelScreen))
