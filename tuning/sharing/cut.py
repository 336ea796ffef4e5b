"""What ways of sharing have in common that leave to each process a piece of every tensor."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from glmchat.tuning.sharing.base import Sharing

Place = tuple[nn.Module, str]  # a module, and what it calls the parameter


class Cut(Sharing):
    """The units are the layers; embedding, head, last norm and what learns beside the model are one more."""

    in_step = True
    cuts_base = True

    def find_places(self) -> None:
        """Remember where each parameter stands, before anything is put in its place."""
        names = {id(value): name for name, value in self.method.parameters.items()}
        places = _places(self.learner)
        self._learning = {names[key]: found for key, found in places.items() if key in names}
        self._resting = [found for key, found in places.items() if key not in names]

    @abstractmethod
    def whole_of(self, own: nn.Parameter) -> torch.Tensor:
        """All of a parameter, for every process has to ask for it; may share its memory."""

    @abstractmethod
    def take(self, own: nn.Parameter, value: torch.Tensor) -> None:
        """Put this process's piece of a whole tensor, which every process has, into its parameter."""

    @contextmanager
    def whole(self, *, everything: bool = False, changes: bool = False) -> Iterator[None]:
        held = changes or self.main
        kept: list[tuple[list[Place], nn.Parameter, nn.Parameter]] = []
        for places in (*self._learning.values(), *(self._resting if everything else ())):
            own = _at(places)
            value = self.whole_of(own)
            if held:
                fresh = nn.Parameter(value.detach().to("cpu", copy=True), requires_grad=own.requires_grad)
                kept.append((places, own, fresh))
                _put(places, fresh)
        self.name_anew()
        try:
            yield
        finally:
            with torch.no_grad():
                for places, own, fresh in kept:
                    if changes:
                        self.take(own, fresh.detach())
                    _put(places, own)
            self.name_anew()

    def agreed(self, number: int) -> int:
        told = torch.tensor(number, device=self.device)
        torch.distributed.broadcast(told, 0)
        return int(told)

    def name_anew(self) -> None:
        """The tensors that learn, as they stand in the modules now."""
        self.method.parameters = {name: _at(self._learning[name]) for name in self.method.parameters}


def unit_bytes(learner: nn.Module, layers: Sequence[nn.Module]) -> int:
    """Of what is whole at a time: the last unit, and of the layers one and the one behind it, with a gradient."""
    inside = [_bytes(layer) for layer in layers]
    return _bytes(learner) - sum(inside) + 2 * max(inside)


def _bytes(module: nn.Module) -> int:
    return sum(value.nbytes * (2 if value.requires_grad else 1) for value in module.parameters())


def _places(learner: nn.Module) -> dict[int, list[Place]]:
    """Where each parameter stands; one that is tied stands in several."""
    found: dict[int, list[Place]] = {}
    for module in learner.modules():
        for leaf, value in module._parameters.items():
            if value is not None:
                found.setdefault(id(value), []).append((module, leaf))
    return found


def _at(places: Sequence[Place]) -> nn.Parameter:
    module, leaf = places[0]
    return cast(nn.Parameter, module._parameters[leaf])


def _put(places: Sequence[Place], value: nn.Parameter) -> None:
    for module, leaf in places:
        module._parameters[leaf] = value
