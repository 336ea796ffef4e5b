"""What the decode loop knows of a model: its measures, and one forward call for one sequence."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import nn

from glmchat.checkpoints.spec import ModelSpec
from glmchat.engine.changes import changes
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.native.step import CompiledStep, NotCompiled, Parts


class LanguageModel(nn.Module):
    """A network for one sequence (no batches, on purpose).

    Parameter names are the checkpoint's own names. Linear layers are plain `nn.Linear`, so that quantisation and
    adapters can swap them.
    """

    spec: ModelSpec
    compile_steps = True  # False: torch decodes too, for comparisons
    not_compiled = "not asked for yet"  # why torch decodes, for `glmchat bench` and whoever wonders
    _step: CompiledStep | None = None
    _changes = -1

    def parts(self) -> Parts | None:
        """What the compiled step needs to know; None for an architecture that it does not compute."""
        return None

    def position(self, cache: KVCache) -> int:
        """The rotary position of the token behind what the cache holds."""
        return cache.position

    def step(self) -> CompiledStep | None:
        """The compiled step of this model as it is now; None where torch decodes. Asked by the thread that computes."""
        count = changes()  # before the modules are read: what is swapped meanwhile makes the step stale
        if self._changes != count:
            try:
                parts = self.parts()
                self._step = None if parts is None else CompiledStep(parts, self.spec)
                self.not_compiled = f"{self.spec.family} has no compiled step" if parts is None else ""
            except NotCompiled as reason:
                self._step, self.not_compiled = None, str(reason)
            self._changes = count
        return self._step if self.compile_steps else None

    def compiled(self, cache: KVCache) -> CompiledStep | None:
        """`step`, if it takes this cache."""
        step = self.step()
        return step if step is not None and step.takes(cache) else None

    def new_cache(self, capacity: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `capacity` positions, in the dtype of the activations."""
        parameter = next(self.parameters())
        dtype = dtype or (parameter.dtype if parameter.dtype.is_floating_point else torch.bfloat16)
        return KVCache(self.spec.layers, self.spec.kv_heads, self.spec.head_dim, capacity, dtype, str(parameter.device))

    def prepare(self, dtype: torch.dtype, device: str) -> None:
        """Called once, after the weights are in: tables that are computed and not loaded, fused views of weights."""

    def open_for_measuring(self, cache: KVCache) -> None:
        """Bring an empty cache to where one token can be decoded, without computing anything."""

    @abstractmethod
    def forward(
        self,
        ids: torch.Tensor,
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
        between_layers: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """ids [n] follow what the cache holds. Returns float32 logits [n, vocab], or [1, vocab] if `last_only`.

        `between_layers` is called between layers and may raise to stop; the cache's length is then unchanged.
        """
