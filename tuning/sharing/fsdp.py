"""FSDP as torch has it today (fully_shard, accelerate's `fsdp_version: 2`): each process holds a piece of every tensor.

The units are the layers; embedding, head, last norm and what learns beside the model are one more. A unit is whole
while it is computed and no longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from glmchat.core.language import tr
from glmchat.tuning import state
from glmchat.tuning.forward import layers_of
from glmchat.tuning.methods.base import Method
from glmchat.tuning.optimiser import optimiser_of
from glmchat.tuning.pieces import cut_as, whole_of
from glmchat.tuning.settings import Settings
from glmchat.tuning.sharing.base import Sharing, not_heard

Place = tuple[nn.Module, str]  # a module, and what it calls the parameter


class Fsdp(Sharing):
    kind = "fsdp"
    in_step = True

    def __init__(self, accelerator: Any, device: str) -> None:
        from accelerate import FullyShardedDataParallelPlugin

        super().__init__(accelerator, device)
        self.home = "cpu"  # and from there piece by piece onto a card
        self._plugin = FullyShardedDataParallelPlugin()
        if self._plugin.activation_checkpointing:
            raise not_heard("fsdp_activation_checkpointing", "false", tr("--checkpointing on does it"))

    def cut(self, learner: nn.Module, method: Method, settings: Settings) -> None:
        self.learner, self.method = learner, method
        self.call = learner
        self._places = _places(learner)
        names = {id(value): name for name, value in method.parameters.items()}
        self._learning = {names[key]: places for key, places in self._places.items() if key in names}
        self._resting = [places for key, places in self._places.items() if key not in names]
        mesh = init_device_mesh(self.device.partition(":")[0], (self.processes,))
        given = {"mesh": mesh, "offload_policy": self._plugin.cpu_offload}
        self._units = [layer for _, layer in layers_of(method.model)]
        self._gathered = _unit_bytes(learner, self._units)
        for layer in self._units:
            fully_shard(layer, **given, reshard_after_forward=self._plugin.reshard_after_forward)
        self._root = fully_shard(learner, **given)
        self._name_anew()
        self.optimiser = optimiser_of(list(method.parameters.values()), settings)

    def join(self) -> None:
        pass

    def between(self, *, last: bool) -> Any:
        return super().between(last=True)  # each pass leaves its pieces: whole gradients are what there is no room for

    def norm(self, clip: float) -> float:
        grads = [value.grad for value in self.method.parameters.values() if value.grad is not None]
        if not grads:
            return 0.0
        norm = whole_of(torch.nn.utils.get_total_norm(grads))
        if clip:
            torch.nn.utils.clip_grads_with_norm_(list(self.method.parameters.values()), clip, norm)
        return float(norm)

    def learning_bytes(self, needed: int) -> int:
        return int(needed // self.processes + self._gathered)

    @contextmanager
    def reading(self) -> Iterator[None]:
        self._root.unshard()
        try:
            yield
        finally:
            self._root.reshard()

    @contextmanager
    def whole(self, *, everything: bool = False, changes: bool = False) -> Iterator[None]:
        for unit in (*self._units, self._root):
            cast(FSDPModule, unit).reshard()
        held = changes or self.main
        kept: list[tuple[list[Place], nn.Parameter, nn.Parameter]] = []
        for places in (*self._learning.values(), *(self._resting if everything else ())):
            own = _at(places)
            value = whole_of(own.detach()).cpu()
            if held:
                fresh = nn.Parameter(value, requires_grad=own.requires_grad)
                kept.append((places, own, fresh))
                _put(places, fresh)
        self._name_anew()
        try:
            yield
        finally:
            with torch.no_grad():
                for places, own, fresh in kept:
                    if changes:
                        own.copy_(cut_as(own, fresh.detach()))
                    _put(places, own)
            self._name_anew()

    def agreed(self, number: int) -> int:
        told = torch.tensor(number, device=self.device)
        torch.distributed.broadcast(told, 0)
        return int(told)

    def moments(self) -> dict[str, torch.Tensor]:
        found = {}
        for name, parameter in self.method.parameters.items():
            for kind, value in self.optimiser.state.get(parameter, {}).items():
                whole = whole_of(value.detach()).cpu().contiguous()
                if self.main:
                    found[f"{name}.{kind}"] = whole
        return found

    def restore(self, moments: dict[str, torch.Tensor]) -> None:
        state.restore_moments(self.optimiser, self.method.parameters, moments)

    def _name_anew(self) -> None:
        """The tensors that learn, as they stand in the modules now."""
        self.method.parameters = {name: _at(self._learning[name]) for name in self.method.parameters}


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


def _unit_bytes(learner: nn.Module, layers: Sequence[nn.Module]) -> int:
    """Of what is whole at a time: the last unit, and of the layers one and the one behind it, with a gradient."""
    inside = [_bytes(layer) for layer in layers]
    return _bytes(learner) - sum(inside) + 2 * max(inside)


def _bytes(module: nn.Module) -> int:
    return sum(value.nbytes * (2 if value.requires_grad else 1) for value in module.parameters())
