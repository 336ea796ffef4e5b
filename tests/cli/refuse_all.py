"""Gives each path to `glmchat run`, `show` and to what the window starts with, in one process without torch.

stdin: {"models": {name: path}, "adapters": {name: path}, "base": path}. stdout: one JSON object, name -> what each
said, how long it took, and what was loaded.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from glmchat.chat import connect, engine_process
from glmchat.chat.launch import LaunchOptions, launch_installed, locate
from glmchat.checkpoints import quantised
from glmchat.cli import main as cli
from glmchat.core.errors import GlmchatError
from glmchat.tui.connection import EngineLink


class Started(Exception):
    """An engine or a job was to be started."""


def refuse_start(*_: object, **__: object) -> NoReturn:
    raise Started


def command(*words: str) -> dict[str, Any]:
    """Exit code, the object on stdout, and the lines on stderr of one command line."""
    out, err = io.StringIO(), io.StringIO()
    before = time.process_time()
    code: object = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.run(words)
    except Started:
        code = "started"
    except Exception as error:  # a traceback is what must be seen
        code = f"{type(error).__name__}: {error}"
    seconds = time.process_time() - before
    rows = [line for line in out.getvalue().splitlines() if line.startswith("{")]
    return {"exit": code, "said": json.loads(rows[-1]) if rows else {}, "lines": err.getvalue().splitlines(),
            "seconds": seconds}  # fmt: skip


def window(path: str) -> dict[str, Any]:
    """What the window shows for `/model PATH`, and when it is opened with that model."""
    said: list[Any] = []
    before = time.process_time()
    try:
        launch = launch_installed(LaunchOptions(), *locate(path))
        EngineLink(launch, refuse_start).connect(lambda news: said.append(getattr(news, "error", None)))
        error = said[-1] if said else None
    except GlmchatError as refused:
        error = refused
    except Started:
        return {"said": {}, "seconds": 0.0, "started": True}
    except Exception as crash:
        return {"said": {"code": f"{type(crash).__name__}: {crash}"}, "seconds": 0.0}
    return {"said": error.to_json() if error is not None else {}, "seconds": time.process_time() - before}


def main() -> None:
    from glmchat.chat import jobs

    quantised.find_spec = lambda name: None  # no package that reads what others quantised
    engine_process.start_engine = connect.start_engine = refuse_start  # type: ignore[assignment]
    jobs.run_job = refuse_start  # type: ignore[assignment]
    request = json.load(sys.stdin)
    found: dict[str, Any] = {"models": {}, "adapters": {}}
    found["base"] = {  # first, as what is imported once is no part of a refusal
        "show": command("show", request["base"], "--json"),
        "run": command("run", request["base"], "hi", "--complete", "--json"),
        "window": window(request["base"]),
    }
    for name, path in request["models"].items():
        found["models"][name] = {
            "run": command("run", path, "hi", "--json"),
            "show": command("show", path, "--json"),
            "window": window(path),
        }
    for name, path in request["adapters"].items():
        said = {"run": command("run", request["base"], "hi", "--adapter", path, "--json")}
        said["add"] = command("adapters", "add", path, "--base", request["base"], "--json")
        found["adapters"][name] = said
    for name, path in request["models"].items():  # last, as it gives them names
        found["models"][name]["add"] = command("add", path, "--json")
    from glmchat.core import locations

    found["store"] = [p.name for p in Path(locations.adapters_dir()).glob("*")]
    heavy = ("torch", "transformers", "numpy", "huggingface_hub")
    found["loaded"] = [name for name in heavy if name in sys.modules]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
