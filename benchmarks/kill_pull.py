"""Kill `glmchat pull` with SIGKILL at random moments, again and again; what does it cost, and is the result whole?

    python benchmarks/kill_pull.py                    # 50 kills of a 200 MB pull at 25 MB/s
    python benchmarks/kill_pull.py --kills 10 --files 4

A loopback hub (SO_SNDBUF 64 kB) counts what it sends. After each kill the next run asks from some offset on; what lies
between that offset and the last byte sent before was paid twice. At most 1 MB per file and kill is the promise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "hub"))

from loopback_hub import LoopbackHub, Synthetic

PROMISE = 1_000_000  # bytes per file and kill


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--size", type=int, default=200_000_000, help="bytes in all")
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--rate", type=float, default=25_000_000, help="bytes per second in all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="kill-pull-") as folder, LoopbackHub(rate=options.rate) as hub:
        names = [f"model-{i + 1:05d}-of-{options.files:05d}.safetensors" for i in range(options.files)]
        shards = {name: Synthetic(options.size // options.files, seed=i) for i, name in enumerate(names)}
        commit = hub.add("bench/model", {"config.json": b'{"model_type": "gpt2"}', **shards})
        environment = {**os.environ, "GLMCHAT_HOME": f"{folder}/glmchat", "HF_HOME": f"{folder}/hf"}
        environment = {
            name: value for name, value in environment.items() if name not in ("HF_HUB_CACHE", "HF_ENDPOINT")
        }
        command = [sys.executable, "-P", "-m", "glmchat", "pull", "bench/model", "--quiet", "--endpoint", hub.url]
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
            if child.poll() is not None:
                print(f"the pull was done after {kills} kills (exit {child.returncode})", file=sys.stderr)
                break
            child.kill()
            child.wait()
            kills += 1
        done = subprocess.run(command, cwd="/", env=environment, check=False)
        seconds = time.monotonic() - begun
        snapshot = Path(folder) / "hf/hub/models--bench--model/snapshots" / commit
        whole = done.returncode == 0 and all(
            _sha(snapshot / name) == hub.file("bench/model", name).sha256 for name in names
        )
        again = [cost for name in names for cost in _costs(hub, name)]
        total = sum(hub.sent_for(name) for name in names)
        result = {
            "kills": kills, "bytes": options.size, "files": options.files, "rate": options.rate, "whole": whole,
            "requests": len(again) + options.files, "bytes_sent": total, "bytes_again": sum(again),
            "bytes_again_most": max(again, default=0), "seconds": round(seconds, 1),
        }  # fmt: skip
        print(json.dumps(result))
        return 0 if whole and max(again, default=0) <= PROMISE else 1


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
