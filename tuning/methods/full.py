"""All weights learn, or those of the last layers; what is left is a model's folder (tuning/weights.py).

The numbers that learn are float32 whatever the base's file has: a step moves a weight by less than bfloat16 can tell,
and would be lost. Products are computed in the type chosen, by torch's autocast; the result is in the base's own types.
Where that is bfloat16, what autocast computed with is the result; the float32 numbers by themselves, which no pass has
seen, can answer quite otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from glmchat.core.errors import Damaged, Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.families import Checkpoint
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.placement import choose_dtype
from glmchat.engine.quantize.linear import QuantLinear
from glmchat.tuning.effects import NEAR_NUMBERS, Effects, effects_of_model
from glmchat.tuning.forward import Flat, layers_of
from glmchat.tuning.methods.base import Method
from glmchat.tuning.pieces import own_of
from glmchat.tuning.settings import Settings
from glmchat.tuning.weights import moved, stored_type, write_model

WEIGHTS = "weights.safetensors"  # of a checkpoint: what learns, in float32


class Full(Method):
    makes: ClassVar[Literal["adapter", "model"]] = "model"
    near = NEAR_NUMBERS

    def __init__(self, checkpoint: Checkpoint, model: LanguageModel, settings: Settings) -> None:
        if any(isinstance(module, QuantLinear) for module in model.modules()):
            raise Usage(
                tr("the weights of this base are packed, and packed weights do not learn"),
                hint=tr("take the folder that it was packed from, in float16, bfloat16 or float32"),
                code="tune.packed",
            )
        self._checkpoint, self._moments = checkpoint, 2 if settings.moments == "bfloat16" else 4
        learning = learning_of(model, settings.last_layers)
        device = next(model.parameters()).device
        model.requires_grad_(False)
        for name, value in learning.items():  # of its own memory: the file is mapped, and may not be written to
            _own(model, name, value)
        parameters = {name: model.get_parameter(name) for name in learning}
        super().__init__(model, parameters, settings.last_layers or model.spec.layers)
        half = choose_dtype(settings.dtype, checkpoint, device.type)
        self.dtype = torch.bfloat16 if half == torch.bfloat16 else torch.float32
        self.stored = stored_type(checkpoint)

    def loss(self, flat: Flat, *, by_layer: bool = False) -> torch.Tensor:
        with torch.autocast(flat.ids.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return super().loss(flat, by_layer=by_layer)

    def count(self) -> tuple[int, int]:
        return sum(p.numel() for p in self.parameters.values()), sum(p.numel() for p in self.model.parameters())

    def change(self) -> float:
        return moved(self._checkpoint, self.model, self.parameters)

    def state_bytes(self) -> int:
        return sum((4 + 2 * self._moments) * p.numel() for p in self.parameters.values())

    def disk(self, keep: int) -> int:
        """Checkpoints of weights and moments, one of them while it takes the place of another, and the model."""
        learning, numbers = self.count()
        return (keep + 1) * (4 + 2 * self._moments) * learning + self.stored.itemsize * numbers

    def may_rest(self, name: str) -> bool:
        return True  # an expert that no token went to, the bias of a key

    @torch.no_grad()
    def settle(self) -> None:
        for value in self.parameters.values():
            own = own_of(value)
            own.copy_(own.to(self.stored))

    def effects(self) -> Effects:
        return effects_of_model(self.model)

    def write(self, folder: Path) -> None:
        write_model(self._checkpoint, self.model, folder)

    def save(self, folder: Path) -> None:
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.parameters.items()}
        save_file(tensors, folder / WEIGHTS)

    def read(self, folder: Path) -> None:
        saved = load_file(folder / WEIGHTS)
        wrong = [n for n, value in self.parameters.items() if n not in saved or saved[n].shape != value.shape]
        if wrong or len(saved) != len(self.parameters):
            name = wrong[0] if wrong else next(name for name in saved if name not in self.parameters)
            raise Damaged(
                tr("the checkpoint has nothing that fits for {name}", name=one_line(name, 120)),
                hint=tr("it belongs to a run with other settings"),
                code="tune.checkpoint",
            )
        with torch.no_grad():
            for name, value in self.parameters.items():
                value.copy_(saved[name])


def learning_of(model: LanguageModel, last: int) -> dict[str, torch.Tensor]:
    """The tensors that learn, by name, a matrix that is embedding and head once: all, or those of the `last` layers,
    without embedding, last norm and head. Raises Usage for more layers than there are."""
    if last > model.spec.layers:
        raise Usage(
            tr("the model has {count} layers, not {asked}", count=model.spec.layers, asked=last),
            hint=tr("leave out --last-layers, and all of it learns"),
            code="tune.layers",
        )
    named = dict(model.named_parameters())
    if not last:
        return dict(named)
    starts = tuple(f"{name}." for name, _ in layers_of(model)[-last:])
    return {name: value for name, value in named.items() if name.startswith(starts)}


def _own(model: LanguageModel, name: str, value: torch.Tensor) -> None:
    """Give every place of a parameter, of which a tied one has two, a float32 copy that learns."""
    fresh = nn.Parameter(value.detach().float().clone().contiguous(), requires_grad=True)
    for module in model.modules():
        for leaf, own in module._parameters.items():
            if own is value:
                module._parameters[leaf] = fresh
