"""The command as a user has it, in a process and a home of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def glmchat(*arguments: str, home: Path) -> str:
    """What the command prints. Where it fails, the script ends and says the exit code and the last words."""
    command = [sys.executable, "-P", "-m", "glmchat", *arguments]
    environ = {**os.environ, "GLMCHAT_HOME": str(home)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"glmchat {' '.join(arguments)}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout
