"""Tensors of a GGUF file under the names and in the layout of a Hugging Face checkpoint.

Q4_0, Q4_1 and Q8_0 stay what they are (groups of 32), F32, F16 and BF16 stay memory maps, every other type is
dequantised by the gguf package.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from glmchat.checkpoints.gguf_file import PACKED, TYPES, GGUFFile, GGUFTensor, checkpoint_name, unread_type
from glmchat.engine.formats.weights import Bring, Int4, Int8, Stored, Words

_DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GGUFWeights:
    """The tensors of one validated file."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self._by_name = {checkpoint_name(name): tensor for name, tensor in file.tensors.items()}
        meta: Mapping[str, Any] = file.metadata
        architecture = meta.get("general.architecture")
        heads = meta.get(f"{architecture}.attention.head_count", 1)
        # llama.cpp's converter stores the query and key rows of the `llama` architecture with rotary pairs side by
        # side; checkpoints keep the two halves of each head apart.
        self._paired = {
            "q_proj": heads,
            "k_proj": meta.get(f"{architecture}.attention.head_count_kv", heads),
        } if architecture == "llama" else {}  # fmt: skip

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._by_name.items()}

    def read(self, name: str) -> Stored:
        stored = decode(self._file, self._by_name[name])
        order = self._order(name)
        if order is None:
            return stored
        return stored[order] if isinstance(stored, torch.Tensor) else stored.rows(order)

    def words(self, name: str, bring: Bring) -> Words | None:
        """See `weights.read_on`: the blocks are brought as they are and taken apart there."""
        tensor, order = self._by_name[name], self._order(name)
        if tensor.type_name not in PACKED or len(tensor.shape) != 2:
            return None
        words = _words(bring(_bytes(self._file, tensor)), tensor)
        return words if order is None else words.rows(order)

    def _order(self, name: str) -> torch.Tensor | None:
        """Of the rows of a checkpoint, where the file has another one."""
        heads = self._paired.get(name.rsplit(".", 2)[-2]) if name.startswith("model.layers.") else None
        return None if heads is None else halves_apart(self._by_name[name].shape[0], heads)


def halves_apart(rows: int, heads: int) -> torch.Tensor:
    """Row order that takes each head from (0, half, 1, half + 1, …) back to (0, 1, …, half, half + 1, …)."""
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).reshape(-1)


def decode(file: GGUFFile, tensor: GGUFTensor) -> Stored:
    """One tensor as it is stored; matrices of the native quantised types as records, everything else dense."""
    raw = file.data(tensor)
    if tensor.type_name in _DENSE:
        return _bytes(file, tensor, _DENSE[tensor.type_name]).view(tensor.shape)
    if tensor.type_name in PACKED and len(tensor.shape) == 2:
        return _packed(np.frombuffer(raw, np.uint8), tensor)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        dense = dequantize(
            np.frombuffer(raw, np.uint8).reshape(*tensor.shape[:-1], -1), GGMLQuantizationType(tensor.type)
        )
    except NotImplementedError:
        raise unread_type(tensor) from None
    return torch.from_numpy(np.ascontiguousarray(dense, np.float32)).view(tensor.shape)


def _bytes(file: GGUFFile, tensor: GGUFTensor, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """What the file holds of it, mapped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(file.data(tensor), dtype=dtype)


def _words(octets: torch.Tensor, tensor: GGUFTensor) -> Words:
    """octets uint8, the blocks of 32 weights: scale, of Q4_1 the minimum, codes."""
    out, width = tensor.shape
    _, block, block_bytes = TYPES[tensor.type]
    blocks = octets.view(out, width // block, block_bytes)
    scale = blocks[..., :2].contiguous().view(torch.float16)[..., 0].float()
    if tensor.type_name == "Q8_0":
        return Words.of_bytes((blocks[..., 2:] ^ 0x80).reshape(out, width), 8, scale, -128 * scale)
    low = -8 * scale
    if tensor.type_name == "Q4_1":
        low = blocks[..., 2:4].contiguous().view(torch.float16)[..., 0].float()
    nibbles = blocks[..., block_bytes - 16 :]  # [out, groups, 16]: 0-15 low, 16-31 high
    halves = (nibbles & 15, nibbles >> 4)
    codes = torch.cat([half[..., 0::2] | (half[..., 1::2] << 4) for half in halves], -1)
    return Words.of_bytes(codes.view(out, width // 2), 4, scale, low)


def _packed(raw: np.ndarray[Any, np.dtype[np.uint8]], tensor: GGUFTensor) -> Stored:
    out, width = tensor.shape
    _, block, block_bytes = TYPES[tensor.type]
    blocks = raw.reshape(out, width // block, block_bytes)
    scale = torch.from_numpy(blocks[..., :2].copy().view(np.float16)[..., 0].astype(np.float32))
    if tensor.type_name == "Q8_0":
        return Int8(torch.from_numpy(blocks[..., 2:].copy()).view(torch.int8).view(out, width), scale)
    if tensor.type_name == "Q4_1":
        low = torch.from_numpy(blocks[..., 2:4].copy().view(np.float16)[..., 0].astype(np.float32))
        zero = low + 8 * scale  # stored as q * scale + low, kept as (q - 8) * scale + zero
    else:
        zero = torch.zeros_like(scale)
    nibbles = torch.from_numpy(blocks[..., block_bytes - 16 :].copy())  # [out, groups, 16]: 0-15 low, 16-31 high
    q = torch.cat((nibbles & 15, nibbles >> 4), dim=-1)
    return Int4(q.view(out, width), scale, zero)
