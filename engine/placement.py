"""Measured once at load: how many threads are fastest for this model on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from glmchat.engine.cores import choose_threads
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.models.base import LanguageModel

# Layers that stand for all of them in a measurement; embedding and head are left out. Those of a narrow model would
# stay in a cache that the whole model does not fit, so all of them are taken, which is quick.
_LAYERS = 4
_NARROW = 1024


class _Enough(Exception):
    """Ends a measured forward pass behind the first layers."""


def layer_timer(model: LanguageModel, dtype: torch.dtype, device: str) -> Callable[[], float]:
    """A function that decodes one token through the model's first layers and returns the seconds that took."""
    cache: KVCache = model.new_cache(64, dtype)
    model.open_for_measuring(cache)
    start = cache.length
    ids = torch.zeros(1, dtype=torch.int64, device=device)

    def step() -> float:
        compiled = model.compiled(cache)
        if compiled is not None:
            return compiled.seconds(cache, model.spec.layers if model.spec.hidden_size <= _NARROW else _LAYERS)
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


def tune(model: LanguageModel, dtype: torch.dtype, device: str, threads: int | None) -> int:
    """Choose and set the number of threads; returns it. A GPU keeps torch's own."""
    if device != "cpu":
        return torch.get_num_threads()
    return choose_threads(threads, layer_timer(model, dtype, device))
