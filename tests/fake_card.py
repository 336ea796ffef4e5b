"""Two pretend cards: tensors that compute on the CPU, claim to lie on `fakegpu:0` or `fakegpu:1`, and refuse what a
card refuses.

Importing this module registers the device; `torch.device("fakegpu")`, `.to("fakegpu")` and factory calls then work. As
with CUDA, a tensor of a card meets one of the other card, and a CPU tensor of one dimension or more, only in copies,
and host code gets no pointer to it: `data_ptr()` and `numpy()` raise. `record()` lists what makes the host wait and
what crosses over, so that a test can say what a token may cost.

Tried with torch 2.13 (`_setup_privateuseone_for_python_backend`, experimental there). It says nothing about speed,
streams, graphs or numbers of lower precision; it finds wrong placement, which no machine without a card shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fakegpu"
CARDS = 2


class _DeviceModule:
    """What torch asks of a device's module."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def device_count() -> int:
        return CARDS

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None: ...

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @staticmethod
    def synchronize(device: object = None) -> None:
        _note("synchronize", 0)


_setup_privateuseone_for_python_backend(rename=NAME, backend_module=_DeviceModule())
DEVICE = torch.device(NAME, 0)
_log: list[tuple[str, int]] | None = None


def _note(what: str, elements: int) -> None:
    if _log is not None:
        _log.append((what, elements))


@contextlib.contextmanager
def record() -> Iterator[list[tuple[str, int]]]:
    """Inside: each wait of the host and each copy between host and card, as (what, elements)."""
    global _log
    _log = []
    try:
        yield _log
    finally:
        _log = None


_largest: int | None = None


@contextlib.contextmanager
def short_of_memory(largest: int) -> Iterator[None]:
    """Inside, the card has no room for any one tensor of more bytes than this."""
    global _largest
    _largest = largest
    try:
        yield
    finally:
        _largest = None


def _take(raw: torch.Tensor) -> torch.Tensor:
    if _largest is not None and raw.nbytes > _largest:
        raise torch.OutOfMemoryError(
            f"CUDA out of memory. Tried to allocate {raw.nbytes / 2**10:.2f} KiB. GPU 0 is full."
        )
    return raw


class CardTensor(torch.Tensor):
    """A tensor of the pretend card; `raw` holds its numbers on the CPU."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor, card: int = 0) -> CardTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, card),
            requires_grad=False,
        )
        made.raw = raw
        return made

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"CardTensor({self.raw!r})"

    def tolist(self) -> Any:
        _note("tolist", self.numel())
        return self.raw.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert a tensor of the card to numpy: copy it to the host first")

    def data_ptr(self) -> int:
        raise RuntimeError("host code asked for a pointer into the card's memory")

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.raw.untyped_storage()  # its size, and which tensors are views of one

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return _run(func, args, kwargs or {})


_WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::_unique2",
}


def _is_card(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _card(device: Any) -> int:
    return 0 if device is None else torch.device(device).index or 0


def _copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    if isinstance(target, CardTensor) != isinstance(source, CardTensor):
        _note("to card" if isinstance(target, CardTensor) else "to host", source.numel())
    elif target.device != source.device:
        _note("between cards", source.numel())
    _bare(target).copy_(_bare(source))
    return target


def _bare(value: Any) -> Any:
    return value.raw if isinstance(value, CardTensor) else value


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    if name not in _WAITS and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        done = func.decompose(*args, **kwargs)  # inference mode brings composites here whole
        if done is not NotImplemented:
            return done
    if name == "aten::copy_":
        return _copy(args[0], args[1])
    wanted = kwargs.get("device")
    if name == "aten::_to_copy":
        return _to_copy(func, args[0], wanted, kwargs)
    flat, shape = tree_flatten((args, kwargs))
    cards = [value for value in flat if isinstance(value, CardTensor)]
    hosts = [value for value in flat if isinstance(value, torch.Tensor) and not isinstance(value, CardTensor)]
    mixed = [tuple(host.shape) for host in hosts if host.dim() > 0]
    if len({card.device for card in cards}) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {name} got {[str(card.device) for card in cards]}"
        )
    if cards and mixed:
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {name} got {NAME}:0 "
            f"{[tuple(card.shape) for card in cards]} and cpu {mixed}"
        )
    if name in _WAITS:
        _note(name, cards[0].numel() if cards else 0)
    bare_args, bare_kwargs = tree_unflatten([_bare(value) for value in flat], shape)
    if _is_card(wanted):
        bare_kwargs = {**bare_kwargs, "device": torch.device("cpu")}
    made = func(*bare_args, **bare_kwargs)
    if not (_is_card(wanted) or (cards and wanted is None)):
        return made
    in_place = {id(card.raw): card for card in cards}
    held = {card.raw.untyped_storage().data_ptr() for card in cards}  # a view of one of these takes nothing
    place = _card(wanted) if wanted is not None or not cards else _card(cards[0].device)

    def on_card(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in in_place:
            return in_place[id(value)]
        if value.untyped_storage().data_ptr() not in held:
            _take(value)
        return CardTensor(value, place)

    return tree_map(on_card, made)


def _to_copy(func: Any, source: torch.Tensor, wanted: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    from_card = isinstance(source, CardTensor)
    to_card = from_card if wanted is None else _is_card(wanted)
    if from_card != to_card:
        _note("to card" if to_card else "to host", source.numel())
    place = _card(source.device if wanted is None else wanted)
    if from_card and to_card and place != _card(source.device):
        _note("between cards", source.numel())
    plain = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    made = func(_bare(source), **plain)
    if not to_card:
        return made
    _take(made)
    return CardTensor(made, place)


def _fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    with torch.inference_mode(False), torch.no_grad():
        return _run(op, args, kwargs)


_everything = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
_everything.fallback(_fallback, dispatch_key="PrivateUse1")  # type: ignore[no-untyped-call]


# Factories, and `torch.tensor(…, device=…)`, work below the Python key and want these by name.
def _empty(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> CardTensor:
    return CardTensor(_take(torch.empty(size, dtype=dtype)), _card(device))


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> CardTensor:
    return CardTensor(_take(torch.empty_strided(size, stride, dtype=dtype)), _card(device))


def _arange(start: Any, end: Any, step: Any = 1, *, dtype: Any = None, device: Any = None, **_: Any) -> CardTensor:
    return CardTensor(torch.arange(start, end, step, dtype=dtype), _card(device))


_named: dict[str, Callable[..., Any]] = {
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "arange": lambda end, **options: _arange(0, end, **options),
    "arange.start": _arange,
    "arange.start_step": _arange,
    "copy_": _copy,
    "_copy_from": lambda source, target, non_blocking=False: _copy(target, source),
}
_aten = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
for _operator, _made in _named.items():
    _aten.impl(_operator, _made, "PrivateUse1")  # type: ignore[no-untyped-call]
