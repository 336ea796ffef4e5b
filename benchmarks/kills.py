"""Kill commands of the store with SIGKILL while another process works on the same model; share a cache; fill a disk.

    python benchmarks/kills.py                       # 100 kills each of pull, quantise, adapters add, rm, prune
    python benchmarks/kills.py --kills 5 --only rm   # fewer, of one
    python benchmarks/kills.py --users               # four users of one shared cache (root)
    python benchmarks/kills.py --full                # every write on a disk with too little room (root: a small tmpfs)

After each kill: what the list calls complete verifies, an older model, adapter and conversation are whole, the same
command finishes, and no lock keeps anybody waiting. Commands run in forks of this process, which has loaded everything
already, so that a kill falls into the work and not into the imports; quantising and adding an adapter are the work of
their jobs, without the face that starts them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "hub"))

os.environ["HF_TOKEN_PATH"] = os.devnull  # read once, when the hub's library is loaded, and here for every user

import torch
from adapter_builders import write_lora
from loopback_hub import LoopbackHub
from tiny_checkpoints import build

from glmchat.chat.history.history import History
from glmchat.cli.main import run
from glmchat.core import locations
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
UNTIL = [float("inf")]  # --seconds: when no further kill is begun
USERS = (20001, 20002, 20003, 20004)


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

    def begin(self, work: Callable[[], int], *, user: int | None = None) -> Child:
        return Child(self.folder / "said", work, user)

    def command(self, *arguments: object, user: int | None = None) -> Child:
        return self.begin(lambda: run([str(a) for a in arguments]), user=user)

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

    def faults(self, *, user: int | None = None) -> Iterator[str]:
        """What is wrong with the store now."""
        listed = self.command("list", "--json", user=user)
        if listed.wait() != 0:
            yield f"list: {listed.last()}"
            return
        rows = [row for row in json.loads(listed.out()) if row["complete"]]
        adapters = self.command("adapters", "list", "--json", user=user)
        if adapters.wait() != 0:
            yield f"adapters list: {adapters.last()}"
        names = [row["name"] for row in (*rows, *json.loads(adapters.out() or "[]"))]
        for name in names:
            verified = self.command("verify", name, user=user)
            if verified.wait() != 0:
                yield f"{name} is called complete and does not verify: {verified.last()}"
        if user is None:
            yield from (f"{name} is lost" for name in ("old", "old-poet") if name not in names)
            said = self.command("history", "search", "question")
            if said.wait() != 0 or "old question" not in said.out():
                yield "the conversation is lost"


class Child:
    """A fork that does one thing; its words go to a file. It ends by the kill, or with an exit code."""

    def __init__(self, folder: Path, work: Callable[[], int], user: int | None) -> None:
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
                if user is not None:
                    os.umask(0o002)
                    os.setgroups([])
                    os.setgid(USERS[0])
                    os.setuid(user)
                code = work()
            except BaseException as error:  # noqa: BLE001 - a fork never returns into the loop of its parent
                code = getattr(error, "exit", 98)
                sys.stderr.write(traceback.format_exc() if code == 98 else f"glmchat: {error}\n")
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
        ends = time.monotonic() + PATIENCE
        while not self.over():
            if time.monotonic() > ends:
                self.kill()
            time.sleep(0.002)
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
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    return {name.format("A"): torch.zeros(4, 64), name.format("B"): torch.zeros(64, 4)}


@contextmanager
def a_hub(model: Path, rate: float) -> Iterator[str]:
    """A hub with the model, in a process of its own: this one must have no threads when it forks."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with LoopbackHub(rate=rate) as hub:
            hub.add(REPO, {path.name: path.read_bytes() for path in model.iterdir()})
            os.write(writing, hub.url.encode())
            while os.getppid() != 1:
                time.sleep(0.5)
        os._exit(0)
    try:
        yield os.read(reading, 200).decode()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


# Kills


def litter(place: Path) -> None:
    """What prune takes away: half a download, a blob without a link, a broken record, a folder that was going."""
    blobs = locations.hf_cache() / "models--kills--litter" / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    for number in range(20):
        (blobs / f"{number:064x}").write_bytes(bytes(10_000))
        (blobs / f"{number:064x}.glmchat.incomplete").write_bytes(bytes(10_000))
        os.utime(blobs / f"{number:064x}", (1, 1))
    (locations.manifests_dir() / "broken.json").write_text("{")
    gone = locations.models_dir() / ".gone-x-1"
    gone.mkdir(parents=True, exist_ok=True)
    (gone / "model.safetensors").write_bytes(bytes(100_000))


