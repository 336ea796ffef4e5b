"""`make test` runs the tests on the built wheel, `make unit` on the working tree: the code must come from there."""

from __future__ import annotations

import hashlib
import os
import tarfile
import tomllib
from importlib.metadata import distribution
from importlib.resources import files
from pathlib import Path

import pytest

import glmchat

ROOT = Path(__file__).resolve().parents[2]
APACHE_2_0 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # apache.org/licenses/LICENSE-2.0.txt


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


def test_the_licence_is_the_text_of_the_name_that_pyproject_gives() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"])
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2_0


def test_the_licence_ships_in_the_wheel_and_in_the_sdist() -> None:
    if not os.environ.get("GLMCHAT_TEST_WHEEL"):
        pytest.skip("only `make test` builds the wheel and the sdist")
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert distribution("glmchat").read_text("licenses/LICENSE") == text
    (sdist,) = (ROOT / ".test-cache" / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        (member,) = (name for name in archive.getnames() if name.count("/") == 1 and name.endswith("/LICENSE"))
        packed = archive.extractfile(member)
        assert packed is not None and packed.read().decode() == text
