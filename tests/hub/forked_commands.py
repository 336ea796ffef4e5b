"""Commands as forks of one process that has loaded everything already, in homes and caches below one folder.

A kill then falls into the work and not into the imports, and a round takes a second. Quantising and adding an adapter
are the work of their jobs, without the face that starts them.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["HF_TOKEN_PATH"] = os.devnull  # read once, when the hub's library is loaded, and here for every user

import torch
from adapter_builders import write_lora
from loopback_hub import LoopbackHub
from polling import wait_until
from tiny_checkpoints import build

from glmchat.chat.history.history import History
from glmchat.cli.main import run
from glmchat.core import locations
from glmchat.core.errors import refusal
from glmchat.jobs import add_adapter, quantise

# Loaded before anything forks; the commands import them where they need them.
LOADED = (
    *(f"glmchat.cli.{name}" for name in ("adapters", "asking", "history", "models", "output", "pull", "show")),
    *(f"glmchat.hub.{name}" for name in ("lookup", "plan", "pull", "removal", "verify", "registration", "lockfile")),
    *("glmchat.chat.launch", "glmchat.chat.history.search", "glmchat.chat.history.transcript", "glmchat.core.http"),
    *(
        "huggingface_hub",
        "huggingface_hub.utils._cache_manager",
        "filelock",
        "httpx2",
        "httpcore2",
        "readline",
        "encodings.idna",
        "_strptime",
        "zoneinfo",
        "rich.table",
    ),
)
REPO = "kills/model"
PATIENCE = 60.0  # seconds for one command; a lock that stayed would use them up


@dataclass
class Tally:
    """What a row of the table says; wrong: one sentence each."""

    name: str
    tried: int = 0
    ended_before: int = 0  # runs that were over before their kill came
    wrong: list[str] = field(default_factory=list)
    words: set[str] = field(default_factory=set)

    def line(self, seconds: float) -> str:
        over = f", {self.ended_before} were over before" if self.ended_before else ""
        return f"{self.name:<14} {self.tried:4} tried{over}; wrong: {len(self.wrong)}; {seconds:.0f} s"


class Place:
    """Homes and caches below one folder, and the forks that work in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "said").mkdir()
        self.use(folder)
        self.model = build("llama", folder / "sources" / "model")
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            for words in (["list"], ["verify", "-"], ["history", "list"], ["adapters", "list"], ["prune", "--dry-run"]):
                run(words)  # what a command imports late is here before the first fork
        self.adapter = write_lora(folder / "sources" / "poet", _lora(), base_model_name_or_path="x")

    def use(self, folder: Path) -> None:
        """Commands that are forked from now on have their home and their cache there."""
        os.environ.update(GLMCHAT_HOME=str(folder / "home"), HF_HOME=str(folder / "hf"), GLMCHAT_LANG="en")

    def begin(self, work: Callable[[], int]) -> Child:
        return Child(self.folder / "said", work)

    def command(self, *arguments: object) -> Child:
        return self.begin(lambda: run([str(a) for a in arguments]))

    def old(self) -> None:
        """What must outlive everything: a model, an adapter, a conversation."""
        shutil.copytree(self.model, self.folder / "sources" / "old")
        assert self.command("add", self.folder / "sources" / "old", "--name", "old").wait() == 0
        assert self.begin(lambda: self.add("old-poet")).wait() == 0
        with History.default() as history:
            history.append(history.new("old"), "user", "an old question")

    def add(self, name: str) -> int:
        origin: dict[str, Any] = {"asked": str(self.adapter), "repo": None, "revision": None, "served": []}
        add_adapter.work({"path": str(self.adapter), "name": name, "origin": origin}, lambda _: None)
        return 0

    def quantise(self) -> int:
        request = {
            "source": str(self.model), "out": str(locations.models_dir() / "copy-int4"), "recipe": {"bits": 4},
            "stored": "none", "manifest": {"name": "copy-int4", "base": "old"},
        }  # fmt: skip
        quantise.work(request, lambda _: None)
        return 0

    def faults(self) -> list[str]:
        """What is wrong with the store now: one sentence each. All is asked in one fork."""

        def ask() -> int:
            for fault in _faults():
                sys.__stdout__.write(f"{fault}\n")  # type: ignore[union-attr]
            return 0

        asked = self.begin(ask)
        code = asked.wait()
        return [*asked.out().splitlines(), *([f"the store cannot be asked: {code} {asked.last()}"] if code else [])]


