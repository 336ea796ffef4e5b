"""`make test` runs the tests on the built wheel, `make unit` on the working tree: the code must come from there."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

import glmchat

ROOT = Path(__file__).resolve().parents[2]


def test_the_code_under_test_is_the_code_that_was_asked_for() -> None:
    place = Path(glmchat.__file__).resolve()
    if os.environ.get("GLMCHAT_TEST_WHEEL"):
        assert "site-packages" in place.parts
    else:
        assert place == ROOT / "__init__.py"


def test_the_data_files_ship() -> None:
    package = files("glmchat")
    for name in ("models.toml", "py.typed", "core/zh.toml", "tui/glmchat.tcss"):
        assert package.joinpath(name).is_file(), name
