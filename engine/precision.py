"""Which floating-point type the activations have when nobody asked for one."""

from __future__ import annotations

import psutil
import torch

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.machine import available_memory
from glmchat.engine.families import Checkpoint
from glmchat.engine.loading import set_dtype, stored_bits
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.quantize.linear import QuantLinear

_ROOMY = 0.7  # of the free memory: what weights and a full float32 cache may take; chat/preflight.py counts with it too
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(asked: str | None, checkpoint: Checkpoint, device: str) -> torch.dtype:
    """What was asked for; else float32 on a CPU without bfloat16 instructions where that fits easily, else bfloat16.

    Raises Usage for a type that does not exist.
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
        return torch.bfloat16
    spec = checkpoint.spec
    # Measured without such instructions: 128 rows of 16384 x 4096 take 183 ms in float32 and 903 ms in bfloat16.
    layer = spec.hidden_size * (spec.hidden_size * 2 + spec.kv_heads * spec.head_dim * 2 + spec.ffn_size * 3)
    bytes_wide = 4 * (spec.layers * layer + 2 * spec.vocab_size * spec.hidden_size)
    fits = checkpoint.gguf is not None or bytes_wide < psutil.virtual_memory().available * 0.4
    return torch.float32 if fits and not _has_bf16() else torch.bfloat16


def _has_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def settle_dtype(model: LanguageModel, now: torch.dtype, device: str, context: int) -> torch.dtype:
    """For quantised weights on a CPU: float32 where glmchat's own kernel multiplies them all, which is as fast in both
    types while everything around it is faster in float32; else bfloat16, as ATen's int4 operator is 40 times slower in
    float32. Bfloat16 too where a float32 cache of the whole context would take too much of what is free.

    No measurement: one machine always decides alike, so that memory is predicted and answers can be repeated. The model
    then has the type that is returned.
    """
    if device != "cpu" or stored_bits(model) is None:
        return now
    spec = model.spec
    cache = 2 * spec.layers * spec.kv_heads * spec.head_dim * context * 4
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    free = available_memory()  # mapped weights count as free
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    roomy = free is None or weights + cache <= _ROOMY * free
    dtype = torch.float32 if roomy and all(layer.kernel.any_dtype for layer in layers) else torch.bfloat16
    set_dtype(model, dtype, device)
    return dtype


def multiply_exactly(model: LanguageModel) -> None:
    """Who asks for float32 by name compares numbers: packed weights then multiply in plain float32 too."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.multiply_exactly()
