"""The window under test: the real app, session and endpoint, with a fake engine in a real child process."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `from windows import open_window`
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "hub"))  # a hub on loopback to pull from
