"""cpm_kernels: supplied with what its import looks for, right by its own kernels, and chosen only where it is faster.

A package of that name stands in for it, which computes on the CPU what the kernels of the real one are documented to.

Covers engine/quantize/cuda.py.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from glmchat.engine.quantize import cuda, kernels
from glmchat.engine.quantize.cuda import CpmKernels
from glmchat.engine.quantize.kernels import Packed, Reference, Shape, self_test

PRETEND = """
import ctypes
import numpy as np
import pkg_resources

if not pkg_resources.resource_exists(__name__, "cuda/gemv.fatbin"):
    raise RuntimeError("File `cuda/gemv.fatbin` not found")
CODE = pkg_resources.resource_string(__name__, "cuda/gemv.fatbin")
LIBRARY = ctypes.util.find_library("cudart")


def at(pointer, shape, kind):
    size = int(np.prod(shape)) * np.dtype(kind).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(pointer), kind).reshape(shape)


def gemv_broadcast_mat_int8(batch, dim_out, dim_in, scale_mat, mat, scale_vec, vec, out, stream):
    assert dim_in % 4 == 0 and dim_out <= 65535
    sums = at(vec, (batch, dim_in), np.int8).astype(np.int32) @ at(mat, (dim_out, dim_in), np.int8).astype(np.int32).T
    scales = at(scale_vec, (batch, 1), np.float16).astype(np.float32) * at(scale_mat, (1, dim_out), np.float16)
    at(out, (batch, dim_out), np.float16)[:] = (sums * scales).astype(np.float16)


def gemm_scale(batch, n, m, mat, scale_x, scale_y, out, broad_cast_x, broad_cast_y, stream):
    scales = at(scale_x, (batch, n, 1), np.float16).astype(np.float32) * at(scale_y, (batch, 1, m), np.float16)
    at(out, (batch, n, m), np.float16)[:] = (at(mat, (batch, n, m), np.int32) * scales).astype(np.float16)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "cpm_kernels" / "kernels"
    (folder / "cuda").mkdir(parents=True)
    (folder / "cuda" / "gemv.fatbin").write_bytes(b"code")
    (folder.parent / "__init__.py").write_text("from . import kernels\n")
    (folder / "__init__.py").write_text(PRETEND)
    library = tmp_path / "nvidia" / "cuda_runtime" / "lib" / "libcudart.so.13"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("cpm_kernels", "pkg_resources")]:
        monkeypatch.delitem(sys.modules, name)
    cuda.package.cache_clear()
    yield tmp_path
    cuda.package.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "cpm_kernels"]:
        del sys.modules[name]


def test_its_import_finds_its_files_and_the_libraries_of_torchs_wheels_and_leaves_no_trace(package: Path) -> None:
    import ctypes.util

    find = ctypes.util.find_library
    made = cuda.package()
    assert made.CODE == b"code" and made.LIBRARY.endswith("libcudart.so.13")
    assert "pkg_resources" not in sys.modules and ctypes.util.find_library is find


def test_it_passes_the_self_test_of_every_kernel(package: Path) -> None:
    assert self_test(CpmKernels(), "cpu", 8) is None


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 4, 5, 33])
def test_sixteen_bits_of_an_activation_count(package: Path, kind: torch.dtype, count: int) -> None:
    shape = Shape(40, 512, 8, 512)
    noise = torch.Generator().manual_seed(5)
    codes = torch.randint(-127, 128, (40, 512), generator=noise, dtype=torch.int16).to(torch.int8)
    scale = torch.rand(40, 1, generator=noise) * 0.01
    x = (torch.randn(count, 512, generator=noise) * torch.logspace(-3, 3, count)[:, None]).to(kind)
    bias = torch.randn(40, generator=noise)
    kernel = CpmKernels()
    made = kernel.linear(shape, kernel.pack(shape, codes, scale, None), x, bias)
    right = x.double() @ (codes.double() * scale.double()).T + bias.double()
    assert made.dtype == kind
    step = {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}[kind]
    error = (made.double() - right).abs().amax(1) / right.abs().amax(1)
    assert (error < step).all()


def test_large_matrices_are_launched_in_blocks_of_rows(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_ROWS", 16)
    assert self_test(CpmKernels(), "cpu", 8) is None


def test_only_one_scale_a_row_is_taken(package: Path) -> None:
    kernel = CpmKernels()
    assert kernel.accepts(Shape(64, 128, 8, 128))
    assert not kernel.accepts(Shape(64, 128, 8, 64)) and not kernel.accepts(Shape(64, 128, 4, 128))


@pytest.mark.skipif(find_spec("cpm_kernels") is None, reason="cpm_kernels is not installed")
def test_the_real_package_misses_nothing_but_a_card_and_has_the_functions_that_are_called() -> None:
    cuda.package.cache_clear()
    with pytest.raises(Exception) as missed:
        cuda.package()
    assert "pkg_resources" not in str(missed.value) and not isinstance(missed.value, ImportError)
    spec = find_spec("cpm_kernels")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "kernels"
    for file, name, count in (("gemv.py", "gemv_broadcast_mat_int8", 9), ("gemm.py", "gemm_scale", 10)):
        text = (folder / file).read_text()
        head = text[text.index(f"def {name}(") :].partition("):")[0]
        assert len([line for line in head.splitlines() if " : " in line for _ in range(line.count(" : "))]) == count


class Slow(Reference):
    name = "slow"
    times = 3

    def linear(self, shape: Shape, packed: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return [super(Slow, self).linear(shape, packed, x, bias) for _ in range(self.times)][-1]


class Slower(Slow):
    name = "slower"
    times = 60


@pytest.mark.parametrize(("order", "winner"), [((Slow, Slower), "slow"), ((Slower, Slow), "slow")])
def test_on_a_card_the_faster_kernel_is_chosen_and_the_other_named_with_both_times(
    order: tuple[type[Reference], ...], winner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = (*(kind() for kind in order), Reference())
    monkeypatch.setattr(kernels, "kernels_of", lambda device: made)
    monkeypatch.setattr(kernels, "_works", lambda kernel, device, bits: True)
    seconds = kernels.product_seconds.__wrapped__
    monkeypatch.setattr(kernels, "product_seconds", lambda kernel, device, bits: seconds(kernel, "cpu", bits, 64))
    monkeypatch.setattr(kernels, "PASSED_OVER", {})
    assert kernels.choose(Shape(64, 64, 8, 64), "cuda").name == winner
    (reason,) = kernels.PASSED_OVER["cuda", 8].values()
    assert reason.count(" us") == 2 and winner in reason
    assert len(inspect.signature(kernels.product_seconds).parameters) == 3
