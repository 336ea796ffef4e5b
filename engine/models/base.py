"""What the decode loop knows of a model: its measures, and one forward call for one sequence."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from glmchat.checkpoints.device_plan import ON_CPU
from glmchat.checkpoints.spec import ModelSpec
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.models.parts import NotCompiled, Parts
from glmchat.engine.models.variant import Derived, Variant
from glmchat.engine.native.step import CompiledStep


class Block(nn.Module):
    """A part of a layer that keeps what it derives from its modules, until one of the model's is swapped."""

    derived: Any = None


class PackedPlace(nn.Module):
    """Where a linear layer or an embedding stood whose weights are packed, until they are put in; it keeps the bias."""

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.is_embedding = isinstance(layer, nn.Embedding)
        self.bias = cast("nn.Parameter | None", getattr(layer, "bias", None))

    @property
    def weight(self) -> torch.Tensor:
        """Nothing, for code around the layer that would fill it with random numbers."""
        nothing = torch.empty(0, 0)
        nothing._is_hf_initialized = True  # type: ignore[attr-defined]
        return nothing

    def dense(self, weight: torch.Tensor) -> nn.Module:
        """The layer that stood there, with these weights."""
        rows, columns = weight.shape
        parameter = nn.Parameter(weight, requires_grad=False)
        with torch.device("meta"):
            layer = nn.Embedding(rows, columns) if self.is_embedding else nn.Linear(columns, rows, bias=False)
        layer.weight = parameter
        if self.bias is not None:
            layer.register_parameter("bias", self.bias)
        return layer


