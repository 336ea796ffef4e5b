"""Packed weights on their way to a card: every format's words are its weights, and the host takes nothing apart.

Covers engine/gpu/words.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import fake_card
import pytest
import torch
from tiny_checkpoints import build

from glmchat.checkpoints.recipe import Recipe
from glmchat.engine import Engine
from glmchat.engine.families import identify
from glmchat.engine.formats import compressed, gguf
from glmchat.engine.formats.compressed import open_official
from glmchat.engine.formats.weights import Int4, Int8, Stored, WeightSource, Words
from glmchat.engine.gpu.words import CardWords, Upload
from glmchat.engine.loading import open_weights
from glmchat.engine.quantize.kernels import Reference, Shape, kernel_report
from glmchat.engine.quantize.plan import plan_quantise
from glmchat.engine.quantize.quantiser import execute

NOISE = torch.Generator().manual_seed(11)


class Tensors:
    """A source that holds its tensors."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Stored:
        return self._tensors[name]


def official(folder: Path, columns: int) -> WeightSource:
    """THUDM's own layout, of one matrix [96, 64]."""
    stored = torch.randint(-128, 128, (96, 64 // columns), generator=NOISE, dtype=torch.int16).to(torch.int8)
    name = "layers.0.query_key_value.weight"
    scale = torch.rand(96, generator=NOISE).half()
    return open_official(Tensors({name: stored, f"{name}_scale": scale}), {"hidden_size": 64})


def quantised(folder: Path, bits: int) -> Path:
    source = build("llama", folder / "llama")
    out = folder / f"int{bits}"
    execute(plan_quantise(source, out, Recipe(bits, ends=bits)))
    return out


def of_gguf(kind: str) -> Callable[[Path, ModuleType], WeightSource]:
    return lambda folder, builders: open_weights(identify(builders.write_gguf(folder / f"{kind}.gguf", kind)))


SOURCES: dict[str, Callable[[Path, ModuleType], WeightSource]] = {
    "compressed-tensors, 4 bits": lambda folder, builders: open_weights(identify(quantised(folder, 4))),
    "compressed-tensors, 8 bits": lambda folder, builders: open_weights(identify(quantised(folder, 8))),
    "THUDM, 4 bits": lambda folder, builders: official(folder, 2),
    "THUDM, 8 bits": lambda folder, builders: official(folder, 1),
    **{f"GGUF {kind}": of_gguf(kind) for kind in ("Q4_0", "Q4_1", "Q8_0")},
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_words_of_a_format_are_its_weights(name: str, tmp_path: Path, builders: ModuleType) -> None:
    source = SOURCES[name](tmp_path, builders)
    matrices = 0
    for tensor in source.shapes():
        stored = source.read(tensor)
        words = source.words(tensor, lambda t: t.to(fake_card.DEVICE))  # type: ignore[attr-defined]
        assert (words is None) == isinstance(stored, torch.Tensor)
        if words is None or isinstance(stored, torch.Tensor):
            continue
        matrices += 1
        assert isinstance(words, Words)
        right = stored.dequantise()
        assert words.words.shape == (right.shape[0], right.shape[1] * words.bits // 32)
        assert torch.allclose(words.dequantise().cpu(), right, rtol=0, atol=2e-6 * float(right.abs().max()))
    assert matrices


@pytest.mark.parametrize("bits", [4, 8])
def test_the_words_of_a_folder_go_to_the_card_as_they_are(
    bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = quantised(tmp_path, bits)
    right = Engine.load(folder, dtype="float32", device="cpu", threads=1).logits([1, 2, 3])
    shapes = open_weights(identify(folder)).shapes()

    def refuse(*rest: object) -> torch.Tensor:
        raise AssertionError("the host unpacks a matrix")

    monkeypatch.setattr(compressed, "unpack", refuse)
    monkeypatch.setattr(compressed, "unpack_zero_points", lambda words, rows, bits: compressed_points(words, rows))
    kernel_report(fake_card.NAME)  # tries kernels on a matrix of their own
    with fake_card.record() as log:
        engine = Engine.load(folder, dtype="float32", device=fake_card.NAME)
    there = engine.logits([1, 2, 3])
    assert float((there - right).abs().max() / right.abs().max()) < 2e-2, "the processor's kernel rounds its input"
    sent = [elements for what, elements in log if what == "to card"]
    largest = max(shape[0] * shape[1] for shape in shapes.values() if len(shape) == 2)
    assert max(sent) == largest * bits // 32, "words, four bytes each, and no copy of them"


def compressed_points(words: torch.Tensor, rows: int) -> torch.Tensor:
    """The zero points of a matrix, taken apart where they lie."""
    assert words.device.type == fake_card.NAME
    octets = words.T.contiguous().view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), -1).flatten(1)[:, :rows].T.contiguous()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_the_blocks_of_a_gguf_file_are_taken_apart_on_the_card(
    kind: str, tmp_path: Path, builders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = builders.write_gguf(tmp_path / "model.gguf", kind)
    right = Engine.load(path, dtype="float32", device="cpu", threads=1).logits([1, 2, 3])

    def refuse(*rest: object) -> Stored:
        raise AssertionError("the host takes blocks apart")

    monkeypatch.setattr(gguf, "_packed", refuse)
    there = Engine.load(path, dtype="float32", device=fake_card.NAME).logits([1, 2, 3])
    assert float((there - right).abs().max() / right.abs().max()) < 2e-2


@pytest.mark.parametrize("kernel", [CardWords(), Reference()], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("bits", [4, 8])
def test_words_and_codes_are_packed_alike(kernel: CardWords | Reference, bits: int) -> None:
    shape = Shape(24, 96, bits, 32)
    codes = torch.randint(0, 1 << bits, (24, 96), generator=NOISE).to(torch.uint8)
    scale = torch.rand(24, 3, generator=NOISE)
    low = -128 * scale if bits == 8 else torch.rand(24, 3, generator=NOISE)
    octets = codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)
    by_words = kernel.pack_words(shape, Words.of_bytes(octets, bits, scale, low))
    stored = (codes ^ 0x80).view(torch.int8) if bits == 8 else codes
    by_codes = kernel.pack(shape, stored, scale, None if bits == 8 else low)
    assert by_words.keys() == by_codes.keys()
    assert all(torch.equal(by_words[name], by_codes[name]) for name in by_codes)


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 1000])
def test_an_upload_in_halves_brings_every_byte(size: int, pinned: bool) -> None:
    upload = Upload(fake_card.NAME, half_bytes=128, pinned=pinned)
    for tensor in (
        torch.randn(size, generator=NOISE).half(),
        torch.randint(-9, 9, (size, 3), generator=NOISE, dtype=torch.int32).t(),
        torch.tensor(3.5),
    ):
        there = upload(tensor)
        assert there.device == fake_card.DEVICE
        assert there.dtype == tensor.dtype
        assert torch.equal(there.cpu(), tensor)


def test_the_records_of_a_format_keep_their_kinds() -> None:
    four = Int4(torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2, 1), torch.ones(2, 1))
    eight = Int8(torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, 1))
    for stored in (four, eight):
        there = stored.on(lambda tensor: tensor.to(fake_card.DEVICE))
        assert {tensor.device for tensor in (there.q, there.scale)} == {fake_card.DEVICE}
        assert torch.equal(there.dequantise().cpu(), stored.dequantise())