def littered() -> bool:
    blobs = locations.hf_cache() / "models--kills--litter" / "blobs"
    return any(blobs.glob("*")) or (locations.models_dir() / ".gone-x-1").exists()


def operations(place: Place) -> dict[str, tuple[Callable[[], Child], Callable[[], object], Callable[[], object]]]:
    """name -> begin it, what must be there before, what takes its result away."""

    def remove(*command: str) -> Callable[[], int]:
        return lambda: place.command(*command, "--yes").wait()

    def pull() -> Child:
        return place.command("pull", REPO)

    return {
        "pull": (pull, lambda: None, remove("rm", REPO)),
        "quantise": (lambda: place.begin(place.quantise), lambda: None, remove("rm", "copy-int4")),
        "adapters add": (lambda: place.begin(lambda: place.add("new")), lambda: None, remove("adapters", "rm", "new")),
        "rm": (lambda: place.command("rm", REPO, "--yes"), lambda: pull().wait(), lambda: None),
        "prune": (lambda: place.command("prune", "--yes"), lambda: litter(place.folder), lambda: None),
    }


def companions(name: str) -> Sequence[Sequence[str]]:
    """What another process does meanwhile, with the same model."""
    subject = {"quantise": "copy-int4", "adapters add": "new"}.get(name, REPO)
    return (
        ["list"],
        ["verify", subject],
        ["show", subject],
        ["pull", REPO] if name in ("pull", "prune") else ["alias"],
    )


def kill(place: Place, name: str, count: int, chance: random.Random) -> Tally:
    begin, before, reset = operations(place)[name]
    tally = Tally(name)
    before()
    started = time.monotonic()
    first = begin()
    if first.wait() != 0:
        tally.wrong.append(f"it does not work at all: {first.last()}")
        return tally
    usual = time.monotonic() - started
    reset()
    for number in range(count):
        if time.monotonic() > UNTIL[0]:
            break
        before()
        other = place.command(*companions(name)[number % 4])
        child = begin()
        ends = time.monotonic() + chance.uniform(0, usual)
        while time.monotonic() < ends and not child.over():
            time.sleep(0.001)
        tally.tried += 1
        tally.ended_before += child.over()
        if not child.over():
            child.kill()
        other.wait()
        if "Traceback" in other.said() or "Traceback" in child.said() or other.code == -9:
            tally.wrong.append(f"{number}: beside it: {other.last()} {child.last()}")
        tally.wrong += [f"{number}: after the kill: {fault}" for fault in place.faults()]
        again = begin()
        code = again.wait()
        gone = name == "rm" and "not on this machine" in again.said()
        there = name == "adapters add" and "already an adapter" in again.said()
        made = name == "quantise" and "already exists" in again.said()
        if code != 0 and not (gone or there or made):
            tally.wrong.append(f"{number}: the same command: {code} {again.last()}")
        if name == "prune" and littered():
            tally.wrong.append(f"{number}: prune left something")
        tally.wrong += [f"{number}: at the end: {fault}" for fault in place.faults()]
        reset()
    return tally


# Users


def share(place: Place, rounds: int, chance: random.Random) -> Tally:
    """Four users, a home each and one cache of a group: pull, verify, list, rm and prune at once."""
    tally = Tally("four users")
    cache = place.folder / "shared"
    cache.mkdir()
    for folder in (place.folder, place.folder / "sources"):
        folder.chmod(0o755)
    (place.folder / "said").chmod(0o777)
    os.chown(cache, 0, USERS[0])
    cache.chmod(0o2775)

    def as_user(user: int, *arguments: object) -> Child:
        home = place.folder / f"home-{user}"
        home.mkdir(exist_ok=True)
        os.chown(home, user, USERS[0])
        os.environ.update(HOME=str(home), GLMCHAT_HOME=str(home), HF_HOME=str(cache))
        return place.command(*arguments, user=user)

    commands = (("pull", REPO), ("verify", REPO), ("list",), ("rm", REPO, "--yes"), ("prune", "--yes"), ("pull", REPO))
    for _ in range(rounds):
        children = [(user, command, as_user(user, *command)) for user in USERS for command in [chance.choice(commands)]]
        for user, command, child in children:
            code = child.wait()
            tally.tried += 1
            if code not in (0, 1, 2, 3, 4) or "Traceback" in child.said():
                tally.wrong.append(f"{user} {' '.join(command)}: {code} {child.last()}")
            elif code:
                tally.words.add(f"{command[0]} {code}: {child.last()}"[:200])
    for user in USERS:
        child = as_user(user, "pull", REPO)
        if child.wait() != 0:
            tally.wrong.append(f"{user} cannot pull in the end: {child.last()}")
        tally.wrong += [f"{user} in the end: {fault}" for fault in place.faults(user=user)]
    return tally


