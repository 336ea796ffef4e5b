"""Packed products against their definition, on every kernel this machine has.

Covers engine/quantize/aten.py, engine/quantize/kernels.py, engine/quantize/int4.py, engine/quantize/int8.py,
engine/quantize/linear.py, engine/native/cpu.py.
"""

from __future__ import annotations

import _ctypes
import os
import shutil
import subprocess
import sys
import threading
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch

from glmchat.engine.native import cpu
from glmchat.engine.native.cpu import NativeCpu
from glmchat.engine.quantize import kernels
from glmchat.engine.quantize.aten import AtenCpu
from glmchat.engine.quantize.kernels import Kernel, Reference, Shape, choose, kernel_report, self_test
from glmchat.engine.quantize.linear import QuantEmbedding, QuantLinear

NATIVE = NativeCpu().unavailable() is None
HAS_AMX = NATIVE and cpu.choose_instructions("avx512amx") is not None
if NATIVE:
    cpu.choose_instructions()
needs_native = pytest.mark.skipif(not NATIVE, reason=f"the C kernel is not here: {NativeCpu().unavailable()}")


FOLDER = Path(cpu.__file__).parent
C_FILES = Path(__file__).resolve().parents[2] / "engine" / "native"


def folder_with_library(place: Path, library: Path) -> Path:
    """As an editable install has it: the C files, and `library` where the compiled one stands."""
    for path in C_FILES.glob("*.[ch]"):
        shutil.copy(path, place)
    shutil.copy(library, place / f"_native{EXTENSION_SUFFIXES[0]}")
    return place


@pytest.mark.skipif(not list(FOLDER.glob("_native*.so")), reason="the C kernel was not built: there was no compiler")
def test_the_library_is_of_the_c_files_beside_it(tmp_path: Path) -> None:
    """In a developer's folder this fails after a change in C: the sentence says how to build it again."""
    cpu.native_library()
    (library,) = FOLDER.glob("_native*.so")
    folder = folder_with_library(tmp_path, library)
    cpu.open_library(folder)
    with (folder / "step_part.h").open("a") as changed:
        changed.write("/* a field more */\n")
    with pytest.raises(OSError, match=r"built from other C files .* `pip install --no-deps -e .*` builds it again"):
        cpu.open_library(folder)


