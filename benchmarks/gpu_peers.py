"""Other programs on the same card in the same run: a loop in the manner of gpt-fast, and transformers.

The loop is what torch alone can do for one sequence: a static cache, a whole token compiled into one CUDA graph,
weights in bfloat16 or in ATen's INT4 layout (tinygemm). It has the measures of Llama-3-8B and random weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from gpu_models import _rate, engine_of
from gpu_run import Run, config_of, prompt_of
from torch import nn
from torch.nn import functional

OURS_TO_FAST, OURS_TO_STATIC = 1.5, 3.0  # at least: our rate against gpt-fast's INT4, and transformers' static cache


class _Linear4(nn.Module):
    """ATen's INT4 product, groups of 128."""

    packed: torch.Tensor
    scales: torch.Tensor

    def __init__(self, run: Run, inputs: int, outputs: int) -> None:
        super().__init__()
        codes = run.codes(outputs, inputs // 2, below=255)
        self.register_buffer("packed", torch._convert_weight_to_int4pack(codes, 8))
        self.register_buffer("scales", (run.noise(inputs // 128, outputs, 2) * 0.01).bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch._weight_int4pack_mm(x, self.packed, 128, self.scales)


class _Linear16(nn.Module):
    weight: torch.Tensor

    def __init__(self, run: Run, inputs: int, outputs: int) -> None:
        super().__init__()
        self.register_buffer("weight", (run.noise(outputs, inputs) / inputs**0.5).bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight)


class _Layer(nn.Module):
    norms: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, run: Run, config: dict[str, Any], linear: Any, room: int) -> None:
        super().__init__()
        hidden, heads, kv_heads = (config[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
        self.heads, self.kv_heads, self.size = heads, kv_heads, hidden // heads
        self.qkv = linear(run, hidden, (heads + 2 * kv_heads) * self.size)
        self.output = linear(run, hidden, hidden)
        self.gate_up = linear(run, hidden, 2 * config["intermediate_size"])
        self.down = linear(run, config["intermediate_size"], hidden)
        self.register_buffer("norms", torch.ones(2, hidden, dtype=torch.bfloat16, device=run.device))
        for name in ("keys", "values"):  # buffers have addresses that a graph may rely on
            empty = torch.zeros(1, kv_heads, room, self.size, dtype=torch.bfloat16, device=run.device)
            self.register_buffer(name, empty)

    def forward(self, x: torch.Tensor, at: torch.Tensor, turn: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(functional.rms_norm(x, x.shape[-1:], self.norms[0])).view(1, -1, 1, self.size)
        query, key, value = qkv.split((self.heads, self.kv_heads, self.kv_heads), 1)
        self.keys.index_copy_(2, at, _rotated(key, turn))
        self.values.index_copy_(2, at, value)
        seen = functional.scaled_dot_product_attention(
            _rotated(query, turn), self.keys, self.values, attn_mask=mask, enable_gqa=True
        )
        x = x + self.output(seen.reshape(1, -1))
        gate, up = self.gate_up(functional.rms_norm(x, x.shape[-1:], self.norms[1])).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


def _rotated(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * turn[0] - b * turn[1], b * turn[0] + a * turn[1]), -1).to(x.dtype)


class Loop(nn.Module):
    """One token in, the next one out, greedily."""

    embedding: torch.Tensor
    norm: torch.Tensor
    turns: torch.Tensor
    places: torch.Tensor

    def __init__(self, run: Run, config: dict[str, Any], linear: Any, room: int) -> None:
        super().__init__()
        hidden, size = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
        self.register_buffer("embedding", run.noise(config["vocab_size"], hidden).bfloat16())
        self.layers = nn.ModuleList(_Layer(run, config, linear, room) for _ in range(config["num_hidden_layers"]))
        self.head = _Linear16(run, hidden, config["vocab_size"])
        self.register_buffer("norm", torch.ones(hidden, dtype=torch.bfloat16, device=run.device))
        angles = torch.outer(torch.arange(room), config["rope_theta"] ** (-torch.arange(0, size, 2) / size))
        self.register_buffer("turns", torch.stack((angles.cos(), angles.sin()), 1).to(run.device))
        self.register_buffer("places", torch.arange(room, device=run.device))

    def forward(self, token: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        x, turn, mask = self.embedding[token], self.turns[at][0], (self.places <= at)[None, None, None]
        for layer in self.layers:
            x = layer(x, at, turn, mask)
        return self.head(functional.rms_norm(x, x.shape[-1:], self.norm)).argmax(-1)


def peers(run: Run) -> None:
    config, room = config_of(run, "llama-3-8b"), 32 if run.tiny else 512
    if run.real and run.free() < 40e9:
        run.skip("peers", f"{run.free() / 1e9:.0f} GB free, 40 needed")
        return
    ours = 0.0 if run.kind == "cpu" else _ours(run, config)
    loops = {"bfloat16": _Linear16, "INT4 g128": _Linear4} if run.real else {"bfloat16": _Linear16}
    for name, linear in loops.items():
        if run.real and run.left < 35:
            run.skip(f"gpt-fast's loop, {name}", "no time left")
            continue
        rate = _guarded(run, f"gpt-fast's loop, {name}", lambda linear=linear: _loop(run, config, linear, room))
        if rate and name.startswith("INT4"):
            run.measure("glmchat INT4 against gpt-fast's loop", ours / rate, "", OURS_TO_FAST)
    for name, options in (("dynamic", {}), ("static", {"cache_implementation": "static"})):
        if run.tiny or find_spec("transformers") is None:
            run.skip(f"transformers, {name} cache", "tiny" if run.tiny else "not installed")
        elif run.left < 20:
            run.skip(f"transformers, {name} cache", "no time left")
        else:
            rate = _guarded(
                run, f"transformers, {name} cache", lambda options=options: _transformers(run, config, options)
            )
            if rate and name == "static":
                run.measure("glmchat INT4 against transformers, static cache", ours / rate, "", OURS_TO_STATIC)


def _guarded(run: Run, name: str, measure: Callable[[], float]) -> float | None:
    """A peer that does not run here is named with its reason: it is nobody's fault here."""
    try:
        rate = measure()
    except Exception as error:  # noqa: BLE001 - foreign code on a foreign machine
        run.skip(name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}")
        return None
    run.measure(name, rate, "tok/s")
    run.empty()
    return rate


def _ours(run: Run, config: dict[str, Any]) -> float:
    from glmchat.engine import Sampling

    engine, _ = engine_of(run, "llama-3-8b", 4, 32 if run.tiny else 512)
    rate = _rate(run, engine, prompt_of(config, 4), Sampling(temperature=0, ignore_eos=True), 1 if run.tiny else 128)
    run.measure("glmchat INT4", rate, "tok/s")
    del engine
    run.empty()
    return rate


def _loop(run: Run, config: dict[str, Any], linear: Any, room: int) -> float:
    with torch.no_grad():
        loop: Any = Loop(run, config, linear, room)
        if run.real:
            started = time.perf_counter()
            loop = torch.compile(loop, mode="reduce-overhead", fullgraph=True)
        token = torch.tensor([5], device=run.device)
        at = torch.tensor([3], device=run.device)
        for _ in range(5 if run.real else 1):
            token = loop(token, at).clone()
        run.wait()
        if run.real:
            run.row(f"compile of gpt-fast's loop, {linear.__name__}", time.perf_counter() - started, "s")
        count = 100 if run.real else 2
        started = time.perf_counter()
        for _ in range(count):
            token = loop(token, at).clone()
            at += 1
        run.wait()
        return count / (time.perf_counter() - started)


def _transformers(run: Run, config: dict[str, Any], options: dict[str, Any]) -> float:
    from transformers import AutoConfig, AutoModelForCausalLM  # type: ignore[import-untyped,unused-ignore]

    given = AutoConfig.for_model(**config)
    with torch.device(run.device):
        model = AutoModelForCausalLM.from_config(given, dtype=torch.bfloat16).eval()
    ids = torch.tensor([prompt_of(config, 8)], device=run.device)

    def answer(tokens: int) -> float:
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)
        run.wait()
        return time.perf_counter() - started

    answer(24)  # compiles, where a static cache does
    short, long = answer(24), answer(88)
    return 64 / (long - short)
