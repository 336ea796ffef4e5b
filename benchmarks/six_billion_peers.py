"""Decode and prefill of 6B models at 4 or 8 bits beside llama.cpp and chatglm.cpp, in one run, programs in turn.

    benchmarks/install_peers.sh --with-chatglm-cpp
    python benchmarks/six_billion_peers.py --folder /big/disk [--bits 4 8] [--models chatglm-6b chatglm3-6b]

Weights are random, shapes and bits are real: 28 layers, the released vocabulary. glmchat's copy is quantised by
`glmchat quantize --fast` from a random 16-bit checkpoint (12.5 GB of disk while it is made); the peers' files are
written block by block (peer_formats.py). llama.cpp knows no first-generation ChatGLM-6B. Each program runs in a process
of its own, greedily, with the same number of tokens; the best round of each counts. Prefill is measured on a prompt
that follows a short one, so that pages are in memory; "of bus" is the weight bytes read per second while decoding over
what this machine's memory gave to the same threads.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOKENIZERS = ROOT.parent / "shared" / "tokenizers"
VOCABULARY = {
    "chatglm-6b": TOKENIZERS / "chatglm-6b" / "ice_text.model",
    "chatglm3-6b": TOKENIZERS / "chatglm3" / "tokenizer.model",
}

OURS = """
import json, resource, sys, time
from glmchat.engine import Engine, Sampling
from glmchat.jobs.bench import read_bandwidth
threads, prompt, tokens, *ending = map(int, sys.argv[2:])
started = time.perf_counter()
engine = Engine.load(sys.argv[1], threads=threads, context=prompt + tokens + 64)
load = time.perf_counter() - started
list(engine.generate([100] * 16 + ending, Sampling(temperature=0, max_tokens=2, ignore_eos=True)))
ids = [(7 * i) % 20000 + 100 for i in range(prompt - len(ending))] + ending
warm = time.perf_counter()
steps = engine.generate(ids, Sampling(temperature=0, max_tokens=tokens, ignore_eos=True))
next(steps)
first = time.perf_counter()
count = sum(1 for _ in steps)
ended = time.perf_counter()
memory = engine.memory()
bus = read_bandwidth(threads)
print(json.dumps({"prefill": prompt / (first - warm), "decode": count / (ended - first), "load": load,
                  "of bus": memory["weights"] * count / (ended - first) / bus,
                  "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}))
"""
LLAMA = """
import json, resource, sys, time
import numpy as np
from llama_cpp import Llama
threads, prompt, tokens, *ending = map(int, sys.argv[2:])
started = time.perf_counter()
model = Llama(sys.argv[1], n_ctx=prompt + tokens + 64, n_threads=threads, n_threads_batch=threads, verbose=False)
load = time.perf_counter() - started
model.eval([100] * 16)
model.reset()
ids = [(7 * i) % 20000 + 100 for i in range(prompt - len(ending))] + ending
warm = time.perf_counter()
model.eval(ids)
token = model.sample(temp=0)
first = time.perf_counter()
for _ in range(tokens - 1):
    model.eval([token])
    token = model.sample(temp=0)
ended = time.perf_counter()
print(json.dumps({"prefill": prompt / (first - warm), "decode": (tokens - 1) / (ended - first), "load": load,
                  "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}))
"""
CHATGLM = """
import json, resource, sys, time
from chatglm_cpp import Pipeline, _C
threads, prompt, tokens, *ending = map(int, sys.argv[2:])
started = time.perf_counter()
pipeline = Pipeline(sys.argv[1], max_length=prompt + tokens + 64)
load = time.perf_counter() - started
greedy = _C.GenerationConfig(max_length=prompt + tokens + 64, do_sample=False)
pipeline.model.generate_next_token([100] * 16, None, greedy, 0, 16)
ids = [(7 * i) % 20000 + 100 for i in range(prompt - len(ending))] + ending
warm = time.perf_counter()
token = pipeline.model.generate_next_token(ids, None, greedy, 0, prompt)
first = time.perf_counter()
for _ in range(tokens - 1):
    past = len(ids)
    ids.append(token)
    token = pipeline.model.generate_next_token(ids, None, greedy, past, prompt)
ended = time.perf_counter()
print(json.dumps({"prefill": prompt / (first - warm), "decode": (tokens - 1) / (ended - first), "load": load,
                  "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--peers", type=Path, default=ROOT / ".test-cache" / "peers-venv")
    parser.add_argument("--bits", type=int, nargs="*", choices=(4, 8), default=[4, 8])
    parser.add_argument("--models", nargs="*", choices=sorted(VOCABULARY), default=sorted(VOCABULARY))
    parser.add_argument("--layers", type=int, default=28, help="fewer, to see that the script works")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="keep the files here and use those that are here already")
    given = parser.parse_args()
    kept = given.keep or Path(tempfile.mkdtemp(prefix="peers-", dir=given.folder))
    try:
        for model in given.models:
            for bits in given.bits:
                _compare(kept, model, bits, given)
    finally:
        if given.keep is None:
            shutil.rmtree(kept, ignore_errors=True)


def _compare(kept: Path, model: str, bits: int, given: argparse.Namespace) -> None:
    from peer_formats import write_chatglm_cpp, write_gguf
    from random_checkpoints import CONFIGS

    from glmchat.chat.engine_process import engine_environment

    config = CONFIGS[model] | {"num_layers": given.layers}
    kind = {4: "q4_0", 8: "q8_0"}[bits]
    stem = f"{model}-{given.layers}-{kind}"
    ours, ggml, llama = (kept / f"{stem}-{end}" for end in ("glmchat", "ggml.bin", "llama.gguf"))
    kept.mkdir(parents=True, exist_ok=True)
    if not ours.exists():
        _quantise(kept / f"{model}-{given.layers}-16", model, given.layers, bits, ours)
    if not ggml.exists():
        write_chatglm_cpp(ggml, config, kind, VOCABULARY[model])
    peer = given.peers / "bin" / "python"
    programs = {"glmchat": (Path(sys.executable), OURS, ours), f"chatglm.cpp {kind}": (peer, CHATGLM, ggml)}
    if "ffn_hidden_size" in config:
        if not llama.exists():
            write_gguf(llama, config, kind, "q8_0")
        programs[f"llama.cpp {kind}"] = (peer, LLAMA, llama)
    # A first-generation prompt ends in [gMASK] and <sop>; the others end anyhow.
    ending = (config["gmask_token_id"], config["bos_token_id"]) if "gmask_token_id" in config else ()
    numbers = (given.threads, given.prompt, given.tokens, *ending)
    best: dict[str, dict[str, float]] = {}
    for _ in range(given.rounds):
        for name, (python, code, path) in programs.items():
            command = [str(python), "-P", "-c", code, str(path), *map(str, numbers)]
            environment = os.environ | {"OMP_NUM_THREADS": str(given.threads)}
            if name == "glmchat":
                environment = engine_environment(environment)  # what its engine is started with
            done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                print(f"{name}: failed with {done.returncode}: {done.stderr[-300:].strip()}", flush=True)
                continue
            got: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            before = best.setdefault(name, got)
            for key, value in got.items():
                before[key] = (min if key in ("load", "peak GB") else max)(before[key], value)
    print(
        f"{model}, {given.layers} layers, {bits} bits, {given.threads} threads, "
        f"prompt {given.prompt}, {given.tokens} decoded"
    )
    for name, got in best.items():
        share = f"  of bus {got['of bus']:.2f}" if "of bus" in got else ""
        print(
            f"  {name:18} prefill {got['prefill']:6.1f} tok/s  decode {got['decode']:5.2f} tok/s  "
            f"load {got['load']:5.1f} s  peak {got['peak GB']:.2f} GB{share}"
        )
        if name != "glmchat" and "glmchat" in best:
            own = best["glmchat"]
            print(
                f"  glmchat / {name}: prefill {own['prefill'] / got['prefill']:.2f}, "
                f"decode {own['decode'] / got['decode']:.2f}",
                flush=True,
            )


def _quantise(raw: Path, model: str, layers: int, bits: int, out: Path) -> None:
    """A random 16-bit checkpoint, made small by the command that people use."""
    made = [sys.executable, "-P", str(ROOT / "benchmarks" / "random_checkpoints.py"), model, str(raw)]
    subprocess.run([*made, "--layers", str(layers), "--kind", "safetensors"], check=True, stdout=subprocess.DEVNULL)
    try:
        command = [sys.executable, "-P", "-m", "glmchat", "quantize", str(raw), "--bits", str(bits), "--fast"]
        subprocess.run([*command, "--out", str(out), "--quiet"], cwd="/", check=True)
    finally:
        shutil.rmtree(raw)


if __name__ == "__main__":
    main()
