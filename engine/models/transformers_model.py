"""transformers' network of any architecture behind our face, with transformers' own cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from glmchat.checkpoints.spec import ModelSpec
from glmchat.core.errors import Failed
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.models.layers import prepare_embedding
from glmchat.engine.models.prefix import PrefixedModel
from glmchat.engine.models.variant import Variant

# Types whose forward counts positions from 0 in every pass, whatever the cache holds; `generate` tells them.
_COUNT_FROM_ZERO = frozenset({"bamba", "kimi_linear"})


class TransformersCache(KVCache):
    """transformers' cache with the measures our decode loop asks for; it grows as it is filled."""

    def __init__(self, capacity: int, config: Any, can_go_back: bool, prefix: torch.Tensor | None = None) -> None:
        """can_go_back: False for layers that remember more than keys and values, which can only start again.
        prefix: [layers, 2, kv_heads, length, head_dim] that every beginning begins with."""
        self._config, self._can_go_back, self._rows = config, can_go_back, prefix
        self.prefix = self.shift = 0 if prefix is None else prefix.shape[3]
        self.capacity = capacity + self.prefix
        self.layout = None
        self._text = torch.empty(0, dtype=torch.long)
        self._empty()

    def _empty(self) -> None:
        from transformers import DynamicCache

        self.inner: Any = DynamicCache(config=self._config)
        self.length = self.prefix
        for layer, (keys, values) in enumerate(() if self._rows is None else self._rows):
            self.inner.update(keys[None], values[None], layer)

    def truncate(self, length: int) -> None:
        if length <= self.prefix or (length < self.length and not self._can_go_back):
            self._empty()
        elif self._can_go_back:
            for layer in self.inner.layers:  # one by one: a forward pass that was stopped has filled only the first
                if (more := layer.get_seq_length() - length) > 0:
                    layer.crop(-more)
            self.length = min(self.length, length)

    def again(self, ids: torch.Tensor, switch: int) -> torch.Tensor:
        """What has to be read so that the cache holds `ids` too: these, or the whole text where it goes beyond `switch`
        positions for the first time."""
        text = torch.cat((self._text[: self.length - self.prefix], ids)) if self.length > self.prefix else ids
        crosses = 0 < self.length <= switch < self.prefix + len(text)
        self._text = text
        if not crosses or self.length == self.prefix:
            return ids
        self._empty()
        return text

    def whole(self, ids: torch.Tensor) -> torch.Tensor:
        """The text so far with `ids`, for models that keep nothing between passes."""
        self._text = torch.cat((self._text[: self.length - self.prefix], ids))
        return self._text

    @property
    def nbytes(self) -> int:
        tensors = (getattr(layer, name, None) for layer in self.inner.layers for name in ("keys", "values"))
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


