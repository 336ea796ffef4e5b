"""The same 2 GB in 8 files from the same loopback server: `glmchat pull` and huggingface_hub's `snapshot_download`.

    python benchmarks/pull_throughput.py              # alternating, three rounds each
    python benchmarks/pull_throughput.py --size 400000000 --rounds 1

Each run is a fresh process with a fresh cache; the server is `glmchat mirror serve` (sendfile) in a process of its own,
so that its own Python does not set the pace. Time is wall clock of the whole process, imports included; peak memory is
the child's maximum resident set. snapshot_download does not check hashes; glmchat does, in the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "hub"))

from loopback_hub import LoopbackHub, Synthetic

SNAPSHOT = "import sys; from huggingface_hub import snapshot_download; snapshot_download('bench/model')"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2_000_000_000, help="bytes in all")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the files go; needs 2.2 times the size")
    options = parser.parse_args()
    base = options.folder or Path(tempfile.gettempdir())
    if shutil.disk_usage(base).free < 2.2 * options.size:
        print(f"{base} has less than {2.2 * options.size / 1e9:.1f} GB free", file=sys.stderr)
        return 4
    python = [sys.executable, "-P"]
    with tempfile.TemporaryDirectory(prefix="pull-throughput-", dir=base) as name:
        folder = Path(name)
        environment = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "GLMCHAT_"))}
        environment |= {
            "GLMCHAT_HOME": f"{folder}/glmchat",
            "HF_HOME": f"{folder}/hf",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        with LoopbackHub() as hub:
            each = options.size // options.files
            shards = {
                f"model-{i + 1:05d}-of-{options.files:05d}.safetensors": Synthetic(each, seed=i)
                for i in range(options.files)
            }
            hub.add("bench/model", {"config.json": b'{"model_type": "gpt2"}', **shards})
            command = [
                *python,
                "-m",
                "glmchat",
                "mirror",
                "bench/model",
                f"{folder}/mirror",
                "-q",
                "--endpoint",
                hub.url,
            ]
            subprocess.run(command, cwd="/", env=environment, check=True)
        serve = [*python, "-m", "glmchat", "mirror", "serve", f"{folder}/mirror", "--port", "0", "--quiet"]
        server = subprocess.Popen(
            serve, cwd="/", env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            assert server.stdout is not None
            environment["HF_ENDPOINT"] = server.stdout.readline().strip()
            runs = {
                "glmchat pull": [*python, "-m", "glmchat", "pull", "bench/model", "--quiet"],
                "snapshot_download": [*python, "-c", SNAPSHOT],
            }
            seen: dict[str, list[tuple[float, float, float]]] = {label: [] for label in runs}
            for _ in range(options.rounds):
                for label, command in runs.items():
                    shutil.rmtree(folder / "hf", ignore_errors=True)
                    shutil.rmtree(folder / "glmchat", ignore_errors=True)
                    seen[label].append(_timed(command, environment))
        finally:
            server.terminate()
            server.wait()
    for label, times in seen.items():
        seconds = statistics.median(t for t, *_ in times)
        result = {
            "what": label, "bytes": options.size, "files": options.files, "seconds": round(seconds, 2),
            "all_seconds": [round(t, 2) for t, *_ in times], "mb_per_second": round(options.size / seconds / 1e6),
            "cpu_seconds": round(statistics.median(c for *_, c in times), 2),
            "peak_mb": round(max(m for _, m, _ in times) / 1e6),
        }  # fmt: skip
        print(json.dumps(result))
    return 0


def _timed(command: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """(seconds, peak resident bytes, processor seconds) of one child."""
    begun = time.monotonic()
    child = subprocess.Popen(command, cwd="/", env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.monotonic() - begun
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{command[3:5]} failed with {child.returncode}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return seconds, peak, usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
