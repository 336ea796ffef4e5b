"""Commands of the store are killed while another works on the same model, as benchmarks/kills.py does it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kills.py"


@pytest.mark.parametrize("operation", ["pull", "adapters add", "rm", "prune"])
def test_after_a_kill_the_store_is_true_and_the_same_command_finishes(tmp_path: Path, operation: str) -> None:
    command = [sys.executable, "-P", str(SCRIPT), "--only", operation, "--kills", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    said = re.match(r"[a-z ]+? +(\d+) tried(?:, (\d+) were over before)?; wrong: 0;", done.stdout)
    assert done.returncode == 0 and said is not None, done
    assert int(said[1]) - int(said[2] or 0) == 3 or int(said[1]) == 12, "fewer kills fell than were asked for"
