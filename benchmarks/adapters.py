"""What adapters cost: decode speed with and without one, and the time of a switch.

    python benchmarks/adapters.py MODEL [--rank 8] [--quant 4] [--threads N] [--targets q_proj,v_proj]

MODEL is a folder or a GGUF file. The adapter is random; speed does not depend on what its numbers are. Base and adapter
take turns, answer by answer, so that a machine that changes its mind about its clock changes it for both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from glmchat.core.messages import Sampling
from glmchat.engine import Engine
from glmchat.engine.adapters.attach import modules_of
from glmchat.engine.adapters.lora import measures
from glmchat.engine.quantize.linear import QuantLinear

TOKENS = 48
ROUNDS = 7


def write_adapter(engine: Engine, folder: Path, targets: list[str], rank: int) -> Path:
    """A random LoRA for every layer whose name ends in one of `targets`."""
    tensors = {}
    for name, module in modules_of(engine.model).items():
        if isinstance(module, nn.Linear | QuantLinear) and name.rpartition(".")[2] in targets:
            out, width = measures(module)
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, width) * 0.01
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out, rank) * 0.01
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def tokens_per_second(engine: Engine, ids: list[int]) -> float:
    sampling = Sampling(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    steps = engine.generate(ids, sampling)
    next(steps)  # the prompt is read
    started = time.perf_counter()
    count = sum(1 for _ in steps)
    return count / (time.perf_counter() - started)


def milliseconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--quant", type=int, choices=(4, 8))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--targets", default="q_proj,v_proj")
    arguments = parser.parse_args()
    engine = Engine.load(
        arguments.model, quant=arguments.quant, threads=arguments.threads, device=arguments.device, context=2048
    )
    family_prompt = {"chatglm": [5, 60, engine.spec.extra.get("gmask_id", 5), engine.spec.bos_id or 1]}
    ids = family_prompt.get(engine.family, [5, 60, 33, 7])
    with tempfile.TemporaryDirectory() as folder:
        path = write_adapter(engine, Path(folder) / "adapter", arguments.targets.split(","), arguments.rank)
        attach = milliseconds(lambda: engine.attach(path, "random"))
    speeds: dict[bool, list[float]] = {False: [], True: []}
    switches: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for on in (False, True):
            switches[on].append(milliseconds(lambda on=on: engine.activate({"random": 1.0} if on else {})))
            speeds[on].append(tokens_per_second(engine, ids))
    base, adapted = (statistics.median(speeds[on]) for on in (False, True))
    result = {
        "model": arguments.model.name,
        "family": engine.family,
        "threads": engine.threads,
        "device": engine.device,
        "dtype": str(engine.dtype),
        "rank": arguments.rank,
        "targets": arguments.targets,
        "attach_ms": round(attach, 1),
        "switch_on_ms": round(statistics.median(switches[True]), 1),
        "switch_off_ms": round(statistics.median(switches[False]), 1),
        "base_tokens_per_second": round(base, 2),
        "adapter_tokens_per_second": round(adapted, 2),
        "share": round(adapted / base, 3),
        "memory": engine.memory(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