def test_a_library_that_does_not_say_what_it_was_built_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="built from other C files"):
        cpu.open_library(folder_with_library(tmp_path, Path(_ctypes.__file__)))


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def int4_matrix(rows: int, columns: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = noise()
    q = torch.randint(0, 16, (rows, columns), generator=g, dtype=torch.uint8)
    scale = (torch.rand(rows, columns // group, generator=g) * 0.01 + 0.005).half().float()
    low = -(torch.rand(rows, columns // group, generator=g) * 0.1).half().float()
    weight = q.float() * scale.repeat_interleave(group, 1) + low.repeat_interleave(group, 1)
    return q, scale, low, weight


def int8_matrix(rows: int, columns: int, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = noise()
    q = torch.randint(-128, 128, (rows, columns), generator=g, dtype=torch.int8)
    scale = torch.rand(rows, columns // group, generator=g) * 0.01
    return q, scale, q.float() * scale.repeat_interleave(group, 1)


SHAPES = [(64, 128, 32), (100, 576, 64), (96, 1536, 128), (33, 1376, 1376), (32, 256, 256)]


@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9, 33, 121])
def test_native_products_are_within_a_few_parts_in_100_000(
    instructions: str, rows: int, columns: int, group: int, bits: int, count: int
) -> None:
    x = torch.randn(count, columns, generator=noise(1))
    bias = torch.randn(rows, generator=noise(2))
    if bits == 4:
        q, scale, low, weight = int4_matrix(rows, columns, group)
        linear = QuantLinear.from_int4(q, scale, low + 8 * scale, bias)
    else:
        q, scale, weight = int8_matrix(rows, columns, group)
        linear = QuantLinear.from_int8(q, scale, bias)
    assert isinstance(linear.kernel, NativeCpu)
    expected = x.double() @ weight.double().T + bias
    largest = expected.abs().max()
    assert (linear(x) - expected).abs().max() < 6e-5 * largest
    assert (linear(x.bfloat16()).double() - expected).abs().max() < 1e-2 * largest
    linear.multiply_exactly()
    assert (linear(x) - expected).abs().max() < 2e-6 * largest


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_gets_the_same_bits_alone_and_in_company(instructions: str, bits: int) -> None:
    if bits == 4:
        q, scale, low, _ = int4_matrix(96, 576, 64)
        linear = QuantLinear.from_int4(q, scale, low + 8 * scale)
    else:
        q, scale, _ = int8_matrix(96, 576, 576)
        linear = QuantLinear.from_int8(q, scale)
    x = torch.randn(130, 576, generator=noise(3))
    together = linear(x)
    for first, last in ((0, 1), (1, 3), (3, 7), (7, 15), (15, 31), (40, 130)):
        assert torch.equal(linear(x[first:last]), together[first:last])


def in_bytes(x: torch.Tensor, group: int) -> torch.Tensor:
    """Activations rounded to 8 bits as torch does it: one scale for a group, of at most 128 of it."""
    parts = [part for whole in torch.split(x.double(), group, 1) for part in torch.split(whole, 128, 1)]
    steps = [part.abs().amax(1, keepdim=True) / 127 for part in parts]
    return torch.cat([(part / step).round() * step for part, step in zip(parts, steps, strict=True)], 1)


@pytest.mark.parametrize(("rows", "columns", "group"), [*SHAPES, (70, 480, 40), (31, 768, 192)])
def test_coarse_products_are_those_of_activations_of_8_bits(
    instructions: str, rows: int, columns: int, group: int
) -> None:
    q, scale, low, weight = int4_matrix(rows, columns, group)
    bias = torch.randn(rows, generator=noise(2))
    linear, plain = (QuantLinear.from_int4(q, scale, low + 8 * scale, bias) for _ in range(2))
    assert linear.multiply_coarsely() and linear.kernel.name.endswith("-int8")
    x = torch.randn(150, columns, generator=noise(1))
    expected = in_bytes(x, group) @ weight.double().T + bias
    found = linear(x)
    assert (found - expected).abs().max() < 2e-6 * expected.abs().max()
    assert not torch.equal(found, plain(x)) and not plain.kernel.coarse  # the other layer is as exact as it was
    for first, last in ((0, 1), (1, 3), (3, 6), (6, 10), (10, 15), (15, 21), (21, 28), (28, 37), (37, 150)):
        assert torch.equal(linear(x[first:last]), found[first:last])
    for wrong in (float("nan"), float("inf")):
        assert linear(torch.full((1, columns), wrong)).isnan().all()
    linear.multiply_exactly()
    assert (linear(x) - x.double() @ weight.double().T - bias).abs().max() < 2e-6 * expected.abs().max()


def test_only_weights_of_4_bits_are_multiplied_coarsely(instructions: str) -> None:
    linear = QuantLinear.from_int8(*int8_matrix(64, 128, 32)[:2])
    assert not linear.multiply_coarsely() and not linear.kernel.coarse


@pytest.mark.skipif(not HAS_AMX, reason="this CPU has no AMX, or the system does not lend it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), [*SHAPES, (70, 480, 40), (31, 768, 192)])
def test_tiles_give_the_bits_that_vectors_give(
    rows: int, columns: int, group: int, bits: int, dtype: torch.dtype
) -> None:
    bias = torch.randn(rows, generator=noise(2))
    if bits == 4:
        q, scale, low, _ = int4_matrix(rows, columns, group)
        linear = QuantLinear.from_int4(q, scale, low + 8 * scale, bias)
    else:
        linear = QuantLinear.from_int8(*int8_matrix(rows, columns, group)[:2], bias)
    for count in (9, 16, 17, 145, 300):
        x = torch.randn(count, columns, generator=noise(count))
        x[0] = 0
        x[1] *= 1e30
        x[2, 0], x[3, -1] = float("nan"), float("inf")
        found = []
        for name in ("avx512amx", "avx512vnni"):
            assert cpu.choose_instructions(name) == name
            found.append(linear(x.to(dtype)))
        cpu.choose_instructions()
        assert torch.equal(found[0].isnan(), found[1].isnan())
        assert torch.equal(found[0].nan_to_num(), found[1].nan_to_num())


@needs_native
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    q, scale, low, _ = int4_matrix(320, 576, 64)
    linear = QuantLinear.from_int4(q, scale, low + 8 * scale)
    x = torch.randn(40, 576, generator=noise(3))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        few, many = linear(x[:1]), linear(x)
        torch.set_num_threads(3)
        for _ in range(20):
            assert torch.equal(linear(x[:1]), few)
            assert torch.equal(linear(x), many)
    finally:
        torch.set_num_threads(before)


@needs_native
def test_products_from_several_python_threads_do_not_mix() -> None:
    q, scale, low, _ = int4_matrix(320, 576, 64)
    linear = QuantLinear.from_int4(q, scale, low + 8 * scale)
    inputs = [torch.randn(n, 576, generator=noise(n)) for n in (1, 3, 20, 50)]
    expected = [linear(x) for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        wrong.extend(number for _ in range(50) if not torch.equal(linear(inputs[number]), expected[number]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_is_not_a_number_comes_out_as_not_a_number(instructions: str) -> None:
    q, scale, low, _ = int4_matrix(64, 128, 32)
    linear = QuantLinear.from_int4(q, scale, low + 8 * scale)
    for bad in (float("nan"), float("inf"), float("-inf")):
        for count in (1, 12):
            x = torch.zeros(count, 128)
            x[0, 5] = bad
            y = linear(x)
            assert not torch.isfinite(y[0]).any()
            assert torch.isfinite(y[1:]).all()


def test_huge_and_tiny_activations_and_scales_keep_their_digits(instructions: str) -> None:
    q, scale, low, weight = int4_matrix(64, 128, 32)
    x = torch.randn(2, 128, generator=noise(4))
    for factor in (1e-6, 1e6):
        linear = QuantLinear.from_int4(q, scale * factor, (low + 8 * scale) * factor)
        expected = (x.double() * 1e-3) @ (weight.double() * factor).T
        assert (linear(x * 1e-3) - expected).abs().max() < 1e-3 * expected.abs().max()
    assert not QuantLinear.from_int4(q, scale, low + 8 * scale)(torch.zeros(1, 128)).isnan().any()


@pytest.mark.parametrize("kernel", [Reference(), AtenCpu(), NativeCpu()], ids=lambda k: type(k).__name__)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_kernel_passes_its_self_test(kernel: Kernel, bits: int) -> None:
    reason = kernel.unavailable()
    if reason:
        pytest.skip(reason)
    assert self_test(kernel, "cpu", bits) is None


@pytest.mark.parametrize("kernel", [Reference(), AtenCpu(), NativeCpu()], ids=lambda k: type(k).__name__)
def test_every_kernel_gives_the_weights_back(kernel: Kernel) -> None:
    reason = kernel.unavailable()
    if reason:
        pytest.skip(reason)
    q, scale, low, weight = int4_matrix(112, 192, 64)
    shape = Shape(112, 192, 4, 64)
    packed = kernel.pack(shape, q, scale, low)
    ids = torch.tensor([0, 111, 31, 32, 31])
    assert torch.allclose(kernel.rows(shape, packed, ids), weight[ids], atol=1e-7)
    assert torch.allclose(kernel.rows(shape, packed, torch.arange(112)), weight, atol=1e-7)


class Liar(Reference):
    """A kernel that runs and is wrong, as a miscompiled one would be."""

    name = "liar"

    def linear(self, shape: Any, packed: Any, x: Any, bias: Any):  # type: ignore[no-untyped-def]
        return super().linear(shape, packed, x, bias) * 1.5


def test_a_kernel_that_miscounts_is_replaced_by_the_next_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernels_of", lambda device: (Liar(), Reference()))
    monkeypatch.setattr(kernels, "PASSED_OVER", {})
    kernels._works.cache_clear()
    assert choose(Shape(64, 128, 4, 32)).name == "torch"
    report = kernel_report()[0]
    assert report.kernel == "torch"
    assert "differs from the reference by" in report.passed_over["liar"]
    kernels._works.cache_clear()


def test_without_the_c_kernel_the_torch_operators_do_the_work() -> None:
    script = (
        "from glmchat.engine.quantize.kernels import kernel_report\n"
        "for r in kernel_report(): print(r.bits, r.kernel, *r.passed_over.values())"
    )
    environment = {**os.environ, "GLMCHAT_KERNEL": "torch", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "4 aten switched off by GLMCHAT_KERNEL",
        "8 aten switched off by GLMCHAT_KERNEL",
    ]


def test_layers_that_read_one_input_are_one_product_in_the_same_bits() -> None:
    parts = []
    for rows, factor in ((64, 1.0), (32, 8.0), (96, 0.5)):
        q, scale, low, _ = int4_matrix(rows, 192, 64)
        parts.append(QuantLinear.from_int4(q, scale * factor, (low + 8 * scale) * factor))
    parts[1].bias = torch.randn(32, generator=noise(5))
    x = torch.randn(3, 192, generator=noise(6))
    expected = torch.cat([part(x) for part in parts], -1)
    whole = QuantLinear.fused(parts)
    if whole is None:
        pytest.skip("this kernel's layout cannot be fused")
    assert torch.equal(whole(x), expected)
    assert torch.equal(torch.cat([part(x) for part in parts], -1), expected)
    storages = {t.untyped_storage().data_ptr() for part in parts for n, t in part.packed.items() if n == "codes"}
    assert len(storages) == 1


def test_an_embedding_shares_the_packed_rows_of_the_head() -> None:
    q, scale, weight = int8_matrix(50, 64, 64)
    head = QuantLinear.from_int8(q, scale)
    embedding = QuantEmbedding(head, torch.bfloat16)
    ids = torch.tensor([[3, 49], [0, 3]])
    assert torch.equal(embedding(ids), weight[ids].bfloat16())
    assert embedding.num_embeddings == 50
    with pytest.raises(IndexError):
        embedding(torch.tensor([50]))


def test_moving_a_model_to_another_dtype_leaves_packed_weights_alone() -> None:
    q, scale, low, _ = int4_matrix(64, 128, 32)
    linear = QuantLinear.from_int4(q, scale, low + 8 * scale)
    x = torch.randn(1, 128, generator=noise(7))
    before = linear(x)
    torch.nn.Sequential(linear).to(torch.bfloat16)
    assert torch.equal(linear(x), before)


def test_scales_that_do_not_fit_the_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        QuantLinear.from_int8(torch.zeros(4, 10, dtype=torch.int8), torch.ones(4, 3))