# A full disk


def fill(place: Place) -> Iterator[Tally]:
    """Each write with the room for a part of it, down to none. The plans believe that there is room: it goes later."""
    usage = shutil.disk_usage("/")._replace(free=1 << 40)
    shutil.disk_usage = lambda _: usage  # type: ignore[assignment]
    disk = place.folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], check=True)
    try:
        place.use(disk)
        place.old()
        export = disk / "export.json"
        incoming = place.folder / "incoming.json"
        said = [{"role": "user", "content": "question " * 40_000}, {"role": "assistant", "content": "answer"}]
        incoming.write_text(json.dumps(said))
        works: dict[str, Callable[[], Child]] = {
            "pull": lambda: place.command("pull", REPO),
            "quantise": lambda: place.begin(place.quantise),
            "adapters add": lambda: place.begin(lambda: place.add("new")),
            "add": lambda: place.command("add", place.model, "--name", "again"),
            "alias": lambda: place.command("alias", "short", "old"),
            "history import": lambda: place.command("history", "import", incoming),
            "history export": lambda: place.command("history", "export", "1", "--output", export, "--force"),
            "history rm": lambda: place.command("history", "rm", "99", "--yes"),
            "lock": lambda: place.command("lock", "old"),
        }
        whole = place.folder / "whole"
        shutil.copytree(disk, whole, symlinks=True)
        for name, begin in works.items():
            tally = Tally(f"full: {name}")
            for left in (0, 1, 4096, 8192, 16_384, 40_000, 100_000, 200_000, 400_000):
                for inside in disk.iterdir():
                    shutil.rmtree(inside) if inside.is_dir() else inside.unlink()
                shutil.copytree(whole, disk, symlinks=True, dirs_exist_ok=True)
                if name == "history export":
                    export.write_text("what was exported before")
                _occupy(disk, left)
                child = begin()
                code = child.wait()
                tally.tried += 1
                if code not in (0, 1, 2, 3, 4) or "Traceback" in child.said():
                    tally.wrong.append(f"{left} bytes left: {code} {child.last()}")
                elif code and name != "history rm":
                    tally.words.add(f"{code}: {child.last()}"[:260])
                    if not any(word in child.said() for word in ("full", "No space", "free", "disk")):
                        tally.wrong.append(f"{left} bytes left: the disk is not named: {child.last()}")
                if name == "history export" and code and export.read_text() != "what was exported before":
                    tally.wrong.append(f"{left} bytes left: what was exported before is lost")
                tally.wrong += [f"{left} bytes left: {fault}" for fault in place.faults()]
                (disk / "filler").unlink()
                again = begin()
                if again.wait() != 0 and not any(w in again.said() for w in ("already", "no conversation")):
                    tally.wrong.append(f"{left} bytes left: with room again: {again.last()}")
                tally.wrong += [f"{left} bytes left, with room again: {fault}" for fault in place.faults()]
            yield tally
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def _occupy(disk: Path, left: int) -> None:
    """Fill the disk but for `left` bytes, in whole pages."""
    with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    size = (disk / "filler").stat().st_size
    with (disk / "filler").open("r+b") as file:
        file.truncate(max(0, size - left))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", action="append", help="pull, quantise, 'adapters add', rm or prune")
    parser.add_argument("--users", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--seconds", type=float, help="for each operation; fewer kills if they take longer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    wrong = 0
    for name in LOADED:
        import_module(name)
    torch.set_num_threads(1)  # a fork has none of the threads that its parent had

    def tell(tally: Tally, began: float) -> int:
        print(tally.line(time.monotonic() - began), *sorted(tally.words), *tally.wrong[:20], sep="\n    ", flush=True)
        return len(tally.wrong)

    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        place = Place(Path(folder))
        with a_hub(place.model, 3_000_000) as url:
            os.environ["HF_ENDPOINT"] = url
            began = time.monotonic()
            if options.users:
                wrong += tell(share(place, options.kills, chance), began)
            elif options.full:
                for tally in fill(place):
                    wrong += tell(tally, began)
                    began = time.monotonic()
            else:
                place.old()
                for name in options.only or operations(place):
                    UNTIL[0] = began + (options.seconds or float("inf"))
                    wrong += tell(kill(place, name, options.kills, chance), began)
                    began = time.monotonic()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