def _faults() -> Iterator[str]:
    def said(*words: str) -> tuple[int, str, str]:
        out, talk = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(talk):
            code = run(list(words))
        return code, out.getvalue(), talk.getvalue().strip().replace("\n", " / ")[-300:]

    code, out, talk = said("list", "--json")
    if code:
        yield f"list: {talk}"
        return
    names = [row["name"] for row in json.loads(out) if row["complete"]]
    code, out, talk = said("adapters", "list", "--json")
    if code:
        yield f"adapters list: {talk}"
    names += [row["name"] for row in json.loads(out or "[]")]
    for name in names:
        code, _, talk = said("verify", name)
        if code:
            yield f"{name} is called complete and does not verify: {talk}"
    yield from (f"{name} is lost" for name in ("old", "old-poet") if name not in names)
    code, out, _ = said("history", "search", "question")
    if code or "old question" not in out:
        yield "the conversation is lost"


class Child:
    """A fork that does one thing; its words go to a file. It ends by the kill, or with an exit code."""

    def __init__(self, folder: Path, work: Callable[[], int]) -> None:
        handle, self.words = tempfile.mkstemp(dir=folder)
        self._out = f"{self.words}.out"
        out = os.open(self._out, os.O_CREAT | os.O_WRONLY, 0o600)
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.dup2(out, 1)
            os.dup2(handle, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            code = 99
            try:
                code = work()
            except BaseException as raised:
                error = (refusal(raised) if isinstance(raised, OSError) else None) or raised  # as jobs/lines.py does
                code = getattr(error, "exit", 98)
                hint = getattr(error, "hint", "")
                sys.stderr.write(traceback.format_exc() if code == 98 else f"glmchat: {error}\n  hint: {hint}\n")
            finally:
                with suppress(OSError):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        os.close(handle)
        os.close(out)
        self.code: int | None = None

    def over(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self) -> int:
        """Its exit code; -9 also for one that had to be ended because it never did by itself."""
        try:
            wait_until(self.over, PATIENCE)
        except AssertionError:
            self.kill()
        assert self.code is not None
        return self.code

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.code = os.waitstatus_to_exitcode(status)

    def out(self) -> str:
        return Path(self._out).read_text(encoding="utf-8")

    def said(self) -> str:
        return Path(self.words).read_text(encoding="utf-8", errors="replace")

    def last(self) -> str:
        return " / ".join(line.strip() for line in self.said().strip().splitlines()[-2:])[-300:]


def _lora() -> dict[str, Any]:
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    layers = {name.format(layer, "A"): torch.zeros(4, 64) for layer in range(3)}
    return layers | {name.format(layer, "B"): torch.zeros(64, 4) for layer in range(3)}


@contextmanager
def a_hub(model: Path, rate: float) -> Iterator[str]:
    """A hub with the model, in a process of its own: this one must have no threads when it forks."""
    reading, writing = os.pipe()
    alive, ours = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        with LoopbackHub(rate=rate) as hub:
            hub.add(REPO, {path.name: path.read_bytes() for path in model.iterdir()})
            os.write(writing, hub.url.encode())
            os.read(alive, 1)  # until the parent ends, however it does
        os._exit(0)
    try:
        yield os.read(reading, 200).decode()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextmanager
def a_place(rate: float) -> Iterator[Place]:
    """A place, and a hub of so many bytes a second that its commands ask."""
    for name in LOADED:
        import_module(name)
    torch.set_num_threads(1)  # a fork has none of the threads that its parent had
    with tempfile.TemporaryDirectory(prefix="forks-") as folder:
        place = Place(Path(folder))
        with a_hub(place.model, rate) as url:
            os.environ["HF_ENDPOINT"] = url
            yield place


def tell(tally: Tally, began: float) -> int:
    """Print a row of the table; how much was wrong."""
    print(tally.line(time.monotonic() - began), *sorted(tally.words), *tally.wrong[:20], sep="\n    ", flush=True)
    return len(tally.wrong)