class LanguageModel(nn.Module):
    """A network for one sequence (no batches, on purpose).

    Parameter names are the checkpoint's own names. Linear layers are plain `nn.Linear`, so that quantisation and
    adapters can stand in for them, with `swap` and `wear` and in no other way. What is derived from the modules (fused
    projections in each `Block`, the compiled step) belongs to one `version` of the model and is derived anew for the
    next; a variant that is worn again has it back.
    """

    spec: ModelSpec
    tied: str | None = None  # the embedding that is the head too; a head may be put in at `lm_head`
    dtype = torch.float32  # of the activations
    cache_type: str | None = None  # of keys and values, where it is not that of the activations
    plan = ON_CPU  # which of its layers lie where
    wide_residual = False  # what layers add up is kept in float32 beside float16 activations
    compile_steps = True  # False: torch decodes too, for comparisons
    make_step: Callable[[Parts, ModelSpec], Any] = CompiledStep  # what computes a token at once on the model's device
    step_fault: Callable[[], str | None] | None = None  # why this machine must not use the compiled step, asked once
    not_compiled = "not asked for yet"  # why torch decodes, for `glmchat bench` and whoever wonders
    _step: Any = None
    _step_version = -1

    def __init__(self) -> None:
        super().__init__()
        self.version = 0
        self.plain = self.variant = Variant()  # by itself; as which it computes now
        self._basis = 0  # moves with what makes all variants others
        self._own: dict[str, nn.Module | None] = {}  # what the layers of `variant` stand in for
        self._lock = threading.RLock()  # a change waits for a step that is being built, and the other way round

    def swap(self, path: str, module: nn.Module | None) -> None:
        """Put `module` in the place of the one at `path` (dotted, as in `named_modules`), and drop what was derived.

        None only for a place that may be empty, like the head of a model whose embedding is its head.
        """
        with self._lock:
            self._put(path, module)
            self.version += 1
            self._basis += 1

    def _put(self, path: str, module: nn.Module | None) -> nn.Module | None:
        """Returns what stood there."""
        holder, _, leaf = path.rpartition(".")
        parent = self.get_submodule(holder)
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            before = cast("nn.Module | None", parent[int(leaf)])
            parent[int(leaf)] = cast(nn.Module, module)
        else:
            before = cast("nn.Module | None", getattr(parent, leaf, None))
            setattr(parent, leaf, module)
        if isinstance(parent, Block):
            parent.derived = None
        return before

    def wear(self, variant: Variant) -> None:
        """Compute as `variant` makes it from now on. What was derived of the one before is kept for when it returns."""
        if variant is self.variant:
            return
        with self._lock:
            blocks = [module for module in self.modules() if isinstance(module, Block)]
            # A step of a card would hold memory there.
            has_step = self._step_version == self.version and self.make_step is CompiledStep
            self.variant.derived = Derived(
                self._basis, [b.derived for b in blocks], self._step if has_step else None, self.not_compiled, has_step
            )
            for place, own in self._own.items():
                self._put(place, own)
            self._own = {place: self._put(place, layer) for place, layer in variant.layers.items()}
            self.variant = variant
            self.version += 1
            kept = variant.derived
            if kept is None or kept.basis != self._basis:
                return
            for block, derived in zip(blocks, kept.blocks, strict=True):
                block.derived = derived
            if kept.has_step:
                self._step, self.not_compiled, self._step_version = kept.step, kept.not_compiled, self.version

    def changed(self) -> None:
        """Say that modules are not what they were though none was swapped: other types, other products."""
        with self._lock:
            for module in self.modules():
                if isinstance(module, Block):
                    module.derived = None
            self.version += 1
            self._basis += 1

    def parts(self) -> Parts | None:
        """What the compiled step needs to know; None for an architecture that it does not compute."""
        return None

    def position(self, cache: KVCache) -> int:
        """The rotary position of the token behind what the cache holds."""
        return cache.position

    def positions(self, cache: KVCache) -> tuple[int, int]:
        """`position`, and the second one of a network whose heads are rotated by two."""
        return self.position(cache), 0

    def step(self) -> Any:
        """The compiled step of this model as it is now; None where torch decodes. Asked by the thread that computes."""
        if self._step_version != self.version:
            with self._lock:
                version = self.version  # before the modules are read: a swap among them makes the step stale
                self._step, self.not_compiled = self._build_step()
                self._step_version = version
        return self._step if self.compile_steps else None

    def _build_step(self) -> tuple[Any, str]:
        """The step, or None and why there is none."""
        parts = self.parts()
        if parts is None:
            return None, f"{self.spec.family} has no compiled step"
        if self.step_fault is not None and (fault := self.step_fault()):
            return None, fault
        try:
            return self.make_step(parts, self.spec), ""
        except NotCompiled as reason:
            return None, str(reason)

    def step_of(self, variant: Variant) -> Any:
        """`step` of the model as `variant` makes it, which it does not have to wear for that twice."""
        kept = variant.derived
        if variant is not self.variant and kept is not None and kept.has_step and kept.basis == self._basis:
            return kept.step if self.compile_steps else None
        self.wear(variant)
        return self.step()

    def compiled(self, cache: KVCache, variant: Variant | None = None) -> Any:
        """`step`, or that of a variant, if it takes this cache."""
        step = self.step() if variant is None else self.step_of(variant)
        if step is None:
            return None
        cache.reserve(cache.length + 1)
        return step if step.takes(cache) else None

    def new_cache(self, capacity: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `capacity` positions, in the dtype of the activations."""
        parameter = next(self.parameters())
        dtype = dtype or (parameter.dtype if parameter.dtype.is_floating_point else torch.bfloat16)
        devices = [str(parameter.device)]
        if len(self.plan.devices) > 1:
            devices = [self.plan.of_layer(layer) for layer in range(self.spec.layers)]
        return KVCache(self.spec.layers, self.spec.kv_heads, self.spec.head_dim, capacity, dtype, *devices)

    def prepare(self, dtype: torch.dtype, device: str) -> None:
        """Called once, after the weights are in: tables that are computed and not loaded, fused views of weights."""

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of keys and values that are kept."""
        return self.dtype if self.cache_type is None else cast(torch.dtype, getattr(torch, self.cache_type))

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
