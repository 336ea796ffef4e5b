"""GGUF files: read exactly, and refused where their headers lie.

Covers checkpoints/gguf_file.py, engine/formats/folder_writer.py.
"""

from __future__ import annotations

import resource
import struct
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from glmchat.checkpoints.families import describe
from glmchat.checkpoints.fit import check_folder
from glmchat.checkpoints.gguf_file import TYPES, UNREAD, GGUFFile
from glmchat.core.errors import Damaged, GlmchatError, Hostile
from glmchat.engine import Engine, Sampling
from glmchat.engine.families import identify
from glmchat.engine.formats.gguf import GGUFWeights, decode
from glmchat.engine.formats.weights import Int4, Int8

IDS = [5, 9, 40, 41, 42, 8, 77]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, builders: ModuleType) -> Path:
    path: Path = builders.write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", "Q4_1")
    return path


def with_bytes(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    return path


def header(tensors: int = 0, fields: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields)


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words.encode())) + words.encode()


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def record(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_every_type_is_read_as_the_gguf_package_reads_it(kind: str, tmp_path: Path, builders: ModuleType) -> None:
    path = builders.write_gguf(tmp_path / "tiny.gguf", kind)
    file = GGUFFile(path)
    for tensor in GGUFReader(path).tensors:
        wanted = torch.from_numpy(dequantize(tensor.data, GGMLQuantizationType(tensor.tensor_type)).copy())
        found = decode(file, file.tensors[tensor.name])
        if kind in ("Q4_0", "Q4_1") and len(tensor.shape) == 2:
            assert isinstance(found, Int4)
        elif kind == "Q8_0" and len(tensor.shape) == 2:
            assert isinstance(found, Int8)
        dense = found.float() if isinstance(found, torch.Tensor) else found.dequantise()
        assert torch.allclose(dense, wanted.view(dense.shape), atol=1e-6)


def test_a_gguf_file_computes_what_the_folder_computes(tmp_path: Path, builders: ModuleType) -> None:
    folder = Engine.load(builders.write_folder(tmp_path / "folder"), dtype="float32", threads=1)
    file = Engine.load(builders.write_gguf(tmp_path / "tiny.gguf"), dtype="float32", threads=1)
    assert torch.allclose(folder.logits(IDS), file.logits(IDS), atol=1e-5)
    talk = [{"role": "user", "content": "the he 1234"}]
    assert folder.render(talk) == file.render(talk)


def test_quantised_rows_of_queries_and_keys_are_reordered_exactly(tmp_path: Path, builders: ModuleType) -> None:
    dense = GGUFWeights(GGUFFile(builders.write_gguf(tmp_path / "a.gguf")))
    packed = GGUFWeights(GGUFFile(builders.write_gguf(tmp_path / "b.gguf", "Q8_0")))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.2.self_attn.k_proj.weight"):
        whole, stored = dense.read(name), packed.read(name)
        assert isinstance(whole, torch.Tensor)
        assert isinstance(stored, Int8)
        assert (stored.dequantise() - whole).abs().max() < 0.01


def test_the_starter_files_header_is_read_once_and_quickly(starter_model: Path) -> None:
    checkpoint = identify(starter_model)
    assert (checkpoint.spec.layers, checkpoint.spec.vocab_size, checkpoint.spec.kv_heads) == (30, 49152, 3)
    assert identify(starter_model).gguf is checkpoint.gguf


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_gguf_is_refused_with_its_name(part: float, tiny: Path, tmp_path: Path) -> None:
    whole = tiny.read_bytes()
    path = with_bytes(tmp_path, whole[: max(1, int(len(whole) * part))])
    with pytest.raises(Damaged, match=r"bad\.gguf") as caught:
        Engine.load(path)
    assert caught.value.exit == 3
    assert caught.value.hint


LIES = {
    "fields": header(0, 2**60),
    "tensors": header(2**60, 0),
    "many tensors in few bytes": header(50_000, 0) + bytes(32 * 1000),
    "long key": header(0, 1) + struct.pack("<Q", 2**62) + bytes(64),
    "long text": header(0, 1) + field("a", 8, struct.pack("<Q", 2**40)),
    "long array of numbers": header(0, 1) + field("a", 9, struct.pack("<IQ", 6, 2**61)),
    "long array of texts": header(0, 1) + field("a", 9, struct.pack("<IQ", 8, 2**40)) + bytes(4096),
    "array in array in array in array": header(0, 1) + field("a", 9, struct.pack("<IQ", 9, 1) * 8),
    "a million empty arrays": header(0, 1)
    + field("a", 9, struct.pack("<IQ", 9, 10**6))
    + struct.pack("<IQ", 6, 0) * 10**6,
    "a field that stands twice": header(0, 2) + field("a", 4, bytes(4)) + field("a", 4, bytes(4)),
    "a text of 2^63 bytes": header(0, 1) + field("a", 8, struct.pack("<Q", 2**63)),
    "unknown value type": header(0, 1) + field("a", 77, bytes(16)),
    "alignment of zero": header(0, 1) + field("general.alignment", 4, struct.pack("<I", 0)),
    "alignment of three": header(0, 1) + field("general.alignment", 4, struct.pack("<I", 3)),
    "alignment of text": header(0, 1) + field("general.alignment", 8, text("32")),
    "five dimensions": header(1) + record("a", (1, 1, 1, 1, 1)),
    "no dimensions": header(1) + text("a") + struct.pack("<IIQ", 0, 0, 0) + bytes(32),
    "shape that overflows": header(1) + record("a", (2**40, 2**40)),
    "shape of nothing": header(1) + record("a", (0, 4)),
    "unknown tensor type": header(1) + record("a", (32,), kind=999) + bytes(256),
    "offset outside": header(1) + record("a", (8,), offset=2**50),
    "offset that wraps": header(1) + record("a", (8,), offset=2**64 - 32),
    "offset between": header(1) + record("a", (8,), offset=3) + bytes(256),
    "half a block": header(1) + record("a", (20,), kind=2) + bytes(256),
    "tensor past the end": header(1) + record("a", (1000, 1000)) + bytes(256),
    "overlap": header(2) + record("a", (64,)) + record("b", (64,), offset=32) + bytes(1024),
    "twice": header(2) + record("a", (8,)) + record("a", (8,), offset=32) + bytes(1024),
    "not gguf": b"GGML" + bytes(64),
    "version": header(version=99) + bytes(64),
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64),
    "empty": b"",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 98362432\n",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused_before_memory_is_taken(lie: str, tmp_path: Path) -> None:
    path = with_bytes(tmp_path, LIES[lie])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Damaged) as caught:
        GGUFFile(path)
    assert caught.value.exit == 3
    assert caught.value.hint
    assert "bad.gguf" in caught.value.message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # in units of 1 KiB


