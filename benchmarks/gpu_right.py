"""Right or wrong on a card: recorded answers, random networks against float32, graph against eager, replays, a stop.

Each function is a step of gpu_check.py or a part of one; what it writes are gates, and one WRONG fails the whole run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from typing import Any

import torch
from gpu_run import ROOT, Run, config_of, load, named, prompt_of, random_model, step_of
from safetensors.torch import load_file
from torch import nn

LIMITS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the largest logit
VARIANTS = ("v1_new", "v1_old", "v1_new_int8", "v1_new_ptuning", "v2", "v2_int4", "v2_ptuning", "v3")
FAMILIES = ("chatglm3-6b", "chatglm-6b", "glm-4-9b", "llama-3-8b", "qwen2", "qwen3", "gpt2")
_WRITTEN = {"y", "normed", "maxima", "sums", "partial", "exponents", "result", "logits"}  # by the kernels


def off(found: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference as a share of the largest number; NaN is never small."""
    return float((found.float() - right.float()).abs().max() / right.float().abs().max())


def right(run: Run) -> None:
    if run.kind == "cpu":
        run.skip("goldens", "four layers take a minute in the interpreter; the pretend card reads them")
    elif not (run.reference / "v2" / "golden.json").is_file():
        run.skip("goldens", f"no reference files at {run.reference} (--reference)")
    else:
        goldens(run)
        answers(run)


def goldens(run: Run) -> None:
    """What the original programs computed, recorded with tiny networks of their own format."""
    from glmchat.engine import Sampling

    for name in ("v2_int4", "v2") if run.tiny else VARIANTS:
        folder = run.reference / name
        if not (folder / "golden.json").is_file():
            run.skip(name, "not there")
            continue
        recorded = load_file(folder / "golden.safetensors")
        prompts = [
            p for p in json.loads((folder / "golden.json").read_text())["prompts"] if f"{p}.greedy_ids" in recorded
        ]
        prompts = prompts[:1] if run.tiny else prompts[:4]
        for dtype in ("float32",) if run.tiny else ("float32", "float16", "bfloat16"):
            engine = load(run, folder, dtype=dtype)
            probe, worst, same = recorded["probe_ids"], 0.0, True
            for prompt in prompts:
                ids, greedy = recorded[f"{prompt}.input_ids"][0].tolist(), recorded[f"{prompt}.greedy_ids"].tolist()
                plain = f"{prompt}.plainfwd.logits_probe"  # where the first generation's bare forward differs
                expected = recorded[plain if plain in recorded else f"{prompt}.logits_probe"]
                worst = max(worst, off(engine.logits(ids)[:, probe], expected))
                said = engine.generate(ids, Sampling(temperature=0, max_tokens=len(greedy), ignore_eos=True))
                same &= list(said) == greedy
            run.gate(f"{name} {dtype}: logits", worst, LIMITS[getattr(torch, dtype)])
            if dtype == "float32":
                run.holds(f"{name}: greedy ids are the recorded ones", same)


def answers(run: Run) -> None:
    """A sampled answer comes again with its seed, from its recorded passes, and after a stop in its prompt."""
    from glmchat.engine import Sampling

    engine = load(run, run.reference / "v2")
    ids = [(11 * place) % 900 + 3 for place in range(12 if run.tiny else 600)]
    sampling = Sampling(temperature=0.8, top_p=0.8, seed=7, max_tokens=3 if run.tiny else 48, ignore_eos=True)
    first = list(engine.generate(ids, sampling))
    passes = list(engine.sequence.passes.done)
    engine.sequence.forget()
    run.holds("a sampled answer comes again with its seed", list(engine.generate(ids, sampling)) == first)
    rows = [engine.rebuild([*ids, *first[:-1]], passes).clone() for _ in range(2)]
    run.holds("its passes give the same bits twice", torch.equal(rows[0], rows[1]))
    engine.sequence.forget()
    asked = 0

    def enough() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    stopped = list(engine.generate(ids, sampling, cancelled=enough))
    run.holds("a stop in the prompt is heard", stopped == [])
    run.holds("and the next answer is what it would have been", list(engine.generate(ids, sampling)) == first)


