"""Kill `glmchat pull` with SIGKILL at random moments, again and again; what does it cost, and is the result whole?

    python benchmarks/kill_pull.py                    # 50 kills of a 200 MB pull at 25 MB/s
    python benchmarks/kill_pull.py --kills 10 --files 4
    python benchmarks/kill_pull.py --kills 20 --quant # `pull --quant 4` of a small ChatGLM-6B in .bin shards

A loopback hub (SO_SNDBUF 64 kB) counts what it sends. After each kill the next run asks from some offset on; what lies
between that offset and the last byte sent before was paid twice. At most 1 MB per file and kill is the promise.
With --quant the kills are spread over time and fall into quantising too; the resulting copy is compared with one made
without a kill.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "hub"))

from loopback_hub import LoopbackHub, Synthetic

REPO = "bench/model"
PROMISE = 1_000_000  # bytes per file and kill


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--size", type=int, default=200_000_000, help="bytes in all")
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--rate", type=float, default=25_000_000, help="bytes per second in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quant", action="store_true")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="kill-pull-") as folder, LoopbackHub(rate=options.rate) as hub:
        result = (_quantised if options.quant else _plain)(Path(folder), hub, options, chance)
    print(json.dumps(result))
    return 0 if result["whole"] and result["bytes_again_most"] <= PROMISE else 1


def _plain(folder: Path, hub: LoopbackHub, options: argparse.Namespace, chance: random.Random) -> dict[str, Any]:
    names = [f"model-{i + 1:05d}-of-{options.files:05d}.safetensors" for i in range(options.files)]
    shards = {name: Synthetic(options.size // options.files, seed=i) for i, name in enumerate(names)}
    commit = hub.add(REPO, {"config.json": b'{"model_type": "gpt2"}', **shards})
    command, environment = _command(folder, hub)
    begun = time.monotonic()
    kills = 0
    while kills < options.kills:
        child = subprocess.Popen(command, cwd="/", env=environment, stderr=subprocess.DEVNULL)
        sent = sum(hub.sent_for(name) for name in names)
        # Spread over the whole file; every tenth kill falls into start-up, planning or re-hashing instead.
        early = kills % 10 == 9
        target = sent + chance.uniform(0, 1.5 * options.size / options.kills)
        ends = time.monotonic() + chance.uniform(0.1, 1.5)
        while child.poll() is None and sum(hub.sent_for(name) for name in names) < target:
            if early and time.monotonic() > ends:
                break
            time.sleep(0.001)
        if not _killed(child, kills):
            break
        kills += 1
    done = subprocess.run(command, cwd="/", env=environment, check=False)
    seconds = time.monotonic() - begun
    snapshot = folder / "hf/hub/models--bench--model/snapshots" / commit
    whole = done.returncode == 0 and all(_sha(snapshot / name) == hub.file(REPO, name).sha256 for name in names)
    return {
        "rate": options.rate,
        "files": options.files,
        **_result(hub, names, kills, seconds, whole, _again(hub, names)),
    }


def _quantised(folder: Path, hub: LoopbackHub, options: argparse.Namespace, chance: random.Random) -> dict[str, Any]:
    from random_checkpoints import tiny, write_checkpoint

    config = tiny("chatglm-6b-early", hidden_size=256, inner_hidden_size=1024, num_layers=12)
    names = [path.name for path in write_checkpoint(folder / "made", config, shard_bytes=4_000_000)]
    hub.add(REPO, {path.name: path.read_bytes() for path in (folder / "made").iterdir()})
    command, environment = _command(folder, hub, "--quant", "4")
    begun = time.monotonic()
    subprocess.run(command, cwd="/", env=environment, check=True)
    length = time.monotonic() - begun
    right, again = _copy(folder), []
    shutil.rmtree(folder / "glmchat")
    del hub.requests[:]
    begun = time.monotonic()
    kills = 0
    while kills < options.kills:
        child = subprocess.Popen(command, cwd="/", env=environment, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(chance.uniform(0, length))
        if not _killed(child, kills):
            shutil.rmtree(folder / "glmchat")  # it was done: from the start again
            again += _again(hub, names)
            del hub.requests[:]
            continue
        kills += 1
    done = subprocess.run(command, cwd="/", env=environment, check=False)
    seconds = time.monotonic() - begun
    whole = done.returncode == 0 and _copy(folder) == right
    return {"quant": 4, **_result(hub, names, kills, seconds, whole, [*again, *_again(hub, names)])}


def _command(folder: Path, hub: LoopbackHub, *more: str) -> tuple[list[str], dict[str, str]]:
    environment = {**os.environ, "GLMCHAT_HOME": f"{folder}/glmchat", "HF_HOME": f"{folder}/hf"}
    environment = {name: value for name, value in environment.items() if name not in ("HF_HUB_CACHE", "HF_ENDPOINT")}
    command = [sys.executable, "-P", "-m", "glmchat", "pull", REPO, "--quiet", "--endpoint", hub.url, *more]
    return command, environment


def _killed(child: subprocess.Popen[bytes], kills: int) -> bool:
    if child.poll() is not None:
        print(f"the pull was done after {kills} kills (exit {child.returncode})", file=sys.stderr)
        return False
    child.kill()
    child.wait()
    return True


def _copy(folder: Path) -> dict[str, str]:
    """The weight files of the finished copy with their hashes; nothing else may be left of it."""
    (place,) = (folder / "glmchat").rglob("*-int4*")
    return {path.name: _sha(path) for path in place.glob("*.safetensors")}


def _result(
    hub: LoopbackHub, names: list[str], kills: int, seconds: float, whole: bool, again: list[int]
) -> dict[str, Any]:
    return {
        "bytes": sum(len(hub.file(REPO, name).content) for name in names), "kills": kills, "whole": whole,
        "bytes_again": sum(again), "bytes_again_most": max(again, default=0), "seconds": round(seconds, 1),
    }  # fmt: skip


def _again(hub: LoopbackHub, names: list[str]) -> list[int]:
    return [cost for name in names for cost in _costs(hub, name)]


def _costs(hub: LoopbackHub, name: str) -> list[int]:
    """For each request after the first: bytes that had been sent already."""
    costs, reached = [], None
    for request in hub.requests_for(name):
        start = request.range[0] if request.range else 0
        if reached is not None:
            costs.append(max(0, reached - start))
        reached = start + request.sent
    return costs


def _sha(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
