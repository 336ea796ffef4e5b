"""What adapters cost: decode speed with and without one, and the time of a switch.

    python benchmarks/adapters.py MODEL [--rank 8] [--quant 4] [--threads N] [--targets q_proj,v_proj]
    python benchmarks/adapters.py DIR --make chatglm3-6b       # random INT4 weights in the shape of a published model
    python benchmarks/adapters.py DIR --targets query_key_value --tokens 8 --rounds 3

MODEL is a folder or a GGUF file. The adapter is random; speed does not depend on what its numbers are. Base and adapter
take turns, answer by answer, so that a machine that changes its mind about its clock changes it for both. `--make`
quantises one random layer and writes it under the names of all of them: the shape is whole, 4 GB of disk, and the
memory it takes is a layer's.
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

import psutil
import torch
from random_checkpoints import CONFIGS, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

from glmchat.checkpoints.recipe import Recipe
from glmchat.core.messages import Sampling
from glmchat.engine import Engine
from glmchat.engine.adapters.attach import modules_of
from glmchat.engine.adapters.lora import measures
from glmchat.engine.quantize.linear import QuantLinear
from glmchat.engine.quantize.plan import plan_quantise
from glmchat.engine.quantize.quantiser import execute


def make(folder: Path, name: str) -> None:
    """A quantised checkpoint of the published shape `name`; every layer holds the same random numbers."""
    config = dict(CONFIGS[name])
    layers = config["num_layers"]
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        write_checkpoint(Path(work) / "dense", {**config, "num_layers": 1}, kind="safetensors")
        execute(plan_quantise(Path(work) / "dense", Path(work) / "packed", Recipe(4)))
        folder.mkdir()
        written = json.loads((Path(work) / "packed" / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**written, "num_layers": layers}))
        table = {}
        for file in sorted((Path(work) / "packed").glob("*.safetensors")):
            tensors = load_file(file)
            first = {name: t for name, t in tensors.items() if ".layers.0." in name}
            rest = {name: t for name, t in tensors.items() if name not in first}
            for number in range(layers):
                here = {name.replace(".layers.0.", f".layers.{number}."): t for name, t in first.items()}
                part = f"{file.stem}-{number:02}.safetensors"
                save_file({**here, **(rest if number == 0 else {})}, folder / part)
                table |= dict.fromkeys([*here, *(rest if number == 0 else {})], part)
    index = {"metadata": {}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def resident() -> int:
    """Bytes that are this process's own: pages of mapped files are left out, which come and go."""
    return int(psutil.Process().memory_full_info().uss)


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


def tokens_per_second(engine: Engine, ids: list[int], tokens: int) -> float:
    sampling = Sampling(temperature=0, max_tokens=tokens, ignore_eos=True)
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
    parser.add_argument("--make", metavar="SHAPE", choices=[n for n in CONFIGS if "glm" in n])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--quant", type=int, choices=(4, 8))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--targets", default="q_proj,v_proj")
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.model, arguments.make)
        return
    engine = Engine.load(
        arguments.model, quant=arguments.quant, threads=arguments.threads, device=arguments.device, context=2048
    )
    family_prompt = {"chatglm": [5, 60, engine.spec.extra.get("gmask_id", 5), engine.spec.bos_id or 1]}
    ids = family_prompt.get(engine.family, [5, 60, 33, 7])
    with tempfile.TemporaryDirectory() as folder:
        path = write_adapter(engine, Path(folder) / "adapter", arguments.targets.split(","), arguments.rank)
        attach = milliseconds(lambda: engine.attach(path, "random"))
    tokens_per_second(engine, ids, 2)
    places = {tensor.data_ptr() for tensor in (*engine.model.parameters(), *engine.model.buffers())}
    before = resident()
    speeds: dict[bool, list[float]] = {False: [], True: []}
    switches: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(arguments.rounds):
        for on in (False, True):
            switches[on].append(milliseconds(lambda on=on: engine.activate({"random": 1.0} if on else {})))
            speeds[on].append(tokens_per_second(engine, ids, arguments.tokens))
    engine.activate({"random": 1.0})
    copied = {t.data_ptr() for t in (*engine.model.parameters(), *engine.model.buffers())} != places
    grown = resident() - before
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
        "base_copied": copied,
        "grown_bytes": grown,  # of the process, with the adapter active at the end
        "base_tokens_per_second": round(base, 2),
        "adapter_tokens_per_second": round(adapted, 2),
        "share": round(adapted / base, 3),
        "memory": engine.memory(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
