"""Commands write on a disk that is full or nearly so, as benchmarks/full_disk.py does it. Needs root: a small tmpfs.

Covers core/fingerprints.py where a home takes no files.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "full_disk.py"


def can_mount(folder: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    done = os.geteuid() == 0 and subprocess.run(command, check=False, capture_output=True).returncode == 0
    if done:
        subprocess.run(["umount", str(folder)], check=True)
    return done


@pytest.mark.parametrize("write", ["alias", "adapters add", "history import", "history export", "rm", "one-shot"])
def test_a_write_without_room_is_one_line_loses_nothing_and_works_with_room_again(tmp_path: Path, write: str) -> None:
    if not can_mount(tmp_path):
        pytest.skip("only root may mount a small disk, and not in every container")
    command = [sys.executable, "-P", str(SCRIPT), "--only", write, "--rooms", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": "/tmp"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0 and "2 tried" in done.stdout and "wrong: 0" in done.stdout, done
