"""The whole `glmchat` command with the fake engine where the real one would be started.

    python tests/cli/with_fake_engine.py '{"pieces": ["one ", "two"]}' run FOLDER PROMPT …

The engine is a real child process behind the real server; only what it says is made up (tests/fake_server.py).
A run of tuning is tests/pretend_tune.py.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    from fake_server import fake_command

    from glmchat.chat import connect, shared_engine, tuning
    from glmchat.cli import main as cli

    behaviour = json.loads(sys.argv[1])
    start = functools.partial(shared_engine.start_engine, command=fake_command(**behaviour))
    connect.start_engine = shared_engine.start_engine = start
    tuning.PROGRAM = (str(Path(__file__).resolve().parent.parent / "pretend_tune.py"),)
    sys.argv = ["glmchat", *sys.argv[2:]]
    cli.main()


if __name__ == "__main__":
    main()
