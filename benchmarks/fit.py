"""What `glmchat show --fit` predicts, and what the engine then holds: the starter model and a random ChatGLM3.

    .venv/bin/python benchmarks/fit.py
    .venv/bin/python benchmarks/fit.py --folder MODEL --quant 0 4 8 --context 2048 8192

Each engine is started twice, because the first start packs the weights and the second maps them; then its context is
filled with one prompt. Measured is the resident memory of the engine and its helper at the end, without the pages of
the checkpoint's own file (Linux: /proc/PID/smaps). One row of JSON each, with the error of the prediction.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
STARTER = ROOT / ".test-cache" / "data" / "models" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENIZER = ROOT.parent / "shared" / "tokenizers" / "chatglm3"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a model; without one, the two named above")
    parser.add_argument("--quant", type=int, nargs="*", default=[0], help="0 (as it is), 4, 8")
    parser.add_argument("--context", type=int, nargs="*", default=[1024, 2048])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="glmchat-fit-") as name:
        os.environ["GLMCHAT_HOME"] = str(Path(name) / "home")
        cases = [(options.folder, options.quant)]
        if options.folder is None:
            cases = [(STARTER, [0])]
            if TOKENIZER.is_dir():
                cases.append((chatglm3(Path(name) / "chatglm3"), [0, 8, 4]))
        for folder, quants in cases:
            for quant in quants:
                for context in options.context:
                    print(json.dumps(compare(folder, quant or None, context)), flush=True)
    return 0


def chatglm3(folder: Path) -> Path:
    """Two layers at the real width, embedding and head whole: 1.9 GB in float16."""
    from random_checkpoints import tiny, write_checkpoint

    measures = {
        "hidden_size": 4096, "num_layers": 2, "num_attention_heads": 32, "kv_channels": 128, "ffn_hidden_size": 13696
    }  # fmt: skip
    write_checkpoint(folder, tiny("chatglm3-6b", **measures), kind="safetensors")
    for file in TOKENIZER.glob("token*"):
        shutil.copy(file, folder)
    return folder


def compare(folder: Path, quant: int | None, context: int) -> dict[str, object]:
    from glmchat.chat.shared_engine import start_engine
    from glmchat.checkpoints import fit
    from glmchat.core.engine_options import EngineOptions
    from glmchat.core.messages import Sampling

    expected = fit.estimate(folder, quant, context=context)
    assert expected is not None
    options = EngineOptions(folder, folder.name, quant=quant, context=context)
    with start_engine(options) as first:
        first.wait_ready()
    with start_engine(options) as process:
        process.wait_ready()
        prompt = [100 + i * 7919 % 1000 for i in range(context - 16)]
        list(process.endpoint.complete(prompt, Sampling(temperature=0, max_tokens=8, ignore_eos=True)))
        helpers = psutil.Process(process.pid).children(recursive=True)
        measured = resident(process.pid, folder) + sum(resident(h.pid, folder) for h in helpers)
    return {
        "model": folder.name,
        "quant": quant,
        "context": context,
        "weights": expected.weights,
        "cache": expected.cache,
        "scratch": expected.scratch,
        "predicted": expected.total,
        "measured": measured,
        "error_percent": round(100 * (expected.total / measured - 1), 1),
    }


def resident(pid: int, folder: Path) -> int:
    """Bytes of a process in memory, without the pages of the model's own files."""
    total, counted = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counted = str(folder) not in line
        elif counted and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


if __name__ == "__main__":
    sys.exit(main())
