"""One kernel table per device: who multiplies packed weights, chosen once and checked on a small matrix.

A kernel owns a layout: it packs codes, looks rows up again, and multiplies. The tables below are in order of
preference; `choose` takes the first kernel that this machine has, that accepts the shape, and that passes its self-test
against the reference. What was passed over, and why, stands in `kernel_report()` for `glmchat doctor` and the status
line.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import ClassVar

import torch
from torch.nn import functional

from glmchat.engine.formats.weights import Words

Packed = Mapping[str, torch.Tensor]
Multiply = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Shape:
    """The measures of one quantised matrix [out_features, in_features]; `group` inputs of a row share a scale."""

    out_features: int
    in_features: int
    bits: int
    group: int

    @property
    def groups(self) -> int:
        return self.in_features // self.group


class Kernel(ABC):
    """How one device stores and multiplies weights of one width. Stateless: one object serves every layer.

    A weight is `code * scale + minimum`. Codes are 0..15 at 4 bits; at 8 bits they are -128..127, without a minimum.
    """

    name: str
    bits: ClassVar[tuple[int, ...]] = (4, 8)
    any_dtype: ClassVar[bool] = False  # as fast on float32 activations as on bfloat16 ones
    exact: bool = False  # plain float32 products in float32, where the kernel has a faster, less exact way
    has_coarse: ClassVar[bool] = False  # at 4 bits it can round activations to 8 bits, which is faster and less exact
    coarse: bool = False  # and does

    def accepts(self, shape: Shape) -> bool:
        return shape.bits in self.bits

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this machine cannot run it, or None if it can."""

    @abstractmethod
    def pack(
        self, shape: Shape, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """codes [out, in] uint8 or int8, scale and minimum [out, groups] float32 -> the tensors a layer keeps."""

    def pack_words(self, shape: Shape, stored: Words) -> dict[str, torch.Tensor]:
        """The same from words, for a kernel whose layout they are; others take them apart."""
        if shape.bits == 4:
            return self.pack(shape, stored.codes(), stored.scale, stored.low)
        return self.pack(shape, (stored.codes() ^ 0x80).view(torch.int8), stored.scale, None)

    @abstractmethod
    def rows(self, shape: Shape, packed: Packed, ids: torch.Tensor) -> torch.Tensor:
        """Dequantised rows `ids` [n] (int64) as float32 [n, in]."""

    @abstractmethod
    def linear(self, shape: Shape, packed: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [n, in] (float32, bfloat16 or float16) times the matrix, plus bias: [n, out] in x's dtype."""

    def fuse(self, parts: Sequence[tuple[Shape, Packed]]) -> tuple[dict[str, torch.Tensor], list[Packed]] | None:
        """Matrices that read the same input, below each other: the whole, and the parts as views into it.

        None if this kernel's layout, or these measures, do not allow it.
        """
        return None

    def bind(self, shape: Shape, packed: Packed) -> Multiply:
        """`linear` for one layer: (x, bias) -> y. What does not change from call to call may be prepared here."""
        return partial(self._bound, shape, packed)

    def _bound(self, shape: Shape, packed: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.linear(shape, packed, x, bias)


# Modules are imported when a device is first asked for, so that a CPU engine never touches CUDA code.
_TABLES: dict[str, tuple[str, ...]] = {
    "cpu": ("native.cpu:NativeCpu", "quantize.aten:AtenCpu", "quantize.kernels:Reference"),
    "cuda": ("quantize.kernels:CpmKernels", "gpu.words:CardWords", "quantize.kernels:Reference"),
    "other": ("quantize.kernels:Reference",),
}
PASSED_OVER: dict[tuple[str, int], dict[str, str]] = {}
_CHOSEN: dict[tuple[str, int], str] = {}


@cache
def kernels_of(device: str) -> tuple[Kernel, ...]:
    made = []
    for entry in _TABLES.get(device, _TABLES["other"]):
        module, _, name = entry.partition(":")
        made.append(getattr(import_module(f"glmchat.engine.{module}"), name)())
    return tuple(made)


@cache
def _works(kernel: Kernel, device: str, bits: int) -> bool:
    """Run the kernel once against plain arithmetic. A failure is remembered under its name, never raised."""
    reason = kernel.unavailable()
    if reason is None:
        try:
            reason = self_test(kernel, device, bits)
        except Exception as error:  # noqa: BLE001 - Triton's compiler, its launcher's missing gcc: all mean "not this one"
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    if reason is not None:
        PASSED_OVER.setdefault((device, bits), {})[kernel.name] = reason
    return reason is None


def self_test(kernel: Kernel, device: str, bits: int) -> str | None:
    """Compare with the definition at one row and at many. Returns what is wrong, or None."""
    shape = Shape(128, 256, bits, 64 if bits == 4 else 256)
    noise = torch.Generator().manual_seed(7)
    low, high = (0, 16) if bits == 4 else (-127, 128)
    codes = torch.randint(low, high, (128, 256), generator=noise, dtype=torch.int16)
    codes = codes.to(torch.uint8 if bits == 4 else torch.int8)
    scale = torch.rand(128, shape.groups, generator=noise) * 0.01 + 0.01
    minimum = -scale * torch.randint(4, 12, scale.shape, generator=noise) if bits == 4 else None
    scale, minimum = scale.half().float(), None if minimum is None else minimum.half().float()
    weight = codes.float() * scale.repeat_interleave(shape.group, 1)
    if minimum is not None:
        weight = weight + minimum.repeat_interleave(shape.group, 1)
    placed = [t if t is None else t.to(device) for t in (codes, scale, minimum)]
    packed = kernel.pack(shape, placed[0], placed[1], placed[2])  # type: ignore[arg-type]
    for count in (1, 3, 40):
        x = torch.randn(count, 256, generator=noise).bfloat16()
        expected = x.float() @ weight.T
        product = kernel.linear(shape, packed, x.to(device), None).float().cpu()
        error = (product - expected).abs().max() / expected.abs().max()
        if not error < 0.02:  # bfloat16 results and scales; a wrong layout is off by about 1; NaN fails too
            return f"differs from the reference by {error:.1%} at {count} rows"
    product = kernel.rows(shape, packed, torch.arange(128, device=device)).cpu()
    error = (product - weight).abs().max() / weight.abs().max()
    return None if error < 0.01 else f"dequantised rows differ by {error:.1%}"


def choose(shape: Shape, device: str = "cpu") -> Kernel:
    """The best kernel for this shape on this device type ("cpu", "cuda", "mps")."""
    for kernel in kernels_of(device):
        if kernel.accepts(shape) and _works(kernel, device, shape.bits):
            kernel = _faster(kernel, shape, device)
            _CHOSEN.setdefault((device, shape.bits), kernel.name)
            return kernel
    raise RuntimeError(f"no kernel for {shape} on {device}")  # the reference accepts everything: unreachable


def _faster(first: Kernel, shape: Shape, device: str) -> Kernel:
    """On a card another kernel takes the place of the first where it needs less than half of its time; whoever loses is
    named with both times. Half, because whole tokens are one graph of the first alone."""
    if device != "cuda":
        return first
    rivals = [k for k in kernels_of(device) if k is not first and type(k) is not Reference and k.accepts(shape)]
    times = {k: product_seconds(k, device, shape.bits) for k in (first, *rivals) if _works(k, device, shape.bits)}
    fastest = min(times, key=lambda kernel: times[kernel])
    winner = fastest if times[fastest] < times[first] / 2 else first
    for loser in set(times) - {winner}:
        PASSED_OVER.setdefault((device, shape.bits), {})[loser.name] = (
            f"{times[loser] * 1e6:.0f} us for a product of 4096 x 4096, {winner.name}: {times[winner] * 1e6:.0f} us"
        )
    return winner


@cache
def product_seconds(kernel: Kernel, device: str, bits: int, size: int = 4096) -> float:
    """Seconds of one row times a matrix [size, size]: the best of five rounds of ten."""
    shape = Shape(size, size, bits, 128 if bits == 4 else size)
    codes = torch.ones(size, size, dtype=torch.uint8 if bits == 4 else torch.int8, device=device)
    scale = torch.full((size, shape.groups), 0.01, device=device)
    packed = kernel.pack(shape, codes, scale, -scale if bits == 4 else None)
    x = torch.ones(1, size, dtype=torch.float16, device=device)
    kernel.linear(shape, packed, x, None)  # what is compiled at its first use is no part of its time
    best = float("inf")
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        for _ in range(10):
            kernel.linear(shape, packed, x, None)
        _wait(device)
        best = min(best, (time.perf_counter() - started) / 10)
    return best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True, slots=True)
class KernelReport:
    """Which kernel runs on a device at a width, and what was passed over: {kernel: reason}."""

    device: str
    bits: int
    kernel: str
    passed_over: Mapping[str, str]


def kernel_report(device: str = "cpu") -> list[KernelReport]:
    """For `glmchat doctor` and the status line; runs the self-tests if they have not run yet."""
    reports = []
    for bits in (4, 8):
        kernel = choose(Shape(128, 256, bits, 64 if bits == 4 else 256), device)
        passed_over = dict(PASSED_OVER.get((device, bits), {}))
        reports.append(KernelReport(device, bits, kernel.name, passed_over))
    return reports


BLOCK_VALUES = 1 << 22  # weights unpacked at a time: 16 MB of float32


def half_if_exact(values: torch.Tensor) -> torch.Tensor:
    """float16 where it loses nothing (GGUF's and THUDM's scales are float16), else the float32 that came in."""
    half = values.half()
    return half if torch.equal(half.float(), values) else values


class Reference(Kernel):
    name = "torch"

    def unavailable(self) -> str | None:
        return None

    def pack(
        self, shape: Shape, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        packed = {"scale": half_if_exact(scale)}
        if minimum is not None:
            packed["minimum"] = half_if_exact(minimum)
        if shape.bits == 8 or shape.in_features % 2:
            packed["codes"] = codes.contiguous()
        else:
            packed["codes"] = codes[:, 0::2] | (codes[:, 1::2] << 4)  # low nibble: even input
        return packed

    def pack_words(self, shape: Shape, stored: Words) -> dict[str, torch.Tensor]:
        if shape.bits == 8:
            return super().pack_words(shape, stored)
        codes = stored.words.view(torch.uint8)
        return {"scale": half_if_exact(stored.scale), "minimum": half_if_exact(stored.low), "codes": codes}

    def _dequantise(self, shape: Shape, packed: Packed, at: slice | torch.Tensor) -> torch.Tensor:
        codes = packed["codes"][at]
        if codes.shape[1] != shape.in_features:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1)
        values = codes.reshape(-1, shape.groups, shape.group).float()
        values *= packed["scale"][at].float().unsqueeze(-1)
        if "minimum" in packed:
            values += packed["minimum"][at].float().unsqueeze(-1)
        return values.reshape(-1, shape.in_features)

    def rows(self, shape: Shape, packed: Packed, ids: torch.Tensor) -> torch.Tensor:
        return self._dequantise(shape, packed, ids)

    def linear(self, shape: Shape, packed: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = x.new_empty(x.shape[0], shape.out_features)
        step = max(1, BLOCK_VALUES // shape.in_features)
        compute = x if x.device.type != "cpu" else x.float()  # no 16-bit dense product is fast on every CPU
        for start in range(0, shape.out_features, step):
            block = self._dequantise(shape, packed, slice(start, start + step)).to(compute.dtype)
            y[:, start : start + step] = functional.linear(compute, block)
        return y if bias is None else y.add_(bias.to(y.dtype))


class CpmKernels(Reference):
    """cpm_kernels (`glmchat[cuda]`), looked at and passed over, so that `doctor` can say why.

    The package has no kernel that extracts packed weights: those lived in the checkpoints' own code, which never runs
    here. Its INT8 product takes INT8 activations, which would not be weight-only quantisation.
    """

    name = "cpm_kernels"
    bits = (8,)

    def unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return "no CUDA device"
        try:
            import_module("cpm_kernels")
        except Exception as error:  # noqa: BLE001 - RuntimeError without a driver, ModuleNotFoundError for pkg_resources
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return "its INT8 product rounds activations to 8 bits, and it has no kernel that unpacks weights"
