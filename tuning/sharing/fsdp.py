"""FSDP as torch has it today (fully_shard, accelerate's `fsdp_version: 2`): each process holds a piece of every tensor,
and a unit is whole while it is computed and no longer."""

from __future__ import annotations

from collections.abc import Iterator
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
from glmchat.tuning.sharing.base import not_heard
from glmchat.tuning.sharing.cut import Cut, unit_bytes


class Fsdp(Cut):
    kind = "fsdp"

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
        self.find_places()
        mesh = init_device_mesh(self.device.partition(":")[0], (self.processes,))
        given = {"mesh": mesh, "offload_policy": self._plugin.cpu_offload}
        self._units = [layer for _, layer in layers_of(method.model)]
        self._gathered = unit_bytes(learner, self._units)
        for layer in self._units:
            fully_shard(layer, **given, reshard_after_forward=self._plugin.reshard_after_forward)
        self._root = fully_shard(learner, **given)
        self.name_anew()
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
        with super().whole(everything=everything, changes=changes):
            yield

    def whole_of(self, own: nn.Parameter) -> torch.Tensor:
        return whole_of(own.detach())

    def take(self, own: nn.Parameter, value: torch.Tensor) -> None:
        own.copy_(cut_as(own, value))

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
