"""DeepSpeed's ZeRO: moments lie in pieces (stage 1), gradients too (2), and all weights (3).

What DeepSpeed keeps is reached by its own functions for it (deepspeed.utils.safe_…), since it lies in flat pieces of
many tensors each; what is written is what one process writes.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from glmchat.core.language import tr
from glmchat.tuning import faults, state
from glmchat.tuning.forward import layers_of
from glmchat.tuning.methods.base import Method
from glmchat.tuning.optimiser import optimiser_of
from glmchat.tuning.settings import Settings
from glmchat.tuning.sharing.base import not_heard
from glmchat.tuning.sharing.cut import Cut, unit_bytes

_KINDS = ("exp_avg", "exp_avg_sq")


class Zero(Cut):
    def __init__(self, accelerator: Any, device: str) -> None:
        if device == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # where there are cards, too
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # its own calls, at every pass
        import deepspeed
        from accelerate import DeepSpeedPlugin

        super().__init__(accelerator, device)
        self._deepspeed = deepspeed
        given = DeepSpeedPlugin().deepspeed_config
        _refuse_unheard(given)
        self._zero = {key: value for key, value in given["zero_optimization"].items() if value != "auto"}
        self.stage = int(self._zero["stage"])
        self.kind = f"deepspeed-{self.stage}"
        self.cuts_base = self.stage == 3
        self.home = "cpu" if self.cuts_base else device

    def cut(self, learner: nn.Module, method: Method, settings: Settings) -> None:
        self.learner, self.method = learner, method
        self.find_places()
        values = list(method.parameters.values())
        sizes = [value.numel() for value in values]
        usual = min(sum(sizes), 2 * max(sizes))  # by itself DeepSpeed takes 2 GB, whatever learns
        self._zero = {"reduce_bucket_size": usual, **self._zero}
        layers = [layer for _, layer in layers_of(method.model)]
        self._gathered = unit_bytes(learner, layers) if self.cuts_base else 0
        if self.cuts_base:
            for layer in layers:  # whole at once, as a unit: some of its weights are read from outside their modules
                self._deepspeed.utils.set_z3_leaf_module(layer, True)
            layers[0].register_forward_pre_hook(_ask_for_gradient)
        # Its kernel for processes of one machine is compiled at the first start, for minutes; gloo does the same.
        self._deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        self._engine, self.optimiser, _, _ = self._deepspeed.initialize(
            model=learner,
            model_parameters=values,
            optimizer=optimiser_of(values, settings),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": settings.clip,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": 1 << 40,
                "zero_optimization": self._zero,
            },
        )
        self.call = self._engine
        if self.cuts_base:
            inside = {id(value) for layer in layers for value in layer.parameters()}
            for value in learner.parameters():
                if id(value) not in inside:  # read outside their modules, too: the head, what stands before documents
                    for module in (learner, method.model):
                        self._deepspeed.zero.register_external_parameter(module, value)

    def join(self) -> None:
        pass

    def rehearse(self, flat: Any) -> None:
        self._engine.set_gradient_accumulation_boundary(False)
        self._engine.backward(self.call(flat) * 0.0)  # zeros are kept for the first step

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def between(self, *, last: bool) -> Any:
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def check_gradients(self) -> None:
        grad_of = self._deepspeed.utils.safe_get_full_grad
        faults.require_gradients(self.method.parameters, self.method.may_rest, grad_of)

    def norm(self, clip: float) -> float:
        """DeepSpeed cuts to `clip` in its step, by the same norm."""
        if not self.cuts_base:
            return float(self.optimiser.scaled_global_norm())
        local = [self._deepspeed.utils.safe_get_local_grad(value) for value in self.method.parameters.values()]
        squares = sum((value.double().square().sum() for value in local), torch.zeros((), dtype=torch.float64))
        return math.sqrt(float(self.summed(squares.float())))

    def step(self) -> None:
        self._engine.step()

    def learning_bytes(self, needed: int) -> int:
        """DeepSpeed keeps another copy of what learns, in float32, and a buffer for gradients on their way."""
        learning = 4 * sum(math.prod(_shape_of(value)) for value in self.method.parameters.values())
        gradients = learning if self.stage == 1 else 0
        bucket = 4 * int(self._zero["reduce_bucket_size"])
        return int(gradients + bucket + (needed - gradients + learning) // self.processes + self._gathered)

    @contextmanager
    def reading(self) -> Iterator[None]:
        beside = [] if self.method.beside is None else list(self.method.beside.parameters())
        with self._deepspeed.zero.GatheredParameters(beside, enabled=self.cuts_base and bool(beside)):
            yield

    @contextmanager
    def whole(self, *, everything: bool = False, changes: bool = False) -> Iterator[None]:
        with _unhooked(self.method.beside), super().whole(everything=everything, changes=changes):
            yield

    def whole_of(self, own: nn.Parameter) -> torch.Tensor:
        if not self.cuts_base:
            return own.detach()
        with self._deepspeed.zero.GatheredParameters([own]):
            return own.detach().clone()

    def take(self, own: nn.Parameter, value: torch.Tensor) -> None:
        utils = self._deepspeed.utils
        if self.cuts_base:
            with self._deepspeed.zero.GatheredParameters([own], modifier_rank=0):
                own.data.copy_(value)
            if own.requires_grad:
                utils.safe_set_local_fp32_param(own, self._piece_of(own, value))
        else:
            own.copy_(value)
            utils.safe_set_full_fp32_param(own, value)

    def moments(self) -> dict[str, torch.Tensor]:
        states = [each for each in self._engine.basic_optimizer.state.values() if each]
        if not states:
            return {}
        found = {}
        for name, parameter in self.method.parameters.items():
            for kind in _KINDS:
                whole = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, kind)
                if self.main:
                    found[f"{name}.{kind}"] = whole.to(states[0][kind].dtype).cpu().contiguous()
            if self.main:
                found[f"{name}.step"] = states[0]["step"].detach().cpu().clone()
        return found

    def restore(self, moments: dict[str, torch.Tensor]) -> None:
        utils, optimiser = self._deepspeed.utils, self._engine.basic_optimizer
        learning = self.method.parameters.items()
        saved = {name: state.moments_of(name, _shape_of(value), moments) for name, value in learning}
        first = next(iter(saved.values()))
        own = self.optimiser.fp32_partitioned_groups_flat if self.cuts_base else None
        for flat in own or self.optimiser.single_partition_of_fp32_groups:
            zeros = {kind: torch.zeros_like(flat, dtype=first[kind].dtype) for kind in _KINDS}
            optimiser.state[flat] = {"step": first["step"].clone(), **zeros}
        if not self.cuts_base:
            self.optimiser._lazy_init_hp_params_optimizer_state()  # as its first step does
        for name, parameter in self.method.parameters.items():
            for kind in _KINDS:
                value = saved[name][kind].to(self.device)
                if self.cuts_base:
                    utils.safe_set_local_optimizer_state(parameter, self._piece_of(parameter, value), kind)
                else:
                    utils.safe_set_full_optimizer_state(parameter, value, kind)

    def _piece_of(self, own: Any, value: torch.Tensor) -> torch.Tensor:
        """This process's part of a whole tensor, as stage 3 cuts it: flat, and filled up with zeros at the end."""
        size = own.ds_tensor.numel()
        flat = torch.zeros(size * self.processes, dtype=value.dtype, device=value.device)
        flat[: value.numel()] = value.flatten()
        return flat[size * self.index : size * (self.index + 1)]


