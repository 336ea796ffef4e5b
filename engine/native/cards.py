"""What torch itself says of cards, once it is loaded: what it has code for, what is free, and what lies where."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from glmchat.checkpoints.card_fit import card_need, device_plan, nearest
from glmchat.checkpoints.device_plan import DevicePlan, evenly
from glmchat.checkpoints.spec import ModelSpec
from glmchat.core.cards import Card, Cards, TorchBuild, compiler_obstacle, look, written
from glmchat.core.errors import DoesNotFit, Usage
from glmchat.core.language import tr
from glmchat.core.machine import available_memory
from glmchat.core.text import human_bytes, one_line

_UNITS = {"b": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_LAST_NORM = re.compile(r"\.(norm|final_layernorm|ln_f)\.(weight|bias)$")


def torch_build() -> TorchBuild:
    """What this torch was built with, and the compute capabilities that it has code for."""
    cuda = torch.version.cuda
    built = None if cuda is None else (int(cuda.split(".")[0]), int(cuda.split(".")[1]))
    codes = [code.partition("_")[2].rstrip("af") for code in torch.cuda.get_arch_list() if code.startswith("sm_")]
    return TorchBuild(torch.__version__, built, tuple((int(code[:-1]), int(code[-1])) for code in codes))


def seen() -> Cards:
    """The cards of this process, with free memory as it is now. The driver is asked; torch only where NVML is missing,
    since it takes half a gigabyte of each card that it asks."""
    found = look()
    if found.driver is None and torch.cuda.is_available():
        cards = [_by_torch(number) for number in range(torch.cuda.device_count())]
        return Cards(tuple(cards), "?", None, len(cards))
    return found


def _by_torch(number: int) -> Card:
    properties: Any = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    capability = (properties.major, properties.minor)
    return Card(number, properties.name, f"GPU-{properties.uuid}", capability, total, free)


def choose_devices(
    asked: str, folder: Path, quant: int | None = None, dtype: str | None = None, context: int | None = None
) -> DevicePlan:
    """Where the model of `folder` goes: see `plan_device`. Other devices than "auto" and cards are taken as they are.

    Raises Usage for a device that is not there or cannot be used, DoesNotFit for a card that is full.
    """
    if asked == "mps" and not torch.backends.mps.is_available():
        raise Usage(
            tr("there is no device {device}", device=asked),
            hint=tr("--device auto uses what is available; `glmchat doctor` shows what that is"),
            code="device.missing",
        )
    names = asked.split(",")
    if len(names) == 1 and not asked.startswith(("auto", "cuda")):
        return DevicePlan((asked,))
    if not asked.startswith(("auto", "cuda")):
        need = card_need(folder, quant, dtype, context)
        layers = need.layers if need is not None else 1
        return evenly(names[:layers], layers)
    cards = seen()
    plan = device_plan(asked, folder, quant, dtype, context, cards=cards, build=torch_build())
    if not plan.devices[0].startswith("cuda"):
        return plan
    if (fault := start_fault()) is not None:
        if asked == "auto":
            return DevicePlan(("cpu",), reason=fault)
        raise Usage(
            tr("--device {device} cannot be used: {reason}", device=asked, reason=fault),
            hint=tr("`nvidia-smi` and `glmchat doctor` show what is wrong"),
            code="device.missing",
        )
    lacks = compiler_obstacle()  # Triton then starts nothing: torch computes on the card, more slowly
    reason = plan.reason if lacks is None else f"{plan.reason}; {lacks.sentence}"
    return replace(plan, devices=tuple(_numbered(device, cards) for device in plan.devices), reason=reason)


@cache
def start_fault() -> str | None:
    """Why CUDA does not start though the driver answers, in the driver's own words; None if it does."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return one_line((str(error).splitlines() or [type(error).__name__])[0])
    return None


def _numbered(device: str, cards: Cards) -> str:
    """The same card by torch's number: another one where the user has set CUDA_DEVICE_ORDER."""
    card = cards.at(device)
    for number in range(torch.cuda.device_count()):
        uuid = str(getattr(torch.cuda.get_device_properties(number), "uuid", ""))
        if card is not None and uuid and card.uuid.endswith(uuid):
            return f"cuda:{number}"
    return device


def set_up(plan: DevicePlan) -> None:
    """Make the first card of the plan the current one, on which Triton launches, and choose torch's operators."""
    if not plan.devices[0].startswith("cuda"):
        return
    make_current(plan.devices[0])
    # On Hopper torch would prefer cuDNN's attention, which plans anew for every length: 40 to 400 ms a token.
    torch.backends.cuda.enable_cudnn_sdp(False)


