"""What a run of tuning needs of a method; the loop itself (tuning/trainer.py) is the same for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn

from glmchat.engine.models.base import LanguageModel
from glmchat.tuning.effects import NEAR, Effects
from glmchat.tuning.forward import Flat, loss_of


class Method(ABC):
    """A model that was made ready to learn.

    parameters: the tensors that learn, by the names that they have in what is written. layers: how many layers learn.
    learns_pairs: an example is a pair of two documents, and the loss of a step is the mean over its pairs; else the
    mean over its learned tokens. measures: what else is told of a step, by itself the share of the learned tokens that
    had the highest logit; `measured`: the sums of them over all passes since it was set to zeros. makes: what `write`
    leaves. dtype: that products are computed in. stored: that the numbers of the result are rounded to. beside: the
    module of what learns and is no part of the model. virtual: positions before each document that learn;
    learns_words: they go through the layers as tokens do.
    """

    near: float = NEAR
    far: float = 3.0  # how much the loss may rise above its lowest before the run counts as broken: nats of a token
    learns_pairs: ClassVar[bool] = False
    measures: ClassVar[tuple[str, ...]] = ("token_accuracy",)
    makes: ClassVar[Literal["adapter", "model"]] = "adapter"
    dtype: torch.dtype
    stored: torch.dtype
    beside: nn.Module | None = None
    virtual = 0
    learns_words: ClassVar[bool] = False

    def __init__(self, model: LanguageModel, parameters: dict[str, nn.Parameter], layers: int) -> None:
        self.model, self.parameters, self.layers = model, parameters, layers
        self.measured = torch.zeros(len(self.measures), dtype=torch.float64)
        self.dtype = self.stored = model.dtype

    def loss(self, flat: Flat, *, by_layer: bool = False) -> torch.Tensor:
        """Sum of the losses of the learned tokens, or of the pairs, float32. by_layer: compute layers twice instead of
        keeping what they were given."""
        return loss_of(self.model, flat, by_layer=by_layer, hits=self.measured)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Within it the model by itself answers as it has learned to."""
        yield

    @abstractmethod
    def count(self) -> tuple[int, int]:
        """(numbers that learn, all numbers of the model with them)."""

    @abstractmethod
    def change(self) -> float:
        """How far the model was moved: the length of all that was added to it."""

    def settle(self) -> None:
        """Be what was written, rounded as that is; nothing is learned behind it."""
        return

    @abstractmethod
    def effects(self) -> Effects:
        """What was learned as a few numbers (tuning/effects.py); those of who reads it back may be off by `near`."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """What was learned, as files that others read, into a folder that is there."""

    def save(self, folder: Path) -> None:
        """What a checkpoint needs of it: the same, unless that is rounded or holds more."""
        self.write(folder)

    @abstractmethod
    def read(self, folder: Path) -> None:
        """Put the numbers that `save` wrote back. Raises Damaged where they do not fit."""

    def state_bytes(self) -> int:
        """Memory of gradients and moments, float32."""
        return sum(12 * value.numel() for value in self.parameters.values())

    def disk(self, keep: int) -> int:
        """Bytes that the run's folder may come to: `keep` checkpoints and the one that is written, numbers and moments
        in each."""
        return (keep + 1) * sum(12 * value.numel() for value in self.parameters.values())

    def may_rest(self, name: str) -> bool:
        """Whether a first gradient of zeros is no fault of this tensor."""
        return False
