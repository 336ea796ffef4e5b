"""Whole networks on a card: tokens a second, prompts, the load of a packed folder, quantising."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import DEPENDENT, bytes_of, share
from gpu_run import CONFIGS, Run, config_of, load, prompt_of, random_model, step_of
from safetensors.torch import save_file

# (network, bits, tokens a second that an H200 is expected to give at 128 positions without dependent launch)
MODELS = (
    ("chatglm3-6b", 4, 700.0), ("chatglm-6b", 4, 700.0), ("llama-3-8b", 4, 568.0), ("glm-4-9b", 4, 519.0),
    ("chatglm3-6b", 8, 503.0), ("chatglm3-6b", 16, 286.0),
)  # fmt: skip
NODES = 180  # of a graph, ChatGLM3-6B
SAMPLED = 0.95  # of the greedy rate
LONG = {"chatglm3-6b": (8000, 0.85), "chatglm-6b": (2000, 0.75)}  # positions, least share of the rate at 128
PROMPT_SHARE = 0.6  # of the 16-bit product rate, at 2,048 tokens
STOP_MS = 50.0
LOAD_SECONDS = 2.0
MEMORY = 0.03  # how far the preflight may be off
SEARCH_SECONDS = 15.0  # ChatGLM3-6B


def engine_of(run: Run, name: str, bits: int, context: int) -> tuple[Any, dict[str, Any]]:
    """An Engine of random weights, without a folder."""
    from glmchat.engine import Engine
    from glmchat.engine.families import Checkpoint, family_of

    config = config_of(run, name)
    family, spec = family_of(config)
    with torch.inference_mode():
        model = random_model(run, config, bits)
    return Engine(Checkpoint(Path(name), config, family, spec), model, run.device, context), config


def decode(run: Run) -> None:
    for name, bits, expected in MODELS[:1] if run.tiny else MODELS:
        need = 30e9 if bits == 16 else 14e9
        if run.real and run.free() < need:
            run.skip(f"{name} {bits} bits", f"{run.free() / 1e9:.0f} GB free, {need / 1e9:.0f} needed")
        elif run.left < 12 and run.real:
            run.skip(f"{name} {bits} bits", "no time left")
        else:
            _decode(run, name, bits, expected)
            run.empty()


def _decode(run: Run, name: str, bits: int, expected: float) -> None:
    from glmchat.engine import Sampling

    label, (long, least) = f"{name} {bits} bits", LONG.get(name, (2000, 0.75))
    engine, config = engine_of(run, name, bits, 64 if run.tiny else long + 400)
    greedy = Sampling(temperature=0, ignore_eos=True)
    sampled = Sampling(temperature=0.8, top_p=0.8, seed=3, ignore_eos=True)
    count, short = (1, 4) if run.tiny else (128, 128)
    rate = _rate(run, engine, prompt_of(config, short), greedy, count)
    bus, size = run.fact("ceilings", "read bus"), 0
    early = False
    if run.has_kernels:
        cache = engine.sequence.cache
        with torch.inference_mode():
            step = step_of(engine.model, cache)
            early = step.launches()[0].dependent
            for dependent in (False, True) if early else (False,):
                step = step_of(engine.model, cache, dependent=dependent)
                step(5, cache, *engine.model.positions(cache))  # its state is set
                launches = step.launches()
                size = sum(bytes_of(launch) for launch in launches)
                graph = run.seconds(run.graphed(lambda launches=launches: [launch() for launch in launches]))
                run.row(f"{label}, its graph{', dependent launch' if dependent else ''}", graph * 1e6, "us a token")
        del step
    least_share = DEPENDENT if early and bits == 4 else share(run, bits)
    within = None if not bus or not size else least_share * bus * 1e9 / size
    run.measure(f"{label}, greedy, {short} positions", rate, "tok/s", within, bytes_a_token=size, h200=expected)
    if bus and size:
        run.row(f"{label}, of the bus", 100 * rate * size / bus / 1e9, "%", predicted=100 * least_share)
        run.row(f"{label}, around the graph", (1 / rate - graph) * 1e6, "us a token")
    if size:
        limit = NODES if name == "chatglm3-6b" else 6 * engine.spec.layers + 4
        run.gate(f"{label}, nodes of a graph", len(launches), limit)
    if not run.has_kernels or run.real:
        drawn = _rate(run, engine, prompt_of(config, short), sampled, count)
        run.measure(f"{label}, sampled against greedy", drawn / rate, "", SAMPLED)
    if run.real:
        far = _rate(run, engine, prompt_of(config, long), greedy, count)
        run.measure(f"{label}, {long} positions against {short}", far / rate, "", least)
        run.row(f"{label}, peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB")


def _rate(run: Run, engine: Any, ids: list[int], sampling: Any, count: int) -> float:
    """Tokens a second behind `ids`, without the first few, which compile and capture."""
    steps = engine.generate(ids, sampling)
    for _ in range(1 if run.tiny else 6):
        next(steps)
    run.wait()
    started = time.perf_counter()
    for _ in range(count):
        next(steps)
    run.wait()
    seconds = time.perf_counter() - started
    steps.close()
    return count / seconds


def prompts(run: Run) -> None:
    from glmchat.engine import Sampling

    name = "chatglm3-6b"
    engine, config = engine_of(run, name, 4, 128 if run.tiny else 8400)
    layers = engine.spec.parameters() - 2 * engine.spec.vocab_size * engine.spec.hidden_size
    once = Sampling(temperature=0, max_tokens=1, ignore_eos=True)
    peak = run.fact("ceilings", "16-bit product")
    seconds = 0.0
    for length in (4,) if run.tiny else (32, 512, 2048, 8192):
        ids = prompt_of(config, length)
        times = []
        for _ in range(1 if run.tiny else 3):
            engine.sequence.forget()
            run.wait()
            started = time.perf_counter()
            list(engine.generate(ids, once))
            times.append(time.perf_counter() - started)
        seconds = min(times)
        flops = 2 * layers * length / seconds / 1e12
        judged = PROMPT_SHARE if length >= 2048 and peak else None
        run.measure(
            f"{length} tokens, share of the 16-bit product", flops / (peak or flops), "", judged,
            tokens_a_second=length / seconds, tflops=flops,
        )  # fmt: skip
        run.row(f"{length} tokens", length / seconds, "tok/s")
    if run.real:
        run.row("peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB")
    engine.sequence.forget()
    heard = time.perf_counter() + seconds / 3
    list(engine.generate(prompt_of(config, length), once, cancelled=lambda: time.perf_counter() > heard))
    run.wait()
    late = (time.perf_counter() - heard) * 1e3
    run.measure("a stop in the prompt is heard after", late, "ms", STOP_MS if run.real and late > STOP_MS else None,
                least=False)  # fmt: skip


def loading(run: Run) -> None:
    """A packed folder as `glmchat quantize` writes it, of random words, from memory; and the search of a quantiser."""
    from glmchat.engine import Sampling

    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(dir=run.out)  # as on a machine that never ran it
    shm = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(dir=shm if run.real and shm.is_dir() else run.out))
    try:
        folder, size = write_packed(run, place / "chatglm3-6b", "chatglm3-6b", 4)
        greedy = Sampling(temperature=0, max_tokens=2, ignore_eos=True)
        ids = prompt_of(CONFIGS["chatglm3-6b"], 4)
        for name in ("first",) if run.tiny else ("first", "again"):
            run.empty()
            before = run.free()
            started = time.perf_counter()
            engine = load(run, folder, context=128 if run.tiny else 2048)
            run.wait()
            seconds = time.perf_counter() - started
            run.measure(f"load, {name}", seconds, "s", LOAD_SECONDS if name == "again" else None, least=False,
                        gb_s=size / seconds / 1e9)  # fmt: skip
            started = time.perf_counter()
            said = list(engine.generate(ids, greedy))
            run.measure(f"two tokens, {name}: compile and capture", time.perf_counter() - started, "s")
            run.holds(f"answers come from the folder, {name}", len(said) == 2)
            if run.real and name == "again":
                _memory(run, engine, folder, before)
            del engine
    finally:
        shutil.rmtree(place)
        shutil.rmtree(os.environ.pop("TRITON_CACHE_DIR"), ignore_errors=True)
    _search(run)


def _memory(run: Run, engine: Any, folder: Path, before: int) -> None:
    from glmchat.checkpoints.card_fit import card_memory

    held = engine.memory()
    run.row("weights and cache", (held["weights"] + held["cache"]) / 1e9, "GB")
    run.row("taken from the card", (before - run.free()) / 1e9, "GB")
    expected = card_memory(folder, context=engine.context)
    if expected is not None:
        predicted = expected.weights + expected.cache
        run.gate("preflight off by", abs(held["weights"] + held["cache"] - predicted) / predicted, MEMORY)


def write_packed(run: Run, folder: Path, name: str, bits: int) -> tuple[Path, int]:
    """A compressed-tensors folder of random words: (folder, bytes of its weights). Speed does not depend on them."""
    from glmchat.checkpoints.recipe import Recipe
    from glmchat.engine.families import family_of
    from glmchat.engine.formats.compressed import describe, packed_width

    folder.mkdir()
    config = config_of(run, name)
    spec = family_of(config)[1]
    recipe, matrices = Recipe(bits).settled(spec.family), spec.matrices()
    noise = torch.randint(-(1 << 31), (1 << 31) - 1, (1 << 24,), dtype=torch.int32)

    def words(*shape: int) -> torch.Tensor:
        count = shape[0] * shape[1]
        return noise.repeat(-(-count // len(noise)))[:count].view(shape)

    schemes: dict[tuple[int, int, bool], list[str]] = {}
    table: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    total = written = 0

    def write() -> None:
        nonlocal written
        file = f"model-{written + 1:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        table.update(dict.fromkeys(shard, file))
        shard.clear()
        written += 1

    for parameter, shape in spec.shapes().items():
        before = len(shard)
        width, group = recipe.choose(parameter, *matrices[parameter]) if parameter in matrices else (0, 0)
        if not width:
            drawn = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) / shape[-1] ** 0.5
            shard[parameter] = drawn.half()
        else:
            stem, groups = parameter.removesuffix("weight"), shape[1] // group if group else 1
            schemes.setdefault((width, group, width == 8), []).append(stem.removesuffix("."))
            spread = 1 / shape[1] ** 0.5 / (4.6 if width == 4 else 74)
            shard[f"{stem}weight_packed"] = words(shape[0], packed_width(shape[1], width))
            shard[f"{stem}weight_scale"] = torch.full((shape[0], groups), spread, dtype=torch.float16)
            shard[f"{stem}weight_shape"] = torch.tensor(shape)
            if width == 4:
                shard[f"{stem}weight_zero_point"] = words(packed_width(shape[0], 4), groups)
        total += sum(tensor.nbytes for tensor in list(shard.values())[before:])
        if sum(tensor.nbytes for tensor in shard.values()) > 1 << 29:
            write()
    write()
    index = {"metadata": {"total_size": total}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config["quantization_config"] = describe(schemes, [])
    (folder / "config.json").write_text(json.dumps(config))
    return folder, total


def _search(run: Run) -> None:
    """Scales of 4-bit weights, searched on the card in float32."""
    from glmchat.engine.quantize.int4 import search_torch

    rows, columns = (4096, 13696) if run.real else (8, 128)
    values = run.noise(rows * columns // 128, 128)
    seconds = run.seconds(lambda: search_torch(values, integer_zero=False), 3)
    whole = seconds * 6.0e9 / (rows * columns)
    run.measure("search of ChatGLM3-6B's scales, extrapolated", whole, "s", SEARCH_SECONDS, least=False)
