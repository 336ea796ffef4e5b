"""The compressed-tensors layout `pack-quantized`: codes in int32 words, and what config.json says of them.

Source: compressed-tensors 0.20, `compressors/pack_quantized`. A matrix `x.weight` is stored as
    x.weight_packed      int32 [out, ceil(in * bits / 32)]: code + 2^(bits-1), the first input in the lowest bits
    x.weight_scale       [out, groups]
    x.weight_zero_point  int32 [ceil(out * bits / 32), groups], packed along the rows; only if asymmetric
    x.weight_shape       int64 [2]
and weight = (code - zero point) * scale. glmchat's own addition: `x.weight_offset` float32 [out, groups], in files that
the index does not list, for grids whose zero is no multiple of the scale.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn import functional

SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_offset")
METHOD, FORMAT = "compressed-tensors", "pack-quantized"


def packed_width(inputs: int, bits: int) -> int:
    """int32 words in a packed row."""
    return -(-inputs * bits // 32)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """codes uint8 [rows, columns] below 2^bits -> int32 [rows, packed_width]."""
    fill = -codes.shape[1] % (32 // bits)
    codes = functional.pad(codes, (0, fill)) if fill else codes
    if bits == 4:
        codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return codes.flatten().view(torch.int32).view(len(codes), -1)


def unpack(words: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 [rows, columns]."""
    codes = words.flatten().view(torch.uint8).view(len(words), -1)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    return codes[:, :columns].contiguous()


def pack_points(points: torch.Tensor) -> torch.Tensor:
    """Four-bit zero points uint8 [out, groups] -> int32 [ceil(out / 8), groups]."""
    return pack(points.T.contiguous(), 4).T.contiguous()


def unpack_points(words: torch.Tensor, rows: int) -> torch.Tensor:
    return unpack(words.T.contiguous(), 4, rows).T.contiguous()


def describe(schemes: Mapping[tuple[int, int, bool], Iterable[str]], dense: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a folder.

    schemes: (bits, group or 0 for one scale a row, symmetric) -> module names. dense: modules left as they are.
    """
    groups = {}
    for number, ((bits, group, symmetric), names) in enumerate(sorted(schemes.items())):
        groups[f"group_{number}"] = {
            "targets": sorted(names),
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "group" if group else "channel",
                "group_size": group or None,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        # transformers 5.23 with compressed-tensors 0.20 reads zero points and packed embeddings only this way.
        "dequantize": True,
        "config_groups": groups,
        "ignore": sorted(dense),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def is_ours_to_read(config: Mapping[str, Any]) -> bool:
    """True for a config.json whose weights are in this layout, with weights of 4 or 8 bits and plain activations."""
    described = config.get("quantization_config")
    if not isinstance(described, Mapping) or described.get("quant_method") != METHOD:
        return False
    groups = described.get("config_groups")
    if described.get("format") != FORMAT or not isinstance(groups, Mapping) or not groups:
        return False
    return all(_readable(group) for group in groups.values())


def _readable(group: Any) -> bool:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    return (
        isinstance(weights, Mapping)
        and weights.get("type", "int") == "int"
        and weights.get("num_bits") in (4, 8)
        and weights.get("strategy") in ("group", "channel")
        and not weights.get("actorder")
        and not group.get("input_activations")
    )
