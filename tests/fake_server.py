"""The real server over a fake engine, as a child process: `python tests/fake_server.py --uds PATH … --lifeline`.

`start_engine(options, command=fake_command(...))` starts it where the real engine would be started. What the fake does
is said in its first argument, a JSON object of FakeEngine's arguments:
{"pieces": ["one ", "two"], "seconds_per_token": 0.01, "seconds_to_load": 0.5, "load_failure": {"code", "message", …},
 "exit_at_start": 3, …}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def fake_command(**behaviour: Any) -> tuple[str, ...]:
    """The command that replaces `[python, "-P", "-m", "glmchat.serve"]`."""
    return (sys.executable, "-P", str(Path(__file__).resolve()), json.dumps(behaviour))


def main() -> None:
    from glmchat.core.errors import GlmchatError
    from glmchat.serve.run import main as serve_main

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from fakes import FakeEngine

    behaviour = json.loads(sys.argv[1])
    if (code := behaviour.pop("exit_at_start", None)) is not None:
        sys.stderr.write("the fake was told to exit at once\n")
        sys.exit(code)
    failure = behaviour.pop("load_failure", None)
    load = FakeEngine.loader(**behaviour, load_failure=GlmchatError.from_json(failure) if failure else None)
    code = serve_main(sys.argv[2:], lambda options: load)
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
