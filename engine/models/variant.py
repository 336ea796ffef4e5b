"""A model as some adapters make it, put on and taken off while answers are being written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Derived:
    """What was derived from the modules of a model as they stood at `basis`, for the time when they stand so again.

    blocks: of each `Block`. step: the compiled step, where `has_step`.
    """

    basis: int
    blocks: Sequence[Any]
    step: Any
    not_compiled: str
    has_step: bool


class Variant:
    """layers: place -> the module that stands there. network: computes in place of the whole, or None.

    prefix: what caches begin with, as in `PrefixedModel.set_prefix`; None: with the model's own, if it has one.
    """

    prefix: torch.Tensor | None = None
    shifts = False
    derived: Derived | None = None  # kept while the model wears another one

    def __init__(self, layers: Mapping[str, nn.Module] | None = None, network: nn.Module | None = None) -> None:
        self.layers = dict(layers or {})
        self.network = network
