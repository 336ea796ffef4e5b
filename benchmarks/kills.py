"""Kill commands of the store with SIGKILL while another process works on the same model.

    python benchmarks/kills.py                       # 100 kills each of pull, quantise, adapters add, rm, prune
    python benchmarks/kills.py --kills 5 --only rm   # fewer, of one

After each kill: what the list calls complete verifies, an older model, adapter and conversation are whole, the same
command finishes, and no lock keeps anybody waiting.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "hub"))

from forked_commands import REPO, Child, Place, Tally, a_place, tell

from glmchat.core import locations


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


def kill(place: Place, name: str, count: int, seconds: float, chance: random.Random) -> Tally:
    """`count` kills that fell while it worked, or as many as `seconds` have room for."""
    begin, before, reset = operations(place)[name]
    tally = Tally(name)
    usual = float("inf")
    for _ in range(3):  # the first still loads what the others find
        before()
        started = time.monotonic()
        child = begin()
        if child.wait() != 0:
            tally.wrong.append(f"it does not work at all: {child.last()}")
            return tally
        usual = min(usual, time.monotonic() - started)
        reset()
    until = time.monotonic() + seconds
    number = -1
    while tally.tried - tally.ended_before < count and tally.tried < 4 * count and time.monotonic() < until:
        number += 1
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", action="append", help="pull, quantise, 'adapters add', rm or prune")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each operation; fewer kills then")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    wrong = 0
    with a_place(3_000_000) as place:
        place.old()
        for name in options.only or operations(place):
            began = time.monotonic()
            wrong += tell(kill(place, name, options.kills, options.seconds, chance), began)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
