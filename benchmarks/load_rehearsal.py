"""Loads a checkpoint in a process of its own and reports what it took: seconds, peak memory, and what it was made of.

    python benchmarks/random_checkpoints.py chatglm-6b-early /big/disk/early
    python benchmarks/load_rehearsal.py /big/disk/early --dtype bfloat16

The promise is that the peak stays under the weights in memory plus one shard (pages of the shard that is being read
count, as they are mapped) plus what Python and torch themselves take.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def measure(folder: Path, dtype: str) -> dict[str, float]:
    """Called in the child: nothing else has been loaded there."""
    from glmchat.engine import Engine

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.perf_counter()
    engine = Engine.load(folder, dtype=dtype, context=512)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "before": before, "peak": peak, "weights": engine.memory()["weights"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(given.folder, given.dtype)))
        return
    command = [sys.executable, "-P", __file__, str(given.folder), "--dtype", given.dtype, "--child"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    shards = [p.stat().st_size for p in given.folder.iterdir() if p.suffix in (".bin", ".safetensors")]
    allowed = found["weights"] + max(shards) + found["before"]
    found |= {"largest_shard": max(shards), "allowed": allowed, "within": found["peak"] <= allowed}
    print(json.dumps(found, indent=2))
    sys.exit(not found["within"])


if __name__ == "__main__":
    main()
