"""glmchat's own CPU kernel (native.c, search.c), reached through ctypes: products, and the search for scales.

Absent where no compiler was there at install time.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch.nn import functional

from glmchat.core.files import read_file
from glmchat.engine.quantize.kernels import Kernel, Multiply, Packed, Shape

LAYOUT = 2  # of packed weights: those in the cache folder are of one layout
ROWS = 32


class Weight(ctypes.Structure):
    """glm_weight: one packed matrix."""

    packed: Packed  # what it points into

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("wide_scales", ctypes.c_int32),
        ("coarse", ctypes.c_int32),
        ("unit", ctypes.c_float),
    )


def sources_hash(folder: Path) -> str | None:
    """Of the C files there, as setup.py builds it into the library. None if there are none: a wheel has no C."""
    files = sorted(folder.glob("*.[ch]"))
    return hashlib.sha256(b"".join(read_file(path) for path in files)).hexdigest() if files else None


def open_library(folder: Path) -> ctypes.CDLL:
    """The library in this folder. Raises OSError with the reason: there is none, or the C files have changed since."""
    files = [p for suffix in EXTENSION_SUFFIXES if (p := folder / f"_native{suffix}").is_file()]
    if not files:
        raise OSError("not built: there was no C compiler when glmchat was installed")
    library = ctypes.CDLL(str(files[0]))
    built_from = getattr(library, "glm_sources", None)
    if built_from is not None:
        built_from.restype = ctypes.c_char_p
    sources = sources_hash(folder)
    if built_from is None or (sources is not None and built_from().decode() != sources):
        raise OSError(
            f"{files[0].name} was built from other C files than those beside it: "
            f"`pip install --no-deps -e {folder.parents[1]}` builds it again"
        )
    return library


@cache
def native_library() -> ctypes.CDLL:
    """The compiled functions. Raises OSError with the reason if there are none that fit."""
    library = open_library(Path(__file__).parent)
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.glm_linear.argtypes = (pointer, pointer, pointer, size, number, number, number)
    library.glm_rows.argtypes = (pointer, pointer, size, pointer)
    library.glm_rows.restype = None
    library.glm_pack.argtypes = (pointer, pointer, pointer, number)
    library.glm_pack.restype = None
    library.glm_step_rank.argtypes = (pointer,)
    library.glm_step_rank.restype = size
    library.glm_step_room.argtypes = (pointer, size, size, size)
    library.glm_step_room.restype = size
    library.glm_step_stretches.argtypes = (size,)
    library.glm_step_stretches.restype = size
    library.glm_step_run.argtypes = (pointer, size, pointer, pointer, size, number)
    library.glm_step_run.restype = None
    library.glm_attend_room.argtypes = (size, size, size)
    library.glm_attend_room.restype = size
    library.glm_attend.argtypes = (pointer, pointer, pointer, size, size, size, pointer, number)
    library.glm_attend.restype = None
    library.glm_choose.argtypes = (ctypes.c_char_p,)
    library.glm_choose.restype = ctypes.c_char_p
    return library


def choose_instructions(name: str | None = None) -> str | None:
    """Use "avx512amx", "avx512vnni", "avx512", "avx2" or "portable", or the best (None). None: this CPU has it not."""
    chosen = native_library().glm_choose(None if name is None else name.encode())
    return None if chosen is None else str(chosen.decode())


@cache
def _best_instructions() -> str | None:
    return choose_instructions()


class NativeCpu(Kernel):
    name = "native"
    any_dtype = True
    has_coarse = True

    def __init__(self) -> None:
        self.exact = False  # many rows: float32 products instead of int16 activations (native.c says what that costs)
        self._fault: str | None = None
        if os.environ.get("GLMCHAT_KERNEL", "native") != "native":
            self._fault = "switched off by GLMCHAT_KERNEL"
            return
        try:
            self.name = f"native-{_best_instructions()}"
        except OSError as error:
            self._fault = str(error)

    def unavailable(self) -> str | None:
        return self._fault

    def accepts(self, shape: Shape) -> bool:
        width = 8 if shape.bits == 4 else 4
        return shape.groups == 1 or shape.group % width == 0

    def pack(
        self, shape: Shape, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        padded = _padded(shape)
        fill = padded.in_features - shape.in_features
        codes = functional.pad(codes, (0, fill)) if fill else codes.contiguous()  # padding by nothing copies
        blocks = -(-shape.out_features // ROWS)
        words = torch.empty(blocks * ROWS * padded.in_features * shape.bits // 32, dtype=torch.int32)
        scales = torch.stack([scale] if minimum is None else [scale, minimum], dim=2)  # [out, groups, planes]
        if not bool(torch.isfinite(scales).all()):
            raise ValueError("a scale is not a finite number")
        unit = _unit(scales)
        scales = functional.pad(scales / unit, (0, 0, 0, 0, 0, blocks * ROWS - shape.out_features))
        scales = scales.view(blocks, ROWS, shape.groups, -1).permute(0, 2, 3, 1)  # [blocks, groups, planes, 32]
        half = scales.half()
        # Scales that float16 does not hold exactly stay float32. A minimum that is not exact is off by at most 2^-12
        # of itself, 1/270 of a step, and is not worth doubling the scales for; only other programs' folders, whose
        # scales are bfloat16, get it as it is.
        planes = 2 if torch.equal(scale.bfloat16().float(), scale) else 1
        exact = torch.equal(half[:, :, :planes].float(), scales[:, :, :planes])
        packed = {"codes": words, "scales": (half if exact else scales).contiguous(), "unit": torch.tensor(unit)}
        weight = weight_of(padded, packed)
        native_library().glm_pack(ctypes.byref(weight), codes.data_ptr(), words.data_ptr(), torch.get_num_threads())
        return packed

    def fuse(self, parts: Sequence[tuple[Shape, Packed]]) -> tuple[dict[str, torch.Tensor], list[Packed]] | None:
        measures = {(s.in_features, s.bits, s.group, p["scales"].dtype) for s, p in parts}
        if len(measures) > 1 or any(s.out_features % ROWS for s, _ in parts) or _padded(parts[0][0]) is not parts[0][0]:
            return None
        # One power of two for all. The others' scales shrink by what theirs was smaller; float16 must still hold them.
        unit = max(float(p["unit"]) for _, p in parts)
        scales = [p["scales"].float() * (float(p["unit"]) / unit) for _, p in parts]
        kind = parts[0][1]["scales"].dtype
        if any(not torch.equal(wide.to(kind).float(), wide) for wide in scales):
            return None
        whole = {
            "codes": torch.cat([p["codes"] for _, p in parts]),
            "scales": torch.cat(scales).to(kind),
            "unit": torch.tensor(unit),
        }
        views: list[Packed] = []
        words = blocks = 0
        for shape, packed in parts:
            count, more = len(packed["codes"]), shape.out_features // ROWS
            codes, some = whole["codes"][words : words + count], whole["scales"][blocks : blocks + more]
            views.append({"codes": codes, "scales": some, "unit": whole["unit"]})
            words, blocks = words + count, blocks + more
        return whole, views

    def rows(self, shape: Shape, packed: Packed, ids: torch.Tensor) -> torch.Tensor:
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < shape.out_features:
            raise IndexError(f"row {int(ids.max())} of {shape.out_features}")
        padded = _padded(shape)
        ids = ids.to(torch.int64).contiguous()
        out = torch.empty(len(ids), padded.in_features)
        weight = weight_of(padded, packed)
        native_library().glm_rows(ctypes.byref(weight), ids.data_ptr(), len(ids), out.data_ptr())
        return out[:, : shape.in_features]

    def linear(self, shape: Shape, packed: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return self.bind(shape, packed)(x, bias)

    def bind(self, shape: Shape, packed: Packed) -> Multiply:
        padded = _padded(shape)
        fill = padded.in_features - shape.in_features
        weight = weight_of(padded, packed, self.coarse)
        address = ctypes.addressof(weight)
        call = native_library().glm_linear
        bound: torch.Tensor | None = None  # the bias that the structure points to, as it was given
        wide: torch.Tensor | None = None  # and in float32, which must live as long as the pointer

        def multiply(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            nonlocal bound, wide
            dtype = x.dtype
            if dtype not in (torch.float32, torch.bfloat16):
                x = x.float()  # no call of itself: that would be a cycle, and keep the weights until it is collected
            if bias is not bound:
                bound, wide = bias, None if bias is None else bias.detach().float().contiguous()
                weight.bias = None if wide is None else wide.data_ptr()
            x = functional.pad(x, (0, fill)) if fill else x.contiguous()
            y = torch.empty(x.shape[0], shape.out_features, dtype=x.dtype)
            half = x.dtype == torch.bfloat16
            threads = torch.get_num_threads()
            if call(address, x.data_ptr(), y.data_ptr(), x.shape[0], half, self.exact, threads):
                raise MemoryError(f"no memory for the activations of {x.shape[0]} rows")
            return y if y.dtype == dtype else y.to(dtype)

        return multiply


def fits(shape: Shape, packed: Packed) -> bool:
    """True if packed tensors from a file are of the sizes and types that `pack` makes for this shape."""
    padded, blocks = _padded(shape), -(-shape.out_features // ROWS)
    planes = 2 if shape.bits == 4 else 1
    codes, scales, unit = packed["codes"], packed["scales"], packed["unit"]
    return (
        shape.bits in (4, 8)
        and shape.in_features % shape.group == 0
        and (shape.groups == 1 or shape.group % (32 // shape.bits) == 0)
        and codes.dtype == torch.int32
        and codes.numel() == blocks * ROWS * padded.in_features * shape.bits // 32
        and scales.dtype in (torch.float16, torch.float32)
        and tuple(scales.shape) == (blocks, shape.groups, planes, ROWS)
        and codes.is_contiguous()
        and scales.is_contiguous()
        and unit.dtype == torch.float32
        and unit.numel() == 1
    )


def _padded(shape: Shape) -> Shape:
    """A row with one scale may be of any length; packed rows are whole words of 8 inputs."""
    fill = -shape.in_features % 8
    if not fill:
        return shape
    return Shape(shape.out_features, shape.in_features + fill, shape.bits, shape.in_features + fill)


def _unit(scales: torch.Tensor) -> float:
    """A power of two by which scales are divided so that float16 holds them; dividing by it loses nothing."""
    largest = float(scales.abs().max())
    return 2.0 ** (math.frexp(largest)[1] - 14) if largest > 0 else 1.0


def weight_of(shape: Shape, packed: Packed, coarse: bool = False) -> Weight:
    """Points into the packed tensors, which it keeps alive. The bias is the caller's to set. coarse: byte_part.h."""
    scales = packed["scales"]
    weight = Weight(
        packed["codes"].data_ptr(),
        scales.data_ptr(),
        None,
        shape.out_features,
        shape.in_features,
        shape.group,
        shape.bits,
        scales.dtype == torch.float32,
        coarse,
        float(packed["unit"]),
    )
    weight.packed = packed
    return weight


