"""Loads a checkpoint in a process of its own and prints what it took, as a row of a table; exit 1 if it took too much.

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
    config = json.loads((given.folder / "config.json").read_text(encoding="utf-8"))
    layers = config.get("num_layers") or config.get("num_hidden_layers") or config.get("n_layer")
    shards = [p.stat().st_size for p in given.folder.iterdir() if p.suffix in (".bin", ".safetensors")]
    allowed = found["weights"] + max(shards) + found["before"]
    within = found["peak"] <= allowed
    made = f"{config['model_type']}, {layers} layers, {_gb(sum(shards))} in {len(shards)} files, as {given.dtype}"
    took = f"{found['seconds']:.1f} s; weights {_gb(found['weights'])}, peak {_gb(found['peak'])}, "
    took += f"{'within' if within else 'OVER'} the {_gb(allowed)} of weights, largest file and interpreter"
    print(f"| {made} | `python benchmarks/load_rehearsal.py FOLDER --dtype {given.dtype}` | {took} |")
    sys.exit(not within)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
