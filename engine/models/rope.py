"""Rotary frequencies (Su et al. 2021) with the scalings by which a longer context stays in the trained range.

The forms are those of transformers' `modeling_rope_utils`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from glmchat.checkpoints.spec import ModelSpec


def rotary_frequencies(head_dim: int, theta: float) -> torch.Tensor:
    """theta ** (-2i / head_dim) for i in 0 .. head_dim / 2."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)


def scaled_frequencies(spec: ModelSpec) -> tuple[torch.Tensor, float]:
    """Radians per position [head_dim / 2] with the configuration's scaling, and the factor of cos and sin.

    `linear` divides all by the factor. `llama3` (Llama 3.1) divides those whose wavelength is longer than the original
    context / low_freq_factor, keeps those shorter than the original context / high_freq_factor, and blends between.
    `yarn` does so by dimension, between those that turn `fast` and `slow` times in the original context.
    """
    theta: float = spec.extra["theta"]
    frequencies = rotary_frequencies(spec.head_dim, theta)
    scaling: Mapping[str, float] = spec.extra["rope"]
    if not scaling:
        return frequencies, 1.0
    factor = scaling["factor"]
    if "fast" in scaling:
        kept = 1 - _ramp(scaling, theta, spec.head_dim)
        return frequencies / factor * (1 - kept) + frequencies * kept, scaling["attention"]
    if "low" not in scaling:
        return frequencies / factor, 1.0
    wavelengths = 2 * math.pi / frequencies
    low, high = scaling["low"], scaling["high"]
    blend = ((scaling["original"] / wavelengths - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / factor), 1.0


def _ramp(scaling: Mapping[str, float], theta: float, width: int) -> torch.Tensor:
    """0 for pairs that turn often enough to be left alone, 1 for those that are divided, [width / 2]."""

    def dimension(turns: float) -> float:
        return width * math.log(scaling["original"] / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling["fast"]), dimension(scaling["slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high = high + 0.001 if low == high else high
    return ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