def test_a_pointer_file_says_the_real_size(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match=r"98\.4 MB"):
        GGUFFile(with_bytes(tmp_path, LIES["pointer"]))


def test_control_sequences_in_names_are_drawn_and_not_obeyed(tmp_path: Path) -> None:
    data = header(1) + record("\x1b[31mred\u202e", (1000, 1000)) + bytes(64)
    with pytest.raises(Damaged) as caught:
        GGUFFile(with_bytes(tmp_path, data))
    assert "\x1b" not in caught.value.message
    assert "\u202e" not in caught.value.message


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_header_with_any_bytes_changed_never_ends_in_a_stack_trace(
    data: st.DataObject, tiny: Path, tmp_path: Path
) -> None:
    raw = bytearray(tiny.read_bytes()[:6000])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 8))
        raw[at : at + 8] = data.draw(st.binary(min_size=8, max_size=8))
    try:
        identify(with_bytes(tmp_path, bytes(raw)))
    except GlmchatError as error:
        assert error.exit == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [("block_count", 2**31), ("embedding_length", 0), ("attention.head_count", 2**30), ("feed_forward_length", 2**31)],
)
def test_absurd_measures_are_refused_before_memory_is_taken(key: str, value: int, tiny: Path, tmp_path: Path) -> None:
    raw = tiny.read_bytes()
    at = raw.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
    with pytest.raises(Damaged):
        identify(with_bytes(tmp_path, raw[:at] + struct.pack("<I", value) + raw[at + 4 :]))


def test_missing_and_left_over_tensors_are_named(tiny: Path, tmp_path: Path) -> None:
    raw = tiny.read_bytes().replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight")
    with pytest.raises(Damaged) as caught:
        Engine.load(with_bytes(tmp_path, raw))
    assert "model.layers.1.self_attn.q_proj.weight" in caught.value.message
    assert "blk.1.attn_x.weight" in caught.value.message


def retold(data: bytes, tensor: str, **told: Any) -> bytes:
    """The file with another claim in the record of one tensor: its name, type, shape (rows last) or offset."""
    at = data.index(text(tensor)) + 8
    dimensions = int.from_bytes(data[at + len(tensor) :][:4], "little")
    shape = at + len(tensor) + 4
    places = {"name": at, "shape": shape, "type": shape + 8 * dimensions, "offset": shape + 8 * dimensions + 4}
    for what, value in told.items():
        form = {"shape": f"<{dimensions}Q", "type": "<I", "offset": "<Q"}.get(what)
        new = value.encode() if form is None else struct.pack(form, *(value if what == "shape" else (value,)))
        data = data[: places[what]] + new + data[places[what] + len(new) :]
    return data


TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "another name": ({"name": "blk.0.ffn_upp.weigh"}, "1 tensors are missing: model.layers.0.mlp.up_proj.weight"),
    "a matrix on its side": ({"shape": (96, 64)}, "is [64, 96] instead of [96, 64]"),
    "fewer rows": ({"shape": (64, 64)}, "bytes behind the tensor before it"),
    "more rows": ({"shape": (64, 128)}, "overlaps another tensor"),
    "a smaller type": ({"type": 2}, "bytes behind the tensor before it"),
    "a type of counts": ({"type": 24}, "overlaps another tensor"),
    "a type that nobody knows": ({"type": 5}, "of the unknown type 5"),
    "an offset behind the end": ({"offset": 2**40}, "is said to lie at byte"),
    "an offset of another tensor": ({"offset": 0}, "overlaps another tensor"),
}


