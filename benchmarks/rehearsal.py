"""The whole way of a first-generation ChatGLM-6B, with random weights: serve, pull, verify, quantize, run.

    python benchmarks/rehearsal.py --folder /big/disk           # full size: 13.7 GB
    python benchmarks/rehearsal.py --folder /tmp --layers 1     # 2.9 GB, to see that the script works

Names, shapes and shards are the released ones and the tokenizer is real (../shared/tokenizers); only the numbers are
noise, so the answer is babble and everything else is as it will be. Full size is refused below 20 GB of free memory or
40 GB of free disk (exit 4). One row per step: seconds, peak memory, bytes on disk afterwards, bytes received.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "hub"))

from loopback_hub import LoopbackHub, OnDisk  # noqa: E402

TOKENIZER = ROOT.parent / "shared" / "tokenizers" / "chatglm-6b-early"
SHARD_BYTES = 1_900_000_000
LAYER_BYTES, REST_BYTES = 402_700_000, 2_470_000_000  # float16; embedding and head are the rest
REPO = "rehearsal/chatglm-6b"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if not TOKENIZER.is_dir():
        print(f"the real tokenizer is not at {TOKENIZER}", file=sys.stderr)
        return 1
    size = REST_BYTES + options.layers * LAYER_BYTES
    memory, disk = (20e9, 40e9) if options.layers >= 28 else (1.5 * size, 3 * size)
    if (free := _free_memory()) < memory or shutil.disk_usage(options.folder).free < disk:
        here = shutil.disk_usage(options.folder).free
        print(
            f"needs {memory / 1e9:.0f} GB of free memory and {disk / 1e9:.0f} GB of disk; "
            f"{free / 1e9:.1f} and {here / 1e9:.1f} GB are free",
            file=sys.stderr,
        )
        return 4
    with tempfile.TemporaryDirectory(prefix="rehearsal-", dir=options.folder) as name:
        for row in _steps(Path(name), options.layers, options.threads):
            print(json.dumps(row), flush=True)
            if row.get("exit"):
                return 1
    return 0


def _steps(folder: Path, layers: int, threads: int | None) -> Any:
    python = [sys.executable, "-P"]
    home = folder / "home"
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "GLMCHAT_", "PYTHONPATH"))}
    environment |= {"GLMCHAT_HOME": str(home / "glmchat"), "HF_HOME": str(home / "hf"), "GLMCHAT_LANG": "en"}
    made = folder / "made"
    writer = [
        sys.executable, str(ROOT / "benchmarks/random_checkpoints.py"), "chatglm-6b-early", str(made),
        "--layers", str(layers), "--shard-bytes", str(SHARD_BYTES),
    ]  # fmt: skip
    yield _timed("write random weights", writer, environment, made)
    for path in TOKENIZER.iterdir():
        if path.name in (
            "ice_text.model",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "generation_config.json",
        ):
            shutil.copy(path, made)
    with LoopbackHub() as hub:
        files = {path.name: OnDisk(path) for path in sorted(made.iterdir())}
        hub.add(REPO, files)
        command = [*python, "-m", "glmchat", "pull", REPO, "--quiet", "--endpoint", hub.url]
        row = _timed("pull", command, environment, home)
        yield row | {
            "bytes_received": sum(hub.sent_for(name) for name in files),
            "shards": len(list(made.glob("*.bin"))),
        }
    for path in made.iterdir():  # what was pulled is the only copy now; the disk need not hold both
        path.unlink()
    on = [] if threads is None else ["--threads", str(threads)]
    ask = ["--temp", "0", "--ignore-eos", "--max-tokens", "32"]
    for label, arguments in (
        ("verify", ["verify", REPO]),
        ("quantize --bits 4", ["quantize", REPO, "--bits", "4", "--quiet"]),
        ("run --quant 4", ["run", REPO, "你好", "--quant", "4", "--json", *ask, *on]),
    ):
        row = _timed(label, [*python, "-m", "glmchat", *arguments], environment, home)
        lines = [json.loads(line) for line in row.pop("stdout").splitlines() if line.startswith("{")]
        if label.startswith("run") and lines:
            row["answer"] = lines[-1]
        yield row


def _timed(label: str, command: list[str], environment: dict[str, str], disk: Path) -> dict[str, Any]:
    """One step in a process of its own; memory is the largest resident set of it and of its children."""
    begun = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(command, cwd="/", env=environment, stdout=out, stderr=errors)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - begun
        out.seek(0)
        errors.seek(0)
        said, stdout = errors.read().decode(errors="replace"), out.read().decode(errors="replace")
    kept = sum(p.lstat().st_size for p in disk.rglob("*") if p.is_file() and not p.is_symlink())
    row: dict[str, Any] = {
        "step": label, "exit": child.returncode, "seconds": round(seconds, 1),
        "peak_gb": round(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9, 2),
        "disk_gb": round(kept / 1e9, 2),
    }  # fmt: skip
    if child.returncode:
        row["error"] = said[-600:]
    if label not in ("write random weights", "pull"):
        row["stdout"] = stdout
    return row


def _free_memory() -> float:
    import psutil

    return float(psutil.virtual_memory().available)


if __name__ == "__main__":
    sys.exit(main())
