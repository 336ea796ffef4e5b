"""Preferences as a method: a LoRA learns which of two answers is better.

DPO is of Rafailov et al. 2023, IPO of Azar et al. 2023. What it must not go far from is the same model with the LoRA
switched off, so there is no second copy of it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional

from glmchat.engine.families import Checkpoint
from glmchat.engine.models.base import LanguageModel
from glmchat.tuning.forward import Flat, losses_of
from glmchat.tuning.lora import switched_off
from glmchat.tuning.methods.lora import Lora
from glmchat.tuning.settings import Settings


class Dpo(Lora):
    """Documents come in twos, the better answer first. measures: rewards beta * (log p - log p of the base) of both
    answers, the share of pairs whose better one has the higher reward, and the difference of the rewards."""

    learns_pairs: ClassVar[bool] = True
    measures: ClassVar[tuple[str, ...]] = ("reward_chosen", "reward_rejected", "accuracy", "margin")

    def __init__(self, checkpoint: Checkpoint, model: LanguageModel, settings: Settings) -> None:
        super().__init__(checkpoint, model, settings)
        self._beta, self._is_ipo = settings.beta, settings.loss == "ipo"
        if self._is_ipo:  # a square, which begins at this height
            self.far = max(self.far, 1 / (4 * self._beta**2))

    def loss(self, flat: Flat, *, by_layer: bool = False) -> torch.Tensor:
        """Sum over the pairs. IPO compares means over the tokens of an answer, as its authors do and trl does."""
        ends = torch.tensor(flat.lengths, device=flat.ids.device).cumsum(0)
        document = torch.searchsorted(ends, flat.rows, right=True)  # [m]: which one each learned row is of
        nothing = torch.zeros(len(flat.lengths), dtype=torch.float64, device=flat.ids.device)
        with torch.no_grad(), switched_off(self.adapted):
            base = losses_of(self.model, flat).double()
        gained = nothing.index_add(0, document, base - losses_of(self.model, flat, by_layer=by_layer).double())
        rewards = self._beta * gained.detach()
        better, worse = rewards[0::2], rewards[1::2]
        sums = [better.sum(), worse.sum(), (better > worse).sum(), (better - worse).sum()]
        self.measured += torch.stack([each.double() for each in sums]).cpu()
        if self._is_ipo:
            gained = gained / nothing.index_add(0, document, torch.ones_like(base))
        apart = gained[0::2] - gained[1::2]
        each = (apart - 1 / (2 * self._beta)).square() if self._is_ipo else -functional.logsigmoid(self._beta * apart)
        return each.sum().float()
