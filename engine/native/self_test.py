"""A step against torch, once a process: small networks of each kind, a few tokens. And how long a token takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn

from glmchat.checkpoints.families import parse
from glmchat.engine.adapters.low_rank import AdaptedLinear, LowRank
from glmchat.engine.models import chatglm2, llama
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.models.variant import Variant
from glmchat.engine.native.cpu import NativeCpu
from glmchat.engine.quantize.linear import QuantLinear

_SIZES = {"vocab_size": 48, "hidden_size": 64, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}
_QWEN3 = {
    **_SIZES,
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
}
_CHATGLM3 = {
    **_SIZES,
    "model_type": "chatglm",
    "num_layers": 2,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "ffn_hidden_size": 96,
    "kv_channels": 16,
    "rmsnorm": True,
    "post_layer_norm": True,
    "padded_vocab_size": 48,
}


@cache
def step_fault() -> str | None:
    """Why this machine must not use the compiled step, or None; the comparison is made when it is first asked for."""
    return NativeCpu().unavailable() or _fault("cpu")


@cache
def coarse_fault() -> str | None:
    """Why products of 8 bits must not be used here, or None: what they say of random numbers against torch."""
    noise = torch.Generator().manual_seed(5)
    q = torch.randint(0, 16, (48, 128), generator=noise, dtype=torch.uint8)
    scale, zero = torch.rand(2, 48, 2, generator=noise) / 16
    x = torch.randn(21, 128, generator=noise)
    linear = QuantLinear.from_int4(q, scale, zero)
    if not linear.multiply_coarsely():
        return f"the kernel {linear.kernel.name} has none"
    parts = x.view(len(x), 2, 64)
    steps = parts.abs().amax(2, keepdim=True) / 127
    expected = ((parts / steps).round() * steps).view(x.shape) @ linear.dequantise().T
    found = linear(x)
    error = float((found - expected).abs().max() / expected.abs().max())
    if not error < 1e-5:
        return f"a product of 8 bits differs from torch by {error:.1%}"
    if not all(torch.equal(linear(x[row : row + 1])[0], found[row]) for row in range(len(x))):
        return "rows of a product of 8 bits are not what each is alone"
    return None


def card_step() -> tuple[Callable[..., Any], Callable[[], str | None]]:
    """What computes a token on an NVIDIA card, and why this machine must not use it (None: it may)."""
    from glmchat.engine.gpu.step import CardSteps

    return CardSteps, card_fault


@cache
def card_fault() -> str | None:
    """Like `step_fault`, for the current card. Whatever Triton, its compiler or the driver raise is the reason."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from glmchat.engine.gpu.step import CardSteps

    hopper = torch.cuda.get_device_capability() >= (9, 0)
    reason: str | None = None
    for dependent in (True, False) if hopper else (False,):
        CardSteps.dependent = dependent
        try:
            reason = _fault("cuda")
        except Exception as error:  # noqa: BLE001 - no compiler for the launcher, too old a card, a broken driver …
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        if reason is None:
            return None
    return reason


def _fault(device: str) -> str | None:
    for config, family in ((_QWEN3, llama.FAMILY), (_CHATGLM3, chatglm2.FAMILY)):
        model = small_model(family.build(parse(config)), device)
        if device != "cpu":
            model.make_step = card_step()[0]
        with torch.inference_mode():
            error = difference(model)
        if not error < 1e-3:  # both multiply the same rounded numbers; a wrong step is off by about 1; NaN fails too
            return f"a step of {model.spec.family} differs from torch by {error:.1%}"
        if device == "cpu" and (rows := rows_that_differ(model)):
            return f"{rows} rows of a step of {model.spec.family} are not what each is alone"
    return None


def rows_that_differ(model: LanguageModel) -> int:
    """How many rows of one step have other bits than each of them alone; 0 for none: an answer is its own.

    Every second row has an adapter.
    """
    two = model.step_of(_adapted(model)), model.step_of(model.plain)
    for count in (3, two[0].most_rows):
        tokens, steps = list(range(3, 3 + count)), [two[row % 2] for row in range(count)]
        caches = [model.new_cache(4, torch.float32) for _ in tokens]
        positions = [model.position(cache) for cache in caches]
        together = steps[0].rows(tokens, caches, positions, steps)
        alone = [step(*one) for step, *one in zip(steps, tokens, caches, positions, strict=True)]
        if not torch.equal(together, torch.stack(alone)):
            return count
    return 0


def _adapted(model: LanguageModel) -> Variant:
    """With changes of two ranks in the layers."""
    noise, layers = torch.Generator().manual_seed(4), {}
    for number, (place, module) in enumerate(model.named_modules()):
        if ".layers." in place and type(module) in (nn.Linear, QuantLinear):
            down = torch.randn(cast(int, module.in_features), 2 + number % 2, generator=noise)
            up = torch.randn(2 + number % 2, cast(int, module.out_features), generator=noise)
            layers[place] = AdaptedLinear(module, LowRank(down * 0.1, up * 0.1))
    return Variant(layers)


def small_model(model: LanguageModel, device: str = "cpu") -> LanguageModel:
    """Random weights, half of the matrices packed."""
    noise = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.15 + ("norm" in name))
    model.to(device)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module.in_features < 96:
            q = torch.randint(0, 16, module.weight.shape, generator=noise, dtype=torch.uint8)
            scale = torch.full((module.out_features, 2), 0.03)
            packed = (q.to(device), scale.to(device), (scale / 2).to(device))
            model.swap(name, QuantLinear.from_int4(*packed, module.bias))
    model.prepare(torch.float32, device)
    return model


def difference(model: LanguageModel) -> float:
    """Of the logits behind a prompt and four tokens, as a share of the largest."""
    cache = model.new_cache(16, torch.float32)
    step = model.compiled(cache)
    if step is None:
        return float("nan")
    device = cache.keys[0].device
    model(torch.arange(3, 11, device=device), cache, last_only=True)
    worst = 0.0
    for token in range(4):
        compiled = step(token, cache, *model.positions(cache)).clone()
        by_torch = model(torch.tensor([token], device=device), cache, last_only=True)[-1]
        error = float((compiled - by_torch).abs().max() / by_torch.abs().max())
        if not error <= worst:
            worst = error
    return worst


# Layers that stand for all of them in a measurement; embedding and head are left out. Those of a narrow model would
# stay in a cache that the whole model does not fit, so all of them are taken, which is quick.
_LAYERS = 4
_NARROW = 1024


class _Enough(Exception):
    """Ends a measured forward pass behind the first layers."""


def layer_timer(model: LanguageModel, device: str) -> Callable[[], float]:
    """A function that decodes one token through the model's first layers and returns the seconds that took."""
    cache = model.new_cache(64, model.cache_dtype)
    model.open_for_measuring(cache)
    start = cache.length
    ids = torch.zeros(1, dtype=torch.int64, device=device)

    def step() -> float:
        compiled = model.compiled(cache)
        if compiled is not None:
            return cast(
                float, compiled.seconds(cache, model.spec.layers if model.spec.hidden_size <= _NARROW else _LAYERS)
            )
        passed = 0
        started = 0.0

        def between_layers() -> None:
            nonlocal passed, started
            if not passed:
                started = time.perf_counter()
            if passed == min(_LAYERS, model.spec.layers - 1):
                raise _Enough
            passed += 1

        try:
            with torch.inference_mode():
                model(ids, cache, last_only=True, between_layers=between_layers)
        except _Enough:
            pass
        cache.truncate(start)
        return time.perf_counter() - started

    return step