def make_current(device: str) -> None:
    """Triton launches on the current card, and on no other, whatever it is given."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)


def half_precision(config: Mapping[str, Any], device: str) -> torch.dtype:
    """The 16-bit type for a card: the checkpoint's own first, as float16 has three bits more than bfloat16; a card that
    only imitates bfloat16 (compute capability below 8.0) takes float16."""
    imitated = device.startswith("cuda") and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float16 if imitated or _stored(config) == "float16" else torch.bfloat16


def _stored(config: Mapping[str, Any]) -> Any:
    return config.get("torch_dtype") or config.get("dtype")


def needs_wide_residual(config: Mapping[str, Any], dtype: torch.dtype, device: str) -> bool:
    """Whether, on a card, what layers add up stays in float32: bfloat16 reaches further than float16, and networks that
    were trained in it carry sums beyond 65,504 from layer to layer (Qwen)."""
    return device != "cpu" and dtype == torch.float16 and _stored(config) != "float16"


def free_memory(device: str) -> int | None:
    """Bytes that can be taken on the device where a tensor is to lie; None where nobody says."""
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        # What the allocator holds and does not use is free for us.
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return available_memory() if device == "cpu" else None


def give_back() -> None:
    """Let the allocator return what it does not use, before something large is tried once more."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def no_memory(error: Exception, device: str, context: int) -> DoesNotFit:
    """The words for a card whose memory ran out while a model answered. context: tokens that were to be held."""
    return DoesNotFit(
        _short_of(error, device),
        hint=tr("use a smaller context (--context {value}), --quant 4, or --device cpu", value=max(512, context // 4)),
        code="memory",
    )


def _short_of(error: Exception, device: str) -> str:
    asked = re.search(r"[Tt]ried to allocate ([\d.]+) ([KMG]i?B|bytes)", str(error))
    wanted = float(asked[1]) * _UNITS[asked[2][0]] if asked else None
    free = free_memory(device)
    return tr(
        "the memory of {device} is full: {needed} more were needed, {free} are free",
        device=device,
        needed="?" if wanted is None else human_bytes(wanted),
        free="?" if free is None else human_bytes(free),
    )


@contextmanager
def load_in_words(folder: Path, quant: int | None, dtype: str | None, context: int, plan: DevicePlan) -> Iterator[None]:
    """Turns a card's end of memory during a load into DoesNotFit, with bytes and the nearest thing that fits."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        device = plan.devices[0]
        give_back()
        hint = nearest(folder, quant, dtype, None, free_memory(device) or 0)
        raise DoesNotFit(
            _short_of(error, device),
            hint=hint or tr("end what else runs on it (nvidia-smi shows it), or use --device cpu"),
            code="memory",
        ) from None


def device_of(parameter: str, spec: ModelSpec, plan: DevicePlan) -> str:
    """Where a parameter lies: a layer's with its layer, what comes before the layers on the first device, the last norm
    and a head of its own on the last one."""
    if len(plan.devices) == 1 or spec.layout is None:
        return plan.devices[0]
    layout = spec.layout(spec)
    number, _, rest = parameter.removeprefix(f"{layout.stack}.").partition(".")
    if number.isdecimal() and rest and parameter.startswith(f"{layout.stack}."):
        return plan.of_layer(int(number))
    return plan.devices[-1] if parameter in layout.ends[1:] or _LAST_NORM.search(parameter) else plan.devices[0]


def spread(model: nn.Module, spec: ModelSpec, plan: DevicePlan) -> None:
    """Of a model on several devices: what a layer, the last norm and the head are given is brought to where they lie.

    A head that is the embedding itself is computed where the embedding lies.
    """
    if len(plan.devices) == 1 or spec.layout is None:
        return
    layout = spec.layout(spec)
    names = [f"{layout.stack}.{number}" for number in range(spec.layers)]
    norms = list(dict.fromkeys(name.rpartition(".")[0] for name in layout.rest if _LAST_NORM.search(name)))
    heads = [name.removesuffix(".weight") for name in layout.ends[1:]]
    model.register_forward_pre_hook(lambda module, args: make_current(plan.devices[0]))
    for name in (*names, *norms, *heads):
        bring = _bring_to(device_of(f"{name}.weight", spec, plan))
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, bring=bring: bring((args, kwargs)), with_kwargs=True
        )
    if not heads:
        first = _bring_to(plan.devices[0])
        for name in norms:
            model.get_submodule(name).register_forward_hook(lambda module, args, result: first(result))


def _bring_to(device: str) -> Callable[[Any], Any]:
    """What makes `device` the current one and brings every tensor of a structure there."""
    place = torch.device(device)

    def bring(values: Any) -> Any:
        make_current(device)
        return tree_map(lambda value: value.to(place) if isinstance(value, torch.Tensor) else value, values)

    return bring


def card_facts(devices: tuple[str, ...]) -> dict[str, Any]:
    """What a replay and people want to know of the cards that compute; {} on any other device."""
    cards = [device for device in devices if device.startswith("cuda")]
    if not cards:
        return {}
    properties: list[Any] = [torch.cuda.get_device_properties(device) for device in cards]
    return {
        "card": " + ".join(one.name for one in properties),
        "capability": " + ".join(dict.fromkeys(written((one.major, one.minor)) for one in properties)),
        "driver": look().driver,
        "cuda": torch.version.cuda,
    }
