"""Which quantised folders can be read: what config.json says of the layout of compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

METHOD, FORMAT = "compressed-tensors", "pack-quantized"


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
