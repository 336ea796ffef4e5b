"""A safetensors header is read in one pass: every lie is told by name, in a moment, as the format's own library would.

Covers checkpoints/safetensors_file.py and what reads a header by it: the choice of files, ties, adapters.
"""

from __future__ import annotations

import json
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from glmchat.checkpoints.adapter_files import find_weights
from glmchat.checkpoints.safetensors_file import read_safetensors
from glmchat.checkpoints.ties import with_own_head
from glmchat.checkpoints.weight_choice import WeightSet
from glmchat.checkpoints.weight_files import refuse_cut
from glmchat.core.errors import Damaged, GlmchatError


def write(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def entry(start: float = 0, end: float = 1, dtype: Any = "U8", shape: Any = (1,), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


def table(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


ONE = table(a=entry())
GOOD: dict[str, tuple[bytes, bytes]] = {
    "one": (ONE, b"1"),
    "spaces before and behind": (b"\n " + ONE + b"   ", b"1"),
    "written with blanks": (json.dumps({"a": entry()}, indent=2).encode(), b"1"),
    "another order": (b'{"a":{"data_offsets":[0,1],"shape":[1],"dtype":"U8"}}', b"1"),
    "nothing": (b"{}", b""),
    "metadata": (table(__metadata__={"format": "pt", "x": 'a"}{\\'}, a=entry()), b"1"),
    "metadata at the end": (table(a=entry(), __metadata__={}), b"1"),
    "no metadata": (table(__metadata__=None, a=entry()), b"1"),
    "a number": (table(a=entry(shape=[])), b"1"),
    "tensors of no element": (table(b=entry(0, 0, shape=[0, 7]), a=entry(), c=entry(1, 1, shape=[0])), b"1"),
    "out of order": (table(b=entry(1, 2), a=entry(0, 1)), b"12"),
    "four bits": (table(a=entry(0, 2, "F4", [4])), b"12"),
    "a name with signs": (b'{"a\\u0041\\"\\\\b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "more than is needed": (table(a=entry(note="x")), b"1"),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_the_library_reads_is_read_with_its_shapes(case: str, tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", *GOOD[case])
    right: Any = safe_open(file, framework="np")
    found = {name: list(tensor.shape) for name, tensor in read_safetensors(file).items()}
    assert found == {name: right.get_slice(name).get_shape() for name in right.keys()}  # noqa: SIM118


def test_places_and_types_are_those_of_the_file(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(7)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    data = (tmp_path / "model.safetensors").read_bytes()
    for name, found in read_safetensors(tmp_path / "model.safetensors").items():
        raw = tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert data[found.start : found.end] == raw and found.shape == tuple(tensors[name].shape)


BAD: dict[str, Callable[[], tuple[bytes, bytes]]] = {
    "100 MB of lists": lambda: (b'{"a":[' + b"[]," * 33_000_000 + b"[]]}", b""),
    "100 MB of lists and nothing else": lambda: (b"[" + b"[]," * 33_000_000 + b"[]]", b""),
    "a million tensors": lambda: (
        b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(10**6)) + b"}",
        b"",
    ),
    "metadata of lists": lambda: (b'{"__metadata__":{"a":' + b"[" * 10**6 + b"}}", b""),
    "a header longer than the format's": lambda: (b"{" + b" " * 100_000_000 + b"}", b""),
    "nested deeply": lambda: (b'{"a":' * 10**6, b""),
    "a name that stands twice": lambda: (ONE[:-1] + b"," + ONE[1:], b"1"),
    "overlapping": lambda: (table(a=entry(0, 2, shape=[2]), b=entry(1, 3, shape=[2])), b"123"),
    "a hole": lambda: (table(a=entry(1, 2)), b"12"),
    "bytes of nobody": lambda: (ONE, b"12"),
    "bytes that are not there": lambda: (table(a=entry(0, 9, shape=[9])), b"1"),
    "end before beginning": lambda: (table(a=entry(1, 0)), b"1"),
    "below nothing": lambda: (table(a=entry(-1, 0)), b"1"),
    "an extent below nothing": lambda: (table(a=entry(shape=[-1, -1])), b"1"),
    "a shape that overflows": lambda: (table(a=entry(0, 0, shape=[2**40, 2**40, 2**48])), b""),
    "a shape of 2^64": lambda: (table(a=entry(0, 1, shape=[2**64, 0])), b"1"),
    "another number of bytes": lambda: (table(a=entry(0, 1, "F32")), b"1"),
    "an unknown type": lambda: (table(a=entry(dtype="C128")), b"1"),
    "a type that is a list": lambda: (table(a=entry(dtype=["U8"])), b"1"),
    "fractions": lambda: (table(a=entry(0.0, 1.0)), b"1"),
    "true": lambda: (table(a=entry(shape=[True])), b"1"),
    "a number of 900 digits": lambda: (b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,1]}}' % (b"9" * 900), b""),
    "no offsets": lambda: (table(a={"dtype": "U8", "shape": [1]}), b"1"),
    "no object": lambda: (table(a=7), b"1"),
    "a comma too many": lambda: (ONE[:-1] + b",}", b"1"),
    "something behind it": lambda: (ONE + b"{}", b"1"),
    "no UTF-8": lambda: (ONE.replace(b'"a"', b'"\xff"'), b"1"),
    "zeros": lambda: (bytes(100), b"1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_header_that_lies_is_refused_by_name_in_a_moment(case: str, tmp_path: Path) -> None:
    file = write(tmp_path / "model.safetensors", *BAD[case]())
    for reader in (read_safetensors, refuse_cut):
        tracemalloc.start()
        begin = time.process_time()
        with pytest.raises(Damaged) as told:
            reader(file)
        assert time.process_time() - begin < 1.0 and tracemalloc.get_traced_memory()[1] < 300 * 2**20
        tracemalloc.stop()
        assert told.value.code == "weights.damaged" and told.value.message.startswith("model.safetensors (")
    with pytest.raises(GlmchatError):
        find_weights(file)
    names = {"config": {"tie_word_embeddings": True}, "chosen": WeightSet((file.name,))}
    assert with_own_head(tmp_path, **names)["tie_word_embeddings"]  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_length_that_lies_is_refused(length: int, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + ONE + b"1")
    with pytest.raises(Damaged):
        read_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("seed", range(200))
def test_what_is_read_of_a_changed_header_the_library_reads_too(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    header = bytearray(table(__metadata__={"a": "b"}, x=entry(0, 4, "F32", [1]), yy=entry(4, 8, "F16", [2, 1])))
    for _ in range(draw.randint(1, 3)):
        header[draw.randrange(len(header))] = draw.choice(b'0123456789[]{}",: xU8F')
    file = write(tmp_path / "a.safetensors", bytes(header), bytes(8))
    try:
        found = {name: list(tensor.shape) for name, tensor in read_safetensors(file).items()}
    except Damaged:
        return
    try:
        right: Any = safe_open(file, framework="np")
    except SafetensorError as error:
        pytest.fail(f"{bytes(header)!r}: {error}")
    assert found == {name: right.get_slice(name).get_shape() for name in right.keys()}  # noqa: SIM118
