"""The decoder step in C (step.h): one call for a token of each of some sequences, where torch needs a dozen operations
a layer.

A model of the kind that it knows says which of its modules do what (`Parts`); the step keeps their addresses. Whatever
it does not know (another device, float16, exact float32 products, foreign modules) is computed by torch as before.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from glmchat.checkpoints.spec import ModelSpec
from glmchat.engine.adapters.low_rank import AdaptedLinear, bare, fused
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.models.layers import RMSNorm
from glmchat.engine.models.parts import LayerParts, NotCompiled, Parts
from glmchat.engine.native.attention import CACHE_TYPES, LARGEST_HEAD, WIDTH, CacheState
from glmchat.engine.native.cpu import ROWS, NativeCpu, Weight, native_library, weight_of
from glmchat.engine.quantize.linear import QuantEmbedding, QuantLinear

_ALIGNMENT = 64
MOST_ROWS = 16  # sequences that advance together
_SPARE = 64  # stretches more than are needed now: the room lasts for so many times 128 tokens
_pointer, _size, _number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Product(ctypes.Structure):
    _fields_ = (
        ("weight", Weight),
        ("dense", _pointer),
        ("gain", _pointer),
        ("offset", _pointer),
        ("down", _pointer),
        ("up", _pointer),
        ("rank", _size),
        ("dense_bf16", _number),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("input_norm", _pointer),
        ("second_norm", _pointer),
        ("attention_norm", _pointer),
        ("feed_forward_norm", _pointer),
        ("query_norm", _pointer),
        ("key_norm", _pointer),
        ("qkv", _pointer),
        ("o_proj", _pointer),
        ("gate_up", _pointer),
        ("down_proj", _pointer),
        ("qkv_count", _size),
        ("gate_up_count", _size),
    )


class _Network(ctypes.Structure):
    _fields_ = (
        ("layer", _pointer),
        ("embedding", _pointer),
        ("head", _pointer),
        ("last_norm", _pointer),
        ("frequencies", _pointer),
        ("layers", _size),
        ("hidden", _size),
        ("heads", _size),
        ("kv_heads", _size),
        ("head_dim", _size),
        ("ffn", _size),
        ("rotated", _size),
        ("rank", _size),
        ("interleaved", _number),
        ("coarse", _number),
        ("eps", ctypes.c_float),
    )


class _Row(ctypes.Structure):
    _fields_ = (
        ("net", _pointer),
        ("cache", _pointer),
        ("embedded", _pointer),
        ("token", _size),
        ("position", _size),
    )


class CompiledStep:
    """One model as it is now. Raises NotCompiled with the reason if there is something that C does not know.

    base: which weights it multiplies by; steps of equal ones compute rows together, whatever their adapters add.
    """

    most_rows = MOST_ROWS

    def __init__(self, parts: Parts, spec: ModelSpec) -> None:
        if reason := NativeCpu().unavailable():
            raise NotCompiled(reason)
        if next(parts.last_norm.parameters()).device.type != "cpu":
            raise NotCompiled("the model lies on a card")
        frequencies = parts.frequencies
        if frequencies is None or parts.alpha is not None or parts.rotary == "two positions" or not parts.gated:
            raise NotCompiled(f"{spec.family} has no compiled step")
        if spec.hidden_size % WIDTH or spec.ffn_size % WIDTH or spec.head_dim % WIDTH:
            raise NotCompiled("a width is not a multiple of 16")
        if spec.head_dim > LARGEST_HEAD:
            raise NotCompiled(f"heads of {spec.head_dim}")
        self._alive: list[Any] = []  # what the addresses point to
        self._coarse = False  # some weights are
        self._weights: list[Hashable] = []
        self.vocab = cast(int, bare(parts.head).out_features)  # an adapter may bring other words
        self._embedding = parts.embedding
        layers = [self._layer(layer) for layer in parts.layers]
        head = self._products([parts.head])
        self._network = _Network(
            self._keep((_Layer * len(layers))(*layers)),
            self._rows(parts.embedding),
            head,
            self._norm(parts.last_norm),
            self._numbers(frequencies),
            len(layers),
            spec.hidden_size,
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            spec.ffn_size,
            len(frequencies),
            0,
            parts.rotary == "interleaved",
            self._coarse,
            parts.eps,
        )
        self.base = (self._coarse, *self._weights)
        self._address = ctypes.addressof(self._network)
        self._network.rank = native_library().glm_step_rank(self._address)
        self._room = torch.empty(0, dtype=torch.uint8)
        self._room_for = (0, 0, 0)  # rank, rows, stretches

    def takes(self, cache: KVCache) -> bool:
        keys = cache.keys[0]
        return keys.device.type == "cpu" and keys.dtype in CACHE_TYPES and cache.length < cache.capacity

    def __call__(self, token: int, cache: KVCache, position: int, second_position: int = 0) -> torch.Tensor:
        """float32 logits [vocab] behind `token`; its keys and values are in the cache, whose length has not moved."""
        return self.rows([token], [cache], [position])[0]

    def rows(
        self,
        tokens: Sequence[int],
        caches: Sequence[KVCache],
        positions: Sequence[int],
        steps: Sequence[CompiledStep] = (),
    ) -> torch.Tensor:
        """float32 logits [rows, vocab] behind one token of each sequence; as `__call__` gives them, to the bit.

        steps: of each row, where they are several of the same `base`: the model as that row's adapters make it.
        """
        logits = torch.empty(len(tokens), self.vocab)
        self._run(tokens, caches, positions, logits.data_ptr(), self._network.layers, steps)
        return logits

    def seconds(self, cache: KVCache, layers: int) -> float:
        """What the first `layers` layers take for one token, for measuring."""
        started = time.perf_counter()
        self._run([0], [cache], [0], None, min(layers, self._network.layers))
        return time.perf_counter() - started

    def _run(
        self,
        tokens: Sequence[int],
        caches: Sequence[KVCache],
        positions: Sequence[int],
        logits: int | None,
        layers: int,
        steps: Sequence[CompiledStep] = (),
    ) -> None:
        if not 0 < len(tokens) <= MOST_ROWS:
            raise ValueError(f"{len(tokens)} rows")
        steps = steps or [self] * len(tokens)
        if any(step is not self and step.base != self.base for step in steps):
            raise ValueError("rows of different weights")
        library = native_library()
        rank = max(step._network.rank for step in steps)
        stretches = sum(library.glm_step_stretches(cache.length) for cache in caches)
        if self._room_for[:2] != (rank, len(tokens)) or self._room_for[2] < stretches:
            room_for = rank, len(tokens), stretches + _SPARE
            size = library.glm_step_room(self._address, *room_for)
            self._room = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
            self._room_for = room_for  # only now: there may have been no memory
        rows, kept = (_Row * len(tokens))(), []
        for row, token, cache, position, step in zip(rows, tokens, caches, positions, steps, strict=True):
            row.net, row.cache = step._address, ctypes.addressof(_state(cache))
            if not step._network.embedding:  # one by one: torch's products of several rows have other bits
                kept.append(step._embedding(torch.tensor([token])).float().contiguous())
                row.embedded = kept[-1].data_ptr()
            row.token, row.position = token, position
        room = -(-self._room.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        library.glm_step_run(ctypes.addressof(rows), len(tokens), room, logits, layers, torch.get_num_threads())

    def _layer(self, parts: LayerParts) -> _Layer:
        for together in (parts.qkv, parts.gate_up):
            if len(together) > 1:
                fused(together)  # what torch fuses for prompts must have moved before addresses are taken
        return _Layer(
            self._norm(parts.input_norm),
            self._norm(parts.second_norm),
            *(
                None if norm is None else self._norm(norm)
                for norm in (parts.attention_norm, parts.feed_forward_norm, parts.query_norm, parts.key_norm)
            ),
            self._products(parts.qkv),
            self._products([parts.o_proj]),
            self._products(parts.gate_up),
            self._products([parts.down_proj]),
            len(parts.qkv),
            len(parts.gate_up),
        )

    def _products(self, modules: Sequence[nn.Module]) -> int:
        return self._keep((_Product * len(modules))(*(self._product(module) for module in modules)))

    def _product(self, module: nn.Module) -> _Product:
        base = bare(module)
        is_linear = type(module) in (nn.Linear, QuantLinear, AdaptedLinear) and type(base) in (nn.Linear, QuantLinear)
        if not is_linear or module._forward_hooks or base._forward_hooks:
            raise NotCompiled(f"a layer is a {type(module).__name__}")
        product = self._matrix(cast("nn.Linear | QuantLinear", base))
        tensors = base.packed.values() if isinstance(base, QuantLinear) else [cast(torch.Tensor, base.weight)]
        self._weights += [t.data_ptr() for t in (*tensors, base.bias) if isinstance(t, torch.Tensor)]
        self._weights.append((base.out_features, base.bias is None))
        if isinstance(module, AdaptedLinear):
            change = module.change
            product.gain = None if change.gain is None else self._numbers(change.gain)
            product.offset = None if change.offset is None else self._numbers(change.offset)
            product.rank = change.down.shape[1]
            up = functional.pad(change.up, (0, -change.up.shape[1] % ROWS))
            up = up.view(len(up), up.shape[1] // ROWS, ROWS).transpose(0, 1)  # [blocks, rank, 32]; a bias has rank 0
            product.down, product.up = self._numbers(change.down.t()), self._numbers(up)
        return product

    def _matrix(self, base: nn.Linear | QuantLinear) -> _Product:
        bias = None if base.bias is None else self._numbers(base.bias)
        if base.in_features % WIDTH:
            raise NotCompiled(f"a matrix of {base.in_features} inputs")
        if isinstance(base, QuantLinear):
            if not isinstance(base.kernel, NativeCpu) or base.kernel.exact:
                raise NotCompiled(
                    "float32 is multiplied exactly" if base.kernel.exact else f"kernel {base.kernel.name}"
                )
            self._alive.append(base.packed)
            self._coarse |= base.kernel.coarse
            weight = weight_of(base.shape, base.packed, base.kernel.coarse)
            weight.bias = bias
            return _Product(weight)
        weight = Weight(bias=bias, outputs=base.out_features, inputs=base.in_features)
        return self._dense(weight, base.weight)

    def _dense(self, weight: Weight, values: torch.Tensor) -> _Product:
        fits = values.device.type == "cpu" and values.is_contiguous()
        if not fits or values.dtype not in (torch.float32, torch.bfloat16):
            raise NotCompiled(f"dense weights in {values.dtype} on {values.device}")
        self._alive.append(values)
        return _Product(weight, dense=values.data_ptr(), dense_bf16=values.dtype == torch.bfloat16)

    def _rows(self, embedding: nn.Module) -> int | None:
        """The address of an embedding whose rows C looks up; None for one that torch does."""
        if type(embedding) is QuantEmbedding and type(embedding.linear) is QuantLinear:
            return self._keep((_Product * 1)(self._matrix(embedding.linear)))
        if type(embedding) is nn.Embedding:
            weight = Weight(outputs=embedding.num_embeddings, inputs=embedding.embedding_dim)
            return self._keep((_Product * 1)(self._dense(weight, embedding.weight)))
        return None

    def _norm(self, norm: nn.Module) -> int:
        if type(norm) is not RMSNorm:
            raise NotCompiled(f"a norm is a {type(norm).__name__}")
        return self._numbers(norm.weight)

    def _numbers(self, values: torch.Tensor) -> int:
        wide = values.detach().float().contiguous()
        self._alive.append(wide)
        return wide.data_ptr()

    def _keep(self, made: Any) -> int:
        self._alive.append(made)
        return ctypes.addressof(made)


def _state(cache: KVCache) -> CacheState:
    """A cache as C knows it, as long as it is now."""
    state = cache.addresses
    if state is None:
        pointers = [(_pointer * len(rows))(*(row.data_ptr() for row in rows)) for rows in (cache.keys, cache.values)]
        number = CACHE_TYPES.index(cache.keys[0].dtype)
        state = CacheState(*(ctypes.addressof(p) for p in pointers), cache.capacity, 0, number)
        cache.addresses = state
        state.kept = pointers
    state.length = cache.length
    return cast(CacheState, state)
