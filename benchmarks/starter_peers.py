"""The starter model beside its peers, in one run: glmchat, llama-cpp-python on the same file, transformers' generate.

Each program decodes in a process of its own, in turn, for several rounds; the best round of each counts, since
everything else on the machine only slows. Prompt and number of tokens are the same, everybody decodes greedily.

    python benchmarks/starter_peers.py [--peers VENV] [--rounds 3] [--threads 1 2] [--skip-transformers]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / ".test-cache" / "data" / "models" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT, TOKENS = 512, 128

OURS = """
import json, sys, time
started = time.perf_counter()
from glmchat.engine import Engine, Sampling
from glmchat.engine import engine as _
imported = time.perf_counter()
engine = Engine.load(sys.argv[1], threads=int(sys.argv[2]))
ids = [(7 * i) % 20000 + 100 for i in range(int(sys.argv[3]))]
warm = time.perf_counter()
steps = engine.generate(ids, Sampling(temperature=0, max_tokens=int(sys.argv[4]), ignore_eos=True))
next(steps)
first = time.perf_counter()
count = sum(1 for _ in steps)
ended = time.perf_counter()
engine.close()
print(json.dumps({"prefill": len(ids) / (first - warm), "decode": count / (ended - first),
                  "load": engine.load_seconds, "import": imported - started}))
"""
LLAMA = """
import json, sys, time
from llama_cpp import Llama
started = time.perf_counter()
model = Llama(sys.argv[1], n_ctx=2048, n_threads=int(sys.argv[2]), n_threads_batch=int(sys.argv[2]), verbose=False)
load = time.perf_counter() - started
ids = [(7 * i) % 20000 + 100 for i in range(int(sys.argv[3]))]
warm = time.perf_counter()
model.eval(ids)
token = model.sample(temp=0)
first = time.perf_counter()
count = int(sys.argv[4]) - 1
for _ in range(count):
    model.eval([token])
    token = model.sample(temp=0)
ended = time.perf_counter()
print(json.dumps({"prefill": len(ids) / (first - warm), "decode": count / (ended - first), "load": load}))
"""
TRANSFORMERS = """
import json, os, sys, time
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[2]))
started = time.perf_counter()
folder, name = os.path.split(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
load = time.perf_counter() - started
ids = torch.tensor([[(7 * i) % 20000 + 100 for i in range(int(sys.argv[3]))]])
def run(n):
    started = time.perf_counter()
    model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False)
    return time.perf_counter() - started
one = run(1)
many = run(int(sys.argv[4]))
print(json.dumps({"prefill": ids.shape[1] / one, "decode": (int(sys.argv[4]) - 1) / (many - one), "load": load}))
"""


def measure(python: Path, code: str, threads: int) -> dict[str, float]:
    """One process: tokens per second and seconds."""
    command = [str(python), "-P", "-c", code, str(MODEL), str(threads), str(PROMPT), str(TOKENS)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{python}: {done.stderr[-800:]}")
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, default=ROOT / ".test-cache" / "peers-venv")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--skip-transformers", action="store_true")
    given = parser.parse_args()
    here = Path(sys.executable)
    print(f"prompt {PROMPT} tokens, {TOKENS} decoded; best of {given.rounds} rounds, programs in turn")
    for threads in given.threads:
        best: dict[str, dict[str, float]] = {}
        for round_number in range(given.rounds):
            programs = {"glmchat": (here, OURS), "llama-cpp-python": (given.peers / "bin" / "python", LLAMA)}
            if not given.skip_transformers and round_number == 0:
                programs["transformers"] = (here, TRANSFORMERS)
            for name, (python, code) in programs.items():
                got = measure(python, code, threads)
                kept = best.setdefault(name, got)
                for key, value in got.items():
                    kept[key] = min(kept[key], value) if key in ("load", "import") else max(kept[key], value)
        for name, got in best.items():
            print(
                f"{threads} thread(s)  {name:18} prefill {got['prefill']:7.1f} tok/s  "
                f"decode {got['decode']:6.1f} tok/s  load {got['load']:5.2f} s"
            )
        ours = best["glmchat"]
        for name, got in best.items():
            if name != "glmchat":
                print(
                    f"{threads} thread(s)  glmchat / {name}: prefill {ours['prefill'] / got['prefill']:.2f}, "
                    f"decode {ours['decode'] / got['decode']:.2f}"
                )


if __name__ == "__main__":
    main()
