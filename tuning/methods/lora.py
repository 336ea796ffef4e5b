"""LoRA as a method: low-rank factors beside the base's layers, written as PEFT's folder (tuning/lora.py)."""

from __future__ import annotations

from pathlib import Path

from glmchat.checkpoints.adapter_fit import names_of
from glmchat.engine.families import Checkpoint
from glmchat.engine.models.base import LanguageModel
from glmchat.tuning import lora
from glmchat.tuning.effects import NEAR_LENGTHS, Effects, effect
from glmchat.tuning.methods.base import Method
from glmchat.tuning.settings import Settings


class Lora(Method):
    def __init__(self, checkpoint: Checkpoint, model: LanguageModel, settings: Settings) -> None:
        self._shape = lora.LoraShape(
            settings.rank, settings.alpha, settings.dropout, settings.targets, settings.rslora, settings.dora
        )
        lora.prepare(model)
        self._linears = dict(model.named_modules())
        self.adapted = lora.attach(model, self._shape, settings.seed)
        self._across = checkpoint.family.transposed is not None
        self._base = next(iter(names_of(checkpoint.path, checkpoint.config)), "")
        super().__init__(model, lora.trainable(self.adapted), len(self.adapted))
        if settings.dora:
            self.near = NEAR_LENGTHS

    def count(self) -> tuple[int, int]:
        return lora.count(self.model, self.adapted)

    def change(self) -> float:
        return lora.change_norm(self.adapted)

    def effects(self) -> Effects:
        return {name: effect(name, *layer.product()) for name, layer in self.adapted.items()}

    def write(self, folder: Path) -> None:
        lora.write_adapter(
            folder, self.adapted, self._shape, self._base, lies_in_out=self._across, linears=self._linears
        )

    def may_rest(self, name: str) -> bool:
        return ".lora_A" in name  # as long as B is zero, which it is at the beginning

    def read(self, folder: Path) -> None:
        lora.read_into(folder, self.adapted)