_PART = 1 << 18  # weights that a thread searches at a time


class _Search(ctypes.Structure):
    _fields_ = (
        ("values", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("low", ctypes.c_void_p),
        ("error", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("kind", ctypes.c_int),
        ("lanes", ctypes.c_int),
        ("integer_zero", ctypes.c_int),
        ("symmetric", ctypes.c_int),
        ("fast", ctypes.c_int),
    )


_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# codes [n, group]; scale, low and squared error [n]
SearchResult = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def search_native(
    values: torch.Tensor,
    bits: int,
    *,
    integer_zero: bool = True,
    symmetric: bool = True,
    fast: bool = False,
    lanes: int = 0,
) -> SearchResult | None:
    """int4.search or int8.search in C (search.c): a SearchResult, or None where it is not built.

    lanes: numbers in a vector register at most, for tests; 0 takes what the CPU has.
    """
    if values.dtype not in _KINDS or not values.numel() or NativeCpu().unavailable() is not None:
        return None
    values = values.contiguous()
    count, group = values.shape
    scale, low, error = (torch.zeros(count) for _ in range(3))
    codes = torch.empty(values.shape, dtype=torch.uint8 if bits == 4 else torch.int8)
    run = native_library().glm_search4 if bits == 4 else native_library().glm_search8

    def part(start: int) -> int:
        tensors = (tensor[start:] for tensor in (values, scale, low, error, codes))
        call = _Search(
            *(tensor.data_ptr() for tensor in tensors), min(step, count - start), group,
            _KINDS[values.dtype], lanes, integer_zero, symmetric, fast,
        )  # fmt: skip
        return int(run(ctypes.byref(call)))

    step = -(-max(16, _PART // group) // 16) * 16
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # ctypes lets go of the interpreter
        refused = any(list(pool.map(part, range(0, count, step))))
    return None if refused else (codes, scale, low, error)
