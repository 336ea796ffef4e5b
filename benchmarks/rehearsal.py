"""The whole way of a first-generation ChatGLM-6B, with random weights, from a hub to a conversation, one row a step.

    python benchmarks/rehearsal.py --folder /big/disk           # full size: 13.7 GB
    python benchmarks/rehearsal.py --folder /tmp --layers 1     # 2.9 GB, to see that the script works
    python benchmarks/rehearsal.py --folder /big/disk --arrive /small/disk     # `pull --quant 4` onto another disk

Pull, verify, quantize, run at four bits, run with an adapter, replay that answer. With --arrive the two steps pull and
quantize are one, and the store is on a disk that cannot hold the original (9 GB for the full size: a tmpfs, or a file
with a file system in it, mounted there).

Names, shapes and shards are the released ones and the tokenizer is real (../shared/tokenizers); only the numbers are
noise, so the answer is babble and everything else is as it will be. The adapter is a LoRA of rank 8, noise as well.
Full size is refused below 20 GB of free memory or 40 GB of free disk (exit 4). Memory is the largest process of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "hub"))

from loopback_hub import LoopbackHub, OnDisk  # noqa: E402

TOKENIZER = ROOT.parent / "shared" / "tokenizers" / "chatglm-6b-early"
TOKENIZER_FILES = ("ice_text.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
SHARD_BYTES = 1_900_000_000
LAYER_BYTES, REST_BYTES = 402_700_000, 2_470_000_000  # float16; embedding and head are the rest
REPO = "rehearsal/chatglm-6b"
Json = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="holds what the hub serves")
    parser.add_argument("--arrive", type=Path, help="a small disk for the store: quantise while the model arrives")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if not TOKENIZER.is_dir():
        print(f"the real tokenizer is not at {TOKENIZER}", file=sys.stderr)
        return 1
    size = REST_BYTES + options.layers * LAYER_BYTES
    memory, disk = (20e9, 40e9) if options.layers >= 28 else (1.5 * size, 3 * size)
    if options.arrive:
        memory, disk = 0.9 * size, 1.1 * size
    free, here = _free_memory(), shutil.disk_usage(options.folder).free
    if free < memory or here < disk:
        print(
            f"needs {memory / 1e9:.0f} GB of free memory and {disk / 1e9:.0f} GB of disk; "
            f"{free / 1e9:.1f} and {here / 1e9:.1f} GB are free",
            file=sys.stderr,
        )
        return 4
    print("| step | seconds | peak memory GB | disk GB | |\n|---|---|---|---|---|")
    with (
        tempfile.TemporaryDirectory(prefix="rehearsal-", dir=options.folder) as name,
        tempfile.TemporaryDirectory(prefix="rehearsal-", dir=options.arrive or options.folder) as store,
    ):
        return _Rehearsal(Path(name), Path(store), options.layers, options.threads).go(arriving=bool(options.arrive))


_LORA = """
import json, pathlib, sys, torch
from safetensors.torch import save_file
place, layers = pathlib.Path(sys.argv[1]), int(sys.argv[2])
place.mkdir()
config = {"peft_type": "LORA", "r": 8, "lora_alpha": 32, "target_modules": ["query_key_value"], "bias": "none"}
(place / "adapter_config.json").write_text(json.dumps(config))
noise, tensors = torch.Generator().manual_seed(1), {}
for layer in range(layers):
    stem = f"base_model.model.transformer.layers.{layer}.attention.query_key_value"
    tensors[stem + ".lora_A.weight"] = torch.randn(8, 4096, generator=noise) / 64
    tensors[stem + ".lora_B.weight"] = torch.randn(12288, 8, generator=noise) / 64