@pytest.mark.parametrize("damage", TABLES)
def test_what_the_table_of_tensors_tells_is_told_before_an_engine_starts_and_in_its_words(
    damage: str, tiny: Path, tmp_path: Path
) -> None:
    claims, words = TABLES[damage]
    path = with_bytes(tmp_path, retold(tiny.read_bytes(), "blk.0.ffn_up.weight", **claims))
    with pytest.raises(GlmchatError) as early:
        check_folder(path)
    with pytest.raises(GlmchatError) as late:
        Engine.load(path, dtype="float32", threads=1)
    assert words in early.value.message
    assert early.value.to_json() == late.value.to_json()


def test_a_type_that_nobody_can_read_is_told_before_an_engine_starts(tiny: Path, tmp_path: Path) -> None:
    path = with_bytes(tmp_path, retold(tiny.read_bytes(), "blk.0.ffn_norm.weight", type=26))  # as wide as F32
    with pytest.raises(Damaged, match="is stored as I32, which cannot be read"):
        check_folder(path)


def test_the_types_that_are_refused_are_those_that_the_gguf_package_cannot_read() -> None:
    unread = set()
    for number, (name, _, size) in TYPES.items():
        try:
            dequantize(np.zeros((1, size), np.uint8), GGMLQuantizationType(number))
        except NotImplementedError:
            unread.add(name)
    assert unread == UNREAD


def test_another_architecture_in_a_gguf_file_is_named(tmp_path: Path) -> None:
    data = header(0, 1) + field("general.architecture", 8, text("rwkv6"))
    with pytest.raises(Damaged, match="rwkv6"):
        identify(with_bytes(tmp_path, data))


def test_a_file_that_hides_a_program_in_its_template_is_stopped(tmp_path: Path, builders: ModuleType) -> None:
    path = builders.write_gguf(tmp_path / "bad.gguf", template="{{ ''.__class__.__mro__ }}")
    engine = Engine.load(path, dtype="float32", threads=1)
    with pytest.raises(Hostile):
        engine.render([{"role": "user", "content": "a"}])
    assert list(engine.generate(IDS, Sampling(temperature=0, max_tokens=2)))


def test_the_sizes_of_every_type_are_those_of_the_gguf_package() -> None:
    assert {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()} == TYPES


def in_parts(folder: Path, builders: ModuleType, monkeypatch: pytest.MonkeyPatch, *, small_first: bool = False) -> Path:
    """The toy model in files of eight tensors, as gguf's own writer splits it. Returns the first part."""
    split = partial(builders.GGUFWriter, split_max_tensors=8, small_first_shard=small_first)
    monkeypatch.setattr(builders, "GGUFWriter", split)
    builders.write_gguf(folder / "toy.gguf")
    monkeypatch.undo()
    return sorted(folder.glob("toy-00001-of-*.gguf"))[0]


@pytest.mark.parametrize("small_first", [False, True])
def test_a_model_in_parts_is_the_model_in_one_file(
    small_first: bool, tmp_path: Path, builders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = builders.write_gguf(tmp_path / "whole.gguf")
    first = in_parts(tmp_path, builders, monkeypatch, small_first=small_first)
    assert len(list(tmp_path.glob("toy-*.gguf"))) > 2
    check_folder(first)
    assert torch.equal(Engine.load(first, threads=1).logits(IDS), Engine.load(whole, threads=1).logits(IDS))


def test_parts_that_cannot_be_read_say_which_they_are(
    tmp_path: Path, builders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = in_parts(tmp_path, builders, monkeypatch)
    parts = sorted(tmp_path.glob("toy-*.gguf"))
    count = len(parts)

    def reason(path: Path) -> str:
        texts = []
        for look in (check_folder, lambda file: Engine.load(file)):
            with pytest.raises(GlmchatError) as caught:
                look(path)
            assert caught.value.hint
            texts.append(caught.value.message + " · " + caught.value.hint)
        assert texts[0] == texts[1]
        return texts[0]

    assert f"is part 2 of {count}" in reason(parts[1])
    assert str(first) in reason(parts[1])
    joined = tmp_path / "one.gguf"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert f"says that it is part 1 of {count}" in reason(joined)
    parts[1].rename(tmp_path / "away")
    assert f"part 1 of {count}; missing: {parts[1].name}" in reason(first)
    parts[1].write_bytes(first.read_bytes())
    assert f"{parts[1].name} is not part 2 of {count}" in reason(first)


def test_a_gguf_file_is_described_and_a_vocabulary_is_no_model(tmp_path: Path, builders: ModuleType) -> None:
    network = describe(builders.write_gguf(tmp_path / "toy.gguf"))
    assert network is not None
    assert (network.family, network.layers, network.context) == ("llama", 3, 256)
    writer = GGUFWriter(tmp_path / "words.gguf", "llama")
    writer.add_context_length(64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(Damaged, match=r"words\.gguf contains no tensors"):
        check_folder(tmp_path / "words.gguf")
