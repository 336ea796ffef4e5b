"""A face stays without torch whatever it is asked to do: what needs torch is a job.

Covers jobs/add_adapter.py, jobs/merge.py and jobs/quantise.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from adapter_builders import write_peft
from engine_builders import write_folder


def loads_torch(*arguments: str) -> bool:
    """Whether a fresh process that carries out one command line holds torch in the end. The command must succeed."""
    code = f"import sys\nfrom glmchat.cli.main import run\nprint(run({list(arguments)!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd="/", capture_output=True, text=True, timeout=300)
    ended, loaded = done.stdout.splitlines()[-1].split()
    assert ended == "0", done.stderr
    return loaded == "True"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tiny")


def test_quantising_loads_torch_in_its_job_alone(model: Path, tmp_path: Path) -> None:
    assert not loads_torch("quantize", str(model), "--out", str(tmp_path / "int8"), "--bits", "8")
    assert (tmp_path / "int8" / "config.json").is_file()


def test_adapters_are_added_compared_and_merged_by_jobs(model: Path, tmp_path: Path) -> None:
    write_peft(model, tmp_path / "poet")
    assert not loads_torch("adapters", "add", str(tmp_path / "poet"), "--base", str(model))
    assert not loads_torch("adapters", "merge", str(model), "poet", str(tmp_path / "merged"))
    assert (tmp_path / "merged" / "config.json").is_file()
