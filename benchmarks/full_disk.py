"""Each write of glmchat on a disk with the room for a part of it, down to none (root: a small tmpfs).

    python benchmarks/full_disk.py
    python benchmarks/full_disk.py --only alias --only merge

The plans believe that there is room: it goes later. Each time one line names the disk and the exit code is 4, or the
work is done; what was there before is whole, nothing half is listed, and with room again the same works.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "hub"))

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "tui"))

import torch
from forked_commands import REPO, Child, Place, Tally, a_place, tell
from screen import TerminalSession

from glmchat.chat.history.history import History
from glmchat.core import locations
from glmchat.engine.formats import packed_cache
from glmchat.engine.quantize.linear import QuantLinear
from glmchat.jobs import merge
from glmchat.tui.theme import remember_theme

ROOMS = (0, 1, 4096, 8192, 16_384, 40_000, 100_000, 200_000, 400_000)  # bytes left
FAKE = Path(__file__).resolve().parents[1] / "tests" / "cli" / "with_fake_engine.py"


@dataclass(frozen=True)
class Write:
    """frees: it takes something away, so it works without any room. again: what a second run may say."""

    begin: Callable[[], Child]
    frees: bool = False
    again: tuple[str, ...] = ("already",)


def writes(place: Place, disk: Path) -> dict[str, Write]:
    incoming = place.folder / "incoming.json"
    said = [{"role": "user", "content": "question " * 40_000}, {"role": "assistant", "content": "answer"}]
    incoming.write_text(json.dumps(said))

    def command(*words: object) -> Callable[[], Child]:
        return lambda: place.command(*words)

    def merged() -> int:
        request = {"base": str(place.model), "adapter": str(place.adapter), "out": str(disk / "merged"), "quant": None,
                   "dtype": None, "alpha": None, "force": True}  # fmt: skip
        merge.work(request, lambda _: None)
        return 0

    def one_shot() -> int:
        os.environ["XDG_RUNTIME_DIR"] = str(disk / "r")
        line = [sys.executable, "-P", str(FAKE), "{}", "run", str(place.model), "--keep-alive", "0", "hello"]
        return subprocess.run(line, check=False).returncode

    def packed() -> int:
        packed_cache._SMALLEST = 1
        cache = packed_cache.PackedCache(locations.packed_dir() / "x.safetensors", 1)
        layers = [QuantLinear.from_int8(torch.ones(512, 256, dtype=torch.int8), torch.ones(512)) for _ in range(3)]
        for number, layer in enumerate(layers):
            cache.add(f"layer{number}", layer)
        cache.save()
        return 0 if all(bool((layer(torch.ones(1, 256)) == 256).all()) for layer in layers) else 1

    def settings() -> int:
        remember_theme("light")
        return 0

    def window() -> int:
        argv = ("run", place.model, "--keep-alive", 0)
        with TerminalSession(*argv, columns=60, behaviour={"pieces": ["an ", "answer"]}) as session:
            session.until_ready()
            session.say("what is left?")
            session.until_seen("an answer")
            session.press("ctrl+q")
            return session.until_ended()

    return {
        "settings": Write(lambda: place.begin(settings)),
        "packed cache": Write(lambda: place.begin(packed)),
        "window": Write(lambda: place.begin(window)),
        "pull": Write(command("pull", REPO)),
        "quantise": Write(lambda: place.begin(place.quantise)),
        "merge": Write(lambda: place.begin(merged)),
        "adapters add": Write(lambda: place.begin(lambda: place.add("new"))),
        "adapters rm": Write(command("adapters", "rm", "spare-poet", "--yes"), frees=True, again=("no adapter",)),
        "add": Write(command("add", place.model, "--name", "again")),
        "rm": Write(command("rm", "spare", "--yes"), frees=True, again=("spare",)),
        "prune": Write(command("prune", "--yes"), frees=True),
        "alias": Write(command("alias", "short", "old")),
        "alias away": Write(command("alias", "--remove", "second"), again=("second",)),
        "mirror": Write(command("mirror", "write", REPO, disk / "mirror")),
        "one-shot": Write(lambda: place.begin(one_shot)),
        "history import": Write(command("history", "import", incoming)),
        "history export": Write(command("history", "export", "1", "--output", disk / "export.json", "--force")),
        "history rm": Write(command("history", "rm", "2", "--yes"), again=("no conversation",)),
        "history rm --forever": Write(command("history", "rm", "2", "--yes", "--forever"), again=("no conversation",)),
        "history restore": Write(command("history", "restore", "3"), again=("is not deleted",)),
    }


def furnish(place: Place, disk: Path) -> None:
    """What must outlive everything, and what the commands take away."""
    place.old()
    assert place.command("add", shutil.copytree(place.model, disk / "spare"), "--name", "spare").wait() == 0
    assert place.begin(lambda: place.add("spare-poet")).wait() == 0
    assert place.command("alias", "second", "old").wait() == 0
    with History.default() as history:
        for title in ("two", "three"):
            history.append(history.new("old"), "user", f"{title} " * 3000)
        history.delete_conversation(3)
    (disk / "export.json").write_text("what was exported before")
    (locations.manifests_dir() / "broken.json").write_text("{")


def fill(only: list[str] | None, rooms: int) -> Iterator[Tally]:
    usage = shutil.disk_usage("/")._replace(free=1 << 40)
    shutil.disk_usage = lambda _: usage  # type: ignore[assignment]
    with a_place(3_000_000) as place:
        disk = place.folder / "d"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], check=True)
        try:
            place.use(disk)
            furnish(place, disk)
            whole = shutil.copytree(disk, place.folder / "whole", symlinks=True)
            for name, write in writes(place, disk).items():
                if only is None or name in only:
                    tally = Tally(name)
                    for left in ROOMS[:: len(ROOMS) // rooms][:rooms]:
                        for inside in disk.iterdir():
                            shutil.rmtree(inside) if inside.is_dir() else inside.unlink()
                        shutil.copytree(whole, disk, symlinks=True, dirs_exist_ok=True)
                        tally.wrong += [
                            f"{left} bytes left: {fault}" for fault in faults(place, disk, write, left, tally)
                        ]
                    yield tally
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=False)


def faults(place: Place, disk: Path, write: Write, left: int, tally: Tally) -> Iterator[str]:
    _occupy(disk, left)
    child = write.begin()
    code = child.wait()
    tally.tried += 1
    lines = [line for line in child.said().splitlines() if line.startswith("glmchat: ")]
    if code not in (0, 4) or "Traceback" in child.said() or (code and (len(lines) != 1 or "hint" not in child.said())):
        yield f"{code} {child.last()}"
    elif code:
        tally.words.add(f"{code}: {child.last()}"[:260])
        if not any(word in lines[0] for word in ("full", "No space", "room")):
            yield f"the disk is not named: {child.last()}"
    if code and write.frees:
        yield f"it needs room to take something away: {child.last()}"
    if code and (disk / "export.json").read_text() != "what was exported before":
        yield "what was exported before is lost"
    yield from place.faults()
    (disk / "filler").unlink()
    again = write.begin()
    if again.wait() != 0 and not (code == 0 and any(word in again.said() for word in write.again)):
        yield f"with room again: {again.last()}"
    yield from (f"with room again: {fault}" for fault in place.faults())
    litter = [path.name for path in disk.rglob("*") if path.name.endswith((".tmp", ".new", ".merging"))]
    if litter:
        yield f"left behind: {litter}"


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
    parser.add_argument("--only", action="append", help="one of the writes")
    parser.add_argument("--rooms", type=int, default=len(ROOMS), help="how many of the amounts of room are tried")
    options = parser.parse_args()
    wrong, began = 0, time.monotonic()
    for tally in fill(options.only, options.rooms):
        wrong += tell(tally, began)
        began = time.monotonic()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