save_file(tensors, place / "adapter_model.safetensors")
"""


class _Failed(Exception):
    pass


@dataclass
class _Rehearsal:
    folder: Path
    store: Path  # GLMCHAT_HOME and HF_HOME
    layers: int
    threads: int | None
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        kept = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "GLMCHAT_", "PYTHONPATH"))}
        home = {"GLMCHAT_HOME": str(self.store / "glmchat"), "HF_HOME": str(self.store / "hf"), "GLMCHAT_LANG": "en"}
        self.environment = kept | home

    def go(self, *, arriving: bool) -> int:
        try:
            self._write_weights()
            self._pull(*(["--quant", "4"] if arriving else []))
            shutil.rmtree(self.folder / "made")  # what was pulled is the only copy now; the disk need not hold both
            self._step("verify", ["verify", f"{REPO}:int4" if arriving else REPO])
            if not arriving:
                self._step("quantize --bits 4", ["quantize", REPO, "--bits", "4", "--quiet"])
            self._run("run --quant 4")
            self._adapter()
            self._run("run --quant 4 --adapter", "--adapter", "noise")
            self._step("replay", ["replay", "2", "--json"], lambda lines: f"identical: {lines[-1]['identical']}")
        except _Failed as failure:
            print(failure, file=sys.stderr)
            return 1
        return 0

    def _write_weights(self) -> None:
        made = self.folder / "made"
        writer = [
            sys.executable, str(ROOT / "benchmarks/random_checkpoints.py"), "chatglm-6b-early", str(made),
            "--layers", str(self.layers), "--shard-bytes", str(SHARD_BYTES),
        ]  # fmt: skip
        self._timed("write random weights", writer, lambda _: f"{_size(made) / 1e9:.2f} GB for the hub to serve")
        for file in TOKENIZER_FILES:
            shutil.copy(TOKENIZER / file, made)

    def _pull(self, *more: str) -> None:
        with LoopbackHub() as hub, _Watched(self.store) as disk:
            files = {path.name: OnDisk(path) for path in sorted((self.folder / "made").iterdir())}
            hub.add(REPO, files)
            shards = sum(name.endswith(".bin") for name in files)
            self._step(
                " ".join(["pull", *more]),
                ["pull", REPO, "--quiet", "--endpoint", hub.url, *more],
                lambda _: f"{sum(hub.sent_for(name) for name in files) / 1e9:.2f} GB received, {shards} shards; {disk}",
            )

    def _run(self, label: str, *more: str) -> None:
        on = [] if self.threads is None else ["--threads", str(self.threads)]
        ask = ["--temp", "0.9", "--seed", "7", "--max-tokens", "16", *on]
        self._step(label, ["run", REPO, "你好", "--quant", "4", "--json", *ask, *more], _answer)

    def _adapter(self) -> None:
        """A LoRA in PEFT's layout, brought into the store."""
        place = self.folder / "noise"
        self._timed("write an adapter", [sys.executable, "-c", _LORA, str(place), str(self.layers)])
        self._step("adapters add", ["adapters", "add", str(place), "--name", "noise"])

    def _step(self, label: str, arguments: list[str], told: Callable[[list[Json]], str] | None = None) -> None:
        self._timed(label, [sys.executable, "-P", "-m", "glmchat", *arguments], told)

    def _timed(self, label: str, command: list[str], told: Callable[[list[Json]], str] | None = None) -> None:
        """One step in a process of its own, and its row. Raises _Failed with what it said."""
        begun = time.monotonic()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            child = subprocess.Popen(command, cwd="/", env=self.environment, stdout=out, stderr=errors)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.monotonic() - begun
            out.seek(0)
            errors.seek(0)
            said, lines = errors.read().decode(errors="replace"), out.read().decode(errors="replace").splitlines()
        if child.returncode:
            raise _Failed(f"{label} ended with {child.returncode}: {said[-800:]}")
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
        note = told([json.loads(line) for line in lines if line.startswith("{")]) if told else ""
        print(f"| {label} | {seconds:.1f} | {peak:.2f} | {_size(self.store) / 1e9:.2f} | {note} |", flush=True)


class _Watched:
    """The most that was taken on the disk of `folder` while this is open; only a disk of one's own shows it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._most, self._done = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.05):
            self._most = max(self._most, shutil.disk_usage(self._folder).used)

    def __str__(self) -> str:
        disk = shutil.disk_usage(self._folder).total
        return f"at most {self._most / 1e9:.2f} GB of the disk's {disk / 1e9:.2f} taken"


def _answer(lines: list[Json]) -> str:
    end = lines[-1]
    return (
        f"loaded in {end['load_seconds']:.1f} s; {end['completion_tokens']} tokens, "
        f"{end['prefill_tokens_per_second']:.1f} and {end['decode_tokens_per_second']:.2f} tokens/s"
    )


def _size(folder: Path) -> int:
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def _free_memory() -> float:
    import psutil

    return float(psutil.virtual_memory().available)


if __name__ == "__main__":
    sys.exit(main())
