"""A model folder in which something else stands in the place of a file: each command says so in a line, at once.

Covers core/files.py as it is met at the command line.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from strange_files import STRANGE, put

Run = Callable[..., "subprocess.CompletedProcess[str]"]
NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
)
SECONDS = 10.0  # a second each on a quiet machine


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", NAMES)
def test_run_and_add_refuse_it_by_name_and_show_says_why(glmchat: Run, model: Path, name: str, kind: str) -> None:
    put(kind, model / name)
    began = time.monotonic()
    for command in (["run", model, "hello"], ["add", model, "--name", "strange"]):
        done = glmchat(*command)
        assert done.returncode == 3, done
        said = done.stderr.strip().splitlines()
        assert name in said[-2] and "hint" in said[-1] and "Traceback" not in done.stderr
    shown = glmchat("show", model)
    assert shown.returncode == 0 and "Traceback" not in shown.stderr
    assert "does not run" in shown.stdout and name in shown.stdout
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize("kind", [kind for kind in STRANGE if kind != "folder"])
def test_a_file_that_is_named_on_the_command_line_is_refused_the_same(glmchat: Run, model: Path, kind: str) -> None:
    put(kind, model.parent / "named")
    named = model.parent / "named"
    for arguments, code in (
        (("run", model, "--messages", named), 2),
        (("run", "--server", "http://127.0.0.1:9/v1", "--api-key-file", named, "hello"), 2),
        (("history", "import", named), 2),
        (("pull", "--locked", named), 3),
    ):
        done = glmchat(*arguments)
        assert done.returncode == code, done
        assert str(named) in done.stderr and "hint" in done.stderr and "Traceback" not in done.stderr
