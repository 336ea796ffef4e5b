"""A linear layer, and an embedding, whose weights stay packed in 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import nn

from glmchat.engine.formats.weights import Words
from glmchat.engine.quantize.kernels import Kernel, Packed, Shape, choose


def _way(kernel: Kernel) -> tuple[type[Kernel], bool, bool]:
    """Layers that multiply in one way can be one product."""
    return type(kernel), kernel.exact, kernel.coarse


def kernels_in(model: nn.Module) -> list[str]:
    """What multiplies the packed weights of a model, each by its name once; [] where none are packed."""
    return list(dict.fromkeys(each.kernel.name for each in model.modules() if isinstance(each, QuantLinear)))


class QuantLinear(nn.Module):
    """`nn.Linear` over packed weights; the device's best kernel multiplies them (see kernels.py).

    Made by `from_int4` or `from_int8`. The packed tensors are buffers in the kernel's own layout, so a layer is not
    moved between devices: pack it where it will run.
    """

    bias: torch.Tensor | None

    def __init__(self, shape: Shape, kernel: Kernel, packed: Packed, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.in_features = shape.in_features
        self.out_features = shape.out_features
        self.bits = shape.bits
        self.group_size = shape.group
        self.shape = shape
        self.kernel = kernel
        self.register_buffer("bias", bias)
        # What `fused` made of this layer and its neighbours; in a tuple, so that it is no part of this module.
        self._fused: tuple[list[int], QuantLinear] | None = None
        self.hold(packed)

    @classmethod
    def from_int4(
        cls, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bias: torch.Tensor | None = None
    ) -> QuantLinear:
        """q [out, in] uint8 0..15; scale and zero [out, in / group] float32: weight = (q - 8) * scale + zero.

        GGUF's Q4_0 (zero = 0) and Q4_1 (zero = minimum + 8 * scale) map onto this without loss.
        Raises ValueError if the shapes do not fit together.
        """
        scale = scale.float()
        return cls._packed(q, scale, zero.float() - 8 * scale, bias, 4)

    @classmethod
    def from_int8(cls, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> QuantLinear:
        """q [out, in] int8; scale [out] or [out, in / group] float32: weight = q * scale."""
        scale = scale.float()
        return cls._packed(q, scale.unsqueeze(1) if scale.dim() == 1 else scale, None, bias, 8)

    @classmethod
    def from_words(cls, stored: Words, bias: torch.Tensor | None = None) -> QuantLinear:
        """A matrix in the words of its file, on the device where they will be multiplied."""
        rows, width = stored.words.shape
        columns = width * 32 // stored.bits
        shape = Shape(rows, columns, stored.bits, columns // stored.scale.shape[1])
        kernel = choose(shape, stored.words.device.type)
        return cls(shape, kernel, kernel.pack_words(shape, stored), bias)

    @classmethod
    def _packed(
        cls,
        q: torch.Tensor,
        scale: torch.Tensor,
        minimum: torch.Tensor | None,
        bias: torch.Tensor | None,
        bits: int,
    ) -> QuantLinear:
        rows, columns = q.shape
        if scale.shape[0] != rows or columns % scale.shape[1] or (minimum is not None and minimum.shape != scale.shape):
            raise ValueError(f"codes {tuple(q.shape)} and scales {tuple(scale.shape)} do not fit together")
        shape = Shape(rows, columns, bits, columns // scale.shape[1])
        kernel = choose(shape, q.device.type)
        return cls(shape, kernel, kernel.pack(shape, q, scale, minimum), bias)

    @classmethod
    def fused(cls, parts: Sequence[QuantLinear]) -> QuantLinear | None:
        """Layers that read the same input as one product: their outputs side by side, in the same bits.

        The parts become views into the whole, so memory is held once, and fusing them again gives the same whole. None
        where layouts or measures do not allow it.
        """
        first = parts[0]
        if first._fused is not None and first._fused[0] == [id(part.packed) for part in parts]:
            layer = first._fused[1]
            if _way(layer.kernel) == _way(first.kernel):
                return layer
        if any(_way(part.kernel) != _way(first.kernel) for part in parts):
            return None
        fusion = first.kernel.fuse([(part.shape, part.packed) for part in parts])
        if fusion is None:
            return None
        whole, views = fusion
        for part, view in zip(parts, views, strict=True):
            part.hold(view)
        biases = None
        if any(part.bias is not None for part in parts):
            there = next(part.bias for part in parts if part.bias is not None)
            biases = torch.cat(
                [there.new_zeros(part.out_features) if part.bias is None else part.bias for part in parts]
            )
        outputs = sum(part.out_features for part in parts)
        shape = Shape(outputs, first.in_features, first.bits, first.group_size)
        layer = cls(shape, first.kernel, whole, biases)
        first._fused = ([id(part.packed) for part in parts], layer)
        return layer

    def hold(self, packed: Packed) -> None:
        """Keep these tensors, which must be the same numbers as before in another place.

        Nobody need be told: who took the address of the old ones (the compiled step) keeps them alive.
        """
        self.packed = packed
        for name, tensor in packed.items():
            self.register_buffer(f"packed_{name}", tensor)
        self._multiply = self.kernel.bind(self.shape, packed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        if x.dim() == 2:
            return self._multiply(x, self.bias)
        flat = x.reshape(-1, self.in_features)
        return self._multiply(flat, self.bias).view(*x.shape[:-1], self.out_features)

    def multiply_exactly(self) -> None:
        """From now on plain float32 products in float32, whatever faster way the kernel has; for reference runs.

        The model that the layer belongs to is told with `changed`.
        """
        self._change_kernel(exact=True)

    def multiply_coarsely(self) -> bool:
        """From now on activations become 8 bits where they meet weights of 4, if the kernel can; whether it is so.

        The model that the layer belongs to is told with `changed`.
        """
        if self.bits != 4 or not self.kernel.has_coarse or self.kernel.exact:
            return False
        if not self.kernel.coarse:
            self._change_kernel(coarse=True, name=f"{self.kernel.name}-int8")
        return True

    def _change_kernel(self, **fields: Any) -> None:
        kernel = copy(self.kernel)  # the kernel itself serves other models
        vars(kernel).update(fields)
        self.kernel = kernel
        self._multiply = kernel.bind(self.shape, self.packed)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Rows `ids` [...] of the matrix as [..., in]: an embedding lookup in the same packed weights."""
        rows = self.kernel.rows(self.shape, self.packed, ids.reshape(-1))
        return rows.view(*ids.shape, self.in_features).to(dtype)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The whole matrix [out, in]."""
        device = next(iter(self.packed.values())).device
        return self.rows(torch.arange(self.out_features, device=device), dtype)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantLinear:
        """`model.to(dtype)` leaves packed weights as they are: their dtypes are a layout, not a precision.

        Raises RuntimeError for another device: each has a layout of its own, so weights are packed where they will run.
        """
        lies = next(iter(self.packed.values()))[:0]
        if fn(lies).device != lies.device:
            raise RuntimeError("packed weights are not moved: pack them on the device where they will run")
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights and the bias."""
        return sum(tensor.nbytes for tensor in self.packed.values()) + (0 if self.bias is None else self.bias.nbytes)

    def extra_repr(self) -> str:
        shape = f"{self.in_features}, {self.out_features}, bits={self.bits}, group={self.group_size}"
        return f"{shape}, bias={self.bias is not None}, kernel={self.kernel.name}"


class QuantEmbedding(nn.Module):
    """An embedding over packed rows; give it the head's QuantLinear and the two share their memory."""

    def __init__(self, linear: QuantLinear, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = linear
        self.dtype = dtype

    @property
    def num_embeddings(self) -> int:
        return self.linear.out_features

    @property
    def embedding_dim(self) -> int:
        return self.linear.in_features

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] -> [..., width] in the dtype of the activations."""
        return self.linear.rows(ids, self.dtype)
