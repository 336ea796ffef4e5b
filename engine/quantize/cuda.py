"""cpm_kernels (`glmchat[cuda]`) as a way to multiply and unpack INT8 weights on NVIDIA cards.

The package (OpenBMB, 2022) is what the published ChatGLM checkpoints call. Its INT8 product rounds activations to 8
bits, which would not be weight-only quantisation: here an activation is two such numbers, 256 * high + low, and the
product is computed for both, so that 16 bits of it count. For many rows its scaling kernel writes weights as float16.
"""

from __future__ import annotations

import ctypes.util
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch.nn import functional

from glmchat.core.files import read_file, read_text
from glmchat.engine.quantize.kernels import BLOCK_VALUES, Kernel, Packed, Shape, half_if_exact

_FEW = 4  # rows of input that go through the INT8 product
_ROWS = 32_768  # rows of weights in one launch: its grid ends at 65,535
_STEPS = 127 * 256  # of an activation's range


class CpmKernels(Kernel):
    """`packed` holds "codes" int8 [out, in] and "scale" [out, 1]."""

    name = "cpm_kernels"
    bits: ClassVar[tuple[int, ...]] = (8,)

    def unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return "no CUDA device"
        try:
            package()
        except Exception as error:  # noqa: BLE001 - its import asks drivers and libraries, and raises what they say
            return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        return None

    def accepts(self, shape: Shape) -> bool:
        return super().accepts(shape) and shape.groups == 1 and shape.in_features % 4 == 0

    def pack(
        self, shape: Shape, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        return {"codes": codes.contiguous(), "scale": half_if_exact(scale)}

    def rows(self, shape: Shape, packed: Packed, ids: torch.Tensor) -> torch.Tensor:
        return packed["codes"][ids].float() * packed["scale"][ids].float()

    def linear(self, shape: Shape, packed: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = self._few(shape, packed, x) if x.shape[0] <= _FEW else self._many(shape, packed, x)
        return (y if bias is None else y + bias.float()).to(x.dtype)

    def _few(self, shape: Shape, packed: Packed, x: torch.Tensor) -> torch.Tensor:
        """float32 [n, out] by the package's INT8 product."""
        count, wide = x.shape[0], x.float()
        largest = wide.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        steps = (wide * (_STEPS / largest)).round_()
        high = torch.floor((steps + 128) / 256)
        halves = torch.cat((high, steps - 256 * high)).to(torch.int8)
        # The result is float16: sums are divided by a power of two, so that the largest possible one fits.
        shift = max(0, math.ceil(math.log2(127 * 128 * shape.in_features / 65504)))
        of_rows = torch.full((min(shape.out_features, _ROWS),), 1.0, dtype=torch.float16, device=x.device)
        of_inputs = torch.full((2 * count,), 2.0**-shift, dtype=torch.float16, device=x.device)
        parts = []
        for start in range(0, shape.out_features, _ROWS):
            codes = packed["codes"][start : start + _ROWS]
            out = torch.empty(2 * count, codes.shape[0], dtype=torch.float16, device=x.device)
            package().gemv_broadcast_mat_int8(
                2 * count, codes.shape[0], shape.in_features, of_rows.data_ptr(), codes.data_ptr(),
                of_inputs.data_ptr(), halves.data_ptr(), out.data_ptr(), _stream(x),
            )  # fmt: skip
            parts.append(out.float())
        sums = torch.cat(parts, 1)
        return (256 * sums[:count] + sums[count:]) * (2.0**shift / _STEPS * largest) * packed["scale"].float().view(-1)

    def _many(self, shape: Shape, packed: Packed, x: torch.Tensor) -> torch.Tensor:
        """The same for many rows: weights are unpacked to float16 by the package, block by block, and multiplied."""
        step = min(_ROWS, max(1, BLOCK_VALUES // shape.in_features))
        of_rows = packed["scale"].half().view(-1)
        of_inputs = torch.ones(shape.in_features, dtype=torch.float16, device=x.device)
        parts = []
        for start in range(0, shape.out_features, step):
            codes, scale = packed["codes"][start : start + step].int(), of_rows[start : start + step]
            weights = torch.empty(codes.shape, dtype=torch.float16, device=x.device)
            package().gemm_scale(
                1, *codes.shape, codes.data_ptr(), scale.data_ptr(), of_inputs.data_ptr(), weights.data_ptr(), False,
                False, _stream(x),
            )  # fmt: skip
            parts.append(functional.linear(x, weights.to(x.dtype)).float())
        return torch.cat(parts, 1)


def _stream(x: torch.Tensor) -> int:
    return int(torch.cuda.current_stream(x.device).cuda_stream) if x.is_cuda else 0


@cache
def package() -> Any:
    """`cpm_kernels.kernels`, with what it looks for supplied. Raises what its import raises."""
    with _supplied():
        return import_module("cpm_kernels.kernels")


@contextmanager
def _supplied() -> Iterator[None]:
    """While it is imported: `pkg_resources`, which setuptools no longer has, for the files with its kernels, and the
    CUDA libraries of torch's own wheels, which stand in no place where the linker looks."""
    own, find = sys.modules.get("pkg_resources"), ctypes.util.find_library
    if own is None:
        sys.modules["pkg_resources"] = _resources()
    ctypes.util.find_library = lambda name: _library(name) or find(name)
    try:
        yield
    finally:
        ctypes.util.find_library = find
        if own is None:
            del sys.modules["pkg_resources"]


def _resources() -> ModuleType:
    def path(module: str, name: str) -> Path:
        return Path(str(sys.modules[module].__file__)).parent / name

    made = ModuleType("pkg_resources")
    made.resource_exists = lambda module, name: path(module, name).is_file()  # type: ignore[attr-defined]
    made.resource_string = lambda module, name: read_file(path(module, name))  # type: ignore[attr-defined]
    return made


def _library(name: str) -> str | None:
    """The file of a CUDA library that this process has loaded already, or that came with torch: "cudart"."""
    with suppress(OSError):
        found = re.search(rf"/\S*/lib{re.escape(name)}\.so\S*", read_text(Path("/proc/self/maps"), errors="replace"))
        if found:
            return found[0]
    wheels = (path for folder in sys.path for path in Path(folder or ".").glob(f"nvidia/*/lib/lib{name}.so*"))
    return next(map(str, wheels), None)