def networks(run: Run) -> None:
    """Two layers of each family at full width, packed and not, through the card's step, 64 given tokens long.

    Families run beside each other: their time is that of Triton's compiler, which uses one core.
    """
    if not run.has_kernels:
        run.skip("networks", f"Triton has no {run.kind}")
        return
    if run.tiny:
        network(run, "qwen3", 4, 1)
        return
    waiting = list(FAMILIES)
    running: dict[str, subprocess.Popen[bytes]] = {}
    most = max(1, min(len(os.sched_getaffinity(0)) // 2, int(run.free() / 12e9)))
    while waiting or running:
        while waiting and len(running) < most:
            name = waiting.pop(0)
            command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--step", f"network {name}",
                       "--out", str(run.out), "--device", run.device, "--seconds", str(run.left)]  # fmt: skip
            running[name] = subprocess.Popen(command)
        for name in [name for name, process in running.items() if process.poll() is not None]:
            if status := running.pop(name).returncode:
                run.row(f"{name} itself", f"status {status}", predicted="ends", verdict="FAILED")
        time.sleep(0.05)


def family(run: Run, name: str) -> None:
    """One family at every width, in a process of its own."""
    for bits in (4, 8, 16):
        if run.left < 2:
            run.skip(f"{name} {bits} bits", "no time left")
        else:
            network(run, name, bits, 64)


def network(run: Run, name: str, bits: int, tokens: int) -> None:
    config = config_of(run, name, layers=2)
    torch.manual_seed(bits)  # a run can be had again
    with torch.inference_mode():
        model = random_model(run, config, bits)
        prompt = prompt_of(config, 8 if run.tiny else 40)
        cache = model.new_cache(len(prompt) + tokens + 8, model.dtype)
        for table in (*cache.keys, *cache.values):
            table.fill_(float("nan"))  # what lies behind the filled part is never read
        model(torch.tensor(prompt, device=run.device), cache, last_only=True)
        step = step_of(model, cache)
        said = [(5 * place) % 140 + 3 for place in range(tokens)]
        reference = _Reference(run, model, config, prompt)
        worst, bits_equal = 0.0, True
        for place, token in enumerate(said):
            _poison(step)
            found = step(token, cache, *model.positions(cache)).clone()
            worst = max(worst, off(found, reference(token)))
            if place % 16 == 0:  # the graph against the same launches one by one
                _poison(step)
                for launch in step.launches():
                    launch()
                run.wait()
                bits_equal &= torch.equal(step.logits, found)
            cache.advance(1)
    kind = str(model.dtype).removeprefix("torch.")
    run.gate(f"{name} {bits} bits {kind}: {tokens} tokens", worst, LIMITS[model.dtype])
    run.holds(f"{name} {bits} bits: graph and eager bit for bit", bits_equal)
    del step, model, cache, reference
    run.empty()


class _Reference:
    """The same network in float32 by torch, its packed matrices unpacked, over a cache of its own."""

    def __init__(self, run: Run, model: Any, config: dict[str, Any], prompt: list[int]) -> None:
        from glmchat.engine.families import family_of
        from glmchat.engine.quantize.linear import QuantEmbedding, QuantLinear

        self.run = run
        with torch.device("meta"):
            self.model = family_of(config)[0].build(model.spec)
        for path, module in self.model.named_modules():
            packed = model.get_submodule(path)
            for leaf, _ in list(module.named_parameters(recurse=False)):
                layer = packed.linear if isinstance(packed, QuantEmbedding) else packed
                if leaf == "weight" and isinstance(layer, QuantLinear):
                    weight = layer.dequantise(torch.float32)
                else:
                    weight = getattr(packed, leaf).float()
                setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
        self.model.dtype = torch.float32
        self.model.prepare(torch.float32, run.device)
        self.model.compile_steps = False
        self.cache = self.model.new_cache(len(prompt) + 80, torch.float32)
        self.model(torch.tensor(prompt, device=run.device), self.cache, last_only=True)

    def __call__(self, token: int) -> torch.Tensor:
        row: torch.Tensor = self.model(torch.tensor([token], device=self.run.device), self.cache, last_only=True)[-1]
        return row


def _poison(step: Any) -> None:
    """Every buffer that the kernels write holds NaN before they run: what they leave out is seen."""
    for launch in step.launches():
        for name, value in named(launch).items():
            if name in _WRITTEN and isinstance(value, torch.Tensor) and value.is_floating_point():
                value.fill_(float("nan"))


def forms(run: Run) -> None:
    """Every form of every kernel against float64, as the tests run them in the interpreter."""
    if not run.real:
        run.skip("forms", "tests/engine/test_gpu_kernels.py runs them")
        return
    checks = ROOT / "tests" / "engine" / "kernel_checks.py"
    names = ["lookups", "attention", "products"]
    if find_spec("transformers") is not None:  # whose penalty is the right one
        names.append("choice")
    environment = {**os.environ, "KERNEL_CHECKS_DEVICE": run.device}
    running = {
        name: subprocess.Popen([sys.executable, str(checks), name], env=environment, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for name in names
    }  # fmt: skip
    try:
        for name, process in running.items():
            started = time.perf_counter()
            try:
                told, errors = process.communicate(timeout=max(1.0, run.left - 1))
            except subprocess.TimeoutExpired:
                run.skip(name, f"not done after {time.perf_counter() - started:.0f} s")
                continue
            last = (errors.strip().splitlines() or [""])[-1][:200]
            run.row(name, "yes" if told.split() == ["right"] else last, "", predicted="yes",
                    verdict="right" if told.split() == ["right"] else "WRONG")  # fmt: skip
    finally:
        for process in running.values():
            process.kill()
