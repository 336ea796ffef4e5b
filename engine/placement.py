"""How a checkpoint runs on this machine: on which device, in which number type, with how many threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from glmchat.checkpoints.fit import counted_spec, fits_in_float32, packed_fits_in_float32, stored_bytes
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.machine import available_memory, has_bf16, physical_cores
from glmchat.engine.families import Checkpoint
from glmchat.engine.loading import set_dtype, stored_bits
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.native.cards import half_precision
from glmchat.engine.native.self_test import coarse_fault, layer_timer
from glmchat.engine.quantize.linear import QuantLinear

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(asked: str | None, checkpoint: Checkpoint, device: str) -> torch.dtype:
    """What was asked for; else float32 on a CPU without bfloat16 instructions where that fits easily, else bfloat16.

    A card takes 16 bits (`half_precision`). Raises Usage for a type that does not exist.
    """
    if asked is not None:
        if asked not in _DTYPES:
            raise Usage(
                tr("dtype is {asked!r}", asked=asked),
                hint=tr("one of {names}", names=", ".join(_DTYPES)),
                code="dtype.unknown",
            )
        return _DTYPES[asked]
    if device != "cpu":
        return half_precision(checkpoint.config, device)
    # Measured without such instructions: 128 rows of 16384 x 4096 take 183 ms in float32 and 903 ms in bfloat16.
    weights = counted_spec(checkpoint.spec, checkpoint.config, stored_bytes(checkpoint.path)).weight_bytes(width=4) or 0
    fits = checkpoint.gguf is not None or fits_in_float32(weights, available_memory())
    return torch.float32 if fits and not has_bf16() else torch.bfloat16


def settle_dtype(model: LanguageModel, device: str, context: int) -> None:
    """For quantised weights on a CPU: float32 where glmchat's own kernel multiplies them all, which is as fast in both
    types while everything around it is faster in float32; else bfloat16, as ATen's int4 operator is 40 times slower in
    float32. Bfloat16 too where a float32 cache of the whole context would take too much of what is free.

    No measurement: one machine always decides alike, so that memory is predicted and answers can be repeated.
    """
    if device != "cpu" or stored_bits(model) is None:
        return
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    free = available_memory()  # mapped weights count as free
    roomy = packed_fits_in_float32(weights, model.spec.cache_bytes(context, 4, model.cache_type), free)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    fast = all(layer.kernel.any_dtype for layer in layers)
    set_dtype(model, torch.float32 if roomy and fast else torch.bfloat16, device)


def multiply_exactly(model: LanguageModel) -> None:
    """Who asks for float32 by name compares numbers: packed weights then multiply in plain float32 too."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.multiply_exactly()
    model.changed()


def multiply_coarsely(model: LanguageModel) -> None:
    """Round activations to 8 bits where they meet weights of 4 (byte_part.h). Raises Usage where nothing does."""
    if fault := coarse_fault():
        raise Usage(
            tr("this machine has no products of 8 bits"),
            hint=tr("leave --products out: {reason}", reason=fault),
            code="products.fault",
        )
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    if not [layer for layer in layers if layer.multiply_coarsely()]:
        raise Usage(
            tr("no product of this model can be one of 8 bits"),
            hint=tr("--products int8 is for weights of 4 bits on a CPU: --quant 4"),
            code="products.none",
        )
    model.changed()


def tune(model: LanguageModel, device: str, threads: int | None) -> int:
    """Choose and set the number of threads; returns it. A GPU keeps torch's own."""
    if device != "cpu":
        return torch.get_num_threads()
    return choose_threads(threads, layer_timer(model, device))


def choose_threads(asked: int | None, step: Callable[[], float]) -> int:
    """Set torch's thread count to the one with which `step` (it returns the seconds it took) is fastest.

    asked: taken as it is. Otherwise all cores are compared with one: two OpenMP threads on a machine whose second core
    is busy can be 20 times slower than one, because each barrier waits for the core that does not come.
    """
    cores = physical_cores()
    if asked is not None or cores == 1:
        torch.set_num_threads(asked or 1)
        return asked or 1
    candidates: Sequence[int] = (cores, cores // 2, 1) if cores > 3 else (cores, 1)
    best, best_seconds = 1, math.inf
    for count in candidates:
        torch.set_num_threads(count)
        step()  # the pool is built and caches are warm
        seconds = sorted(step() for _ in range(3))[1]
        if seconds < best_seconds * 0.97:  # fewer threads must not win by noise, nor more
            best, best_seconds = count, seconds
    torch.set_num_threads(best)
    return best


_MOST_AT_ONCE = 16  # rows of one compiled step
_SHARE = 0.5  # of the memory that is free, for caches beside the first


def choose_parallel(model: LanguageModel, device: str, context: int, asked: int | None) -> int:
    """How many answers are written at once: what was asked for, else as many as one step computes and memory holds.

    Each has a cache of its own. One, where a step takes one token: nothing would be won.
    """
    if asked is not None:
        return asked
    if device != "cpu" or getattr(model.step(), "most_rows", 1) == 1:
        return 1
    cache = model.spec.cache_bytes(context, model.dtype.itemsize, model.cache_type)
    free = available_memory()
    return _MOST_AT_ONCE if free is None else max(1, min(_MOST_AT_ONCE, 1 + int(free * _SHARE / cache)))