class Fallback(PrefixedModel):
    """One transformers model."""

    def __init__(self, spec: ModelSpec, inner: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.inner = inner
        self._between: Callable[[], None] | None = None
        self._stopped: Exception | None = None
        self._compute: Callable[..., Any] = inner.__call__
        accepted = inspect.signature(inner.forward).parameters
        self._short = "logits_to_keep" in accepted
        self._switch = _switch(getattr(inner, "config", None))
        # RWKV, the first GPT, MiniMax and CPM-Ant take no cache of these: their whole text is read for each token.
        self._caches = ("past_key_values" in accepted or "cache_params" in accepted) and _takes_our_cache(inner)
        self._count_from_zero = getattr(getattr(inner, "config", None), "model_type", None) in _COUNT_FROM_ZERO
        self._cache_name = "past_key_values" if "past_key_values" in accepted else "cache_params"
        for layer in _layers(inner, spec.layers):
            layer.register_forward_pre_hook(self._pass)

    def _pass(self, module: nn.Module, arguments: Any) -> None:
        if self._between is None:
            return
        try:
            self._between()
        except Exception as error:
            self._stopped = error  # what the caller raised to stop is the caller's own
            raise

    def wear(self, variant: Variant) -> None:
        """A variant's network computes with the same face as `inner`."""
        super().wear(variant)
        self._compute = (self.inner if variant.network is None else variant.network).__call__

    def prepare(self, dtype: torch.dtype, device: str) -> None:
        for module in self.inner.modules():
            prepare_embedding(module, dtype)

    def new_cache(self, capacity: int, dtype: torch.dtype | None = None) -> KVCache:
        rows = self.prefix_key_values
        prefix = None if rows is None else rows.to(dtype or self.dtype)
        return TransformersCache(capacity, cast(Any, self.inner).config, self.spec.causal, prefix)

    def keys_of(self, rows: torch.Tensor) -> torch.Tensor:
        """What a cache holds after reading embeddings [length, hidden]: [layers, 2, kv_heads, length, head_dim]."""
        cache = TransformersCache(len(rows), cast(Any, self.inner).config, self.spec.causal)
        with torch.inference_mode():
            self._compute(inputs_embeds=rows[None], use_cache=True, **{self._cache_name: cache.inner})
        return torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in cache.inner.layers]).float()

    def forward(
        self,
        ids: torch.Tensor,
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
        between_layers: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        self._between = between_layers
        options: dict[str, Any] = {"logits_to_keep": 1} if last_only and self._short else {}
        if cache is None and self.prefix_key_values is not None:
            cache = self.new_cache(len(ids))
        try:
            if isinstance(cache, TransformersCache) and not self._caches:
                output = self._compute(input_ids=cache.whole(ids)[None], use_cache=False)
                cache.advance(ids.shape[0])
            elif isinstance(cache, TransformersCache):
                if self._switch is not None:
                    ids = cache.again(ids, self._switch)
                if self._count_from_zero:
                    options["position_ids"] = torch.arange(cache.length, cache.length + len(ids))[None].to(ids.device)
                output = self._compute(
                    input_ids=ids[None], use_cache=True, **{self._cache_name: cache.inner}, **options
                )
                cache.advance(ids.shape[0])
            else:
                output = self._compute(input_ids=ids[None], use_cache=False, **options)
        except Exception as error:
            if self._stopped is error or isinstance(error, MemoryError) or "memory" in str(error):
                raise
            raise Failed(
                tr(
                    "transformers cannot compute this {family} model: {error}",
                    family=one_line(self.spec.family, 40),
                    error=first_line(error),
                ),
                hint=tr("the installed transformers cannot run it with these settings; use another model"),
                code="fallback.compute",
            ) from error
        finally:
            self._between = self._stopped = None
        logits: torch.Tensor = output.logits[0]
        return (logits[-1:] if last_only else logits[-ids.shape[0] :]).float()


def _takes_our_cache(inner: nn.Module) -> bool:
    """transformers knows most of the types that do not; CPM-Ant's forward puts its prompt before a cached one again."""
    supports = getattr(inner, "_supports_default_dynamic_cache", None)
    return supports is None or (bool(supports()) and getattr(inner, "base_model_prefix", "") != "cpmant")


def first_line(error: Exception) -> str:
    return one_line(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__, 160)


def _layers(inner: nn.Module, count: int) -> list[nn.Module]:
    """The decoder's layers: the first list of modules that is as long as the config says."""
    lists = (module for module in inner.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return list(next(lists, ()))


def rope_types(config: Any) -> set[str]:
    """Of every kind of layer. Two look at how long the whole text is, so what was read is right for that text alone."""
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, Mapping))]
    return {str(part["rope_type"]) for part in parts if part.get("rope_type")}


def _switch(config: Any) -> int | None:
    """Positions up to which Phi's longrope takes its short factors. transformers' `generate` reads the whole text anew
    where an answer goes beyond them (`prepare_inputs_for_generation`); None for models that never do."""
    if getattr(config, "model_type", None) not in ("phi3", "phimoe", "phi4_multimodal"):
        return None
    length = getattr(config, "original_max_position_embeddings", None)
    return length if isinstance(length, int) and "longrope" in rope_types(config) else None