def _refuse_unheard(given: Mapping[str, Any]) -> None:
    """given: DeepSpeed's configuration, as accelerate has it from its own or from a file of DeepSpeed's."""
    zero = given["zero_optimization"]
    if zero["stage"] not in (1, 2, 3):
        raise not_heard("zero_stage", "1, 2, 3", tr("without pieces, plain processes do it (docs/tuning.md)"))
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device") == "nvme":
            raise not_heard(f"{name}_device", "none, cpu", tr("checkpoints are not read out of its files on the disk"))
    for name in ("optimizer", "scheduler"):
        if name in given:
            raise not_heard(name, tr("left out"), tr("the run has its own: --lr, --optimiser-dtype"))
    for name in ("fp16", "bf16"):
        if given.get(name, {}).get("enabled") is True:
            raise not_heard(f"{name}.enabled", "false", tr("--dtype says what products are computed in"))


@contextmanager
def _unhooked(module: nn.Module | None) -> Iterator[None]:
    """Within it what learns beside the model may be called while whole tensors stand in the place of its pieces."""
    own = [] if module is None else [(one, one._forward_pre_hooks, one._forward_hooks) for one in module.modules()]
    for one, before, _ in own:
        one._forward_pre_hooks, one._forward_hooks = type(before)(), type(before)()
    try:
        yield
    finally:
        for one, before, behind in own:
            one._forward_pre_hooks, one._forward_hooks = before, behind


def _ask_for_gradient(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Behind a frozen embedding nobody asks for it, and DeepSpeed takes the layer for done before it began."""
    if torch.is_grad_enabled():
        inputs[0].requires_grad_()


def _shape_of(parameter: Any) -> tuple[int, ...]:
    """Of all of a parameter, also where stage 3 has left a piece of it here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
