"""The window under test: the real app, session and endpoint, with a fake engine in a real child process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from fakes import model_in

from glmchat.chat.launch import LaunchOptions
from glmchat.core.engine_options import EngineOptions
from glmchat.hub import adapters

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `from windows import open_window`
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "hub"))  # a hub on loopback to pull from
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "engine"))  # models that can be quantised
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "chat"))  # an endpoint without a process

_FITS = {"kind": "lora", "form": "peft", "rank": 8, "shapes": {"q_proj": [64, 64]}, "layers": 3}


def _keep(tmp_path: Path, name: str, base: str | None = "me/Tiny-7M", **facts: Any) -> None:
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(b"x" * 1200)
    adapters.keep(name, [weights], {**_FITS, **facts}, adapters.Origin("here"), base=base)


@pytest.fixture(autouse=True)
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window looks the same wherever the tests run."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")


@pytest.fixture
def adapters_here(tmp_path: Path) -> LaunchOptions:
    """A model of 64 channels, two adapters that fit it and three that do not."""
    folder = model_in(tmp_path / "Tiny-7M")
    _keep(tmp_path, "poet")
    _keep(tmp_path, "calm", base=None)
    _keep(tmp_path, "medical", base="me/Other-7M")
    _keep(tmp_path, "wide", shapes={"q_proj": [128, 128]})
    _keep(tmp_path, "chatglm", shapes={"query_key_value": [12288, 4096]})
    return LaunchOptions(EngineOptions(folder=folder, model="Tiny-7M"))
