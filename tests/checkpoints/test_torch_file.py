"""A file of torch.save is looked through before torch sees it: in a moment, by name, whatever it asks for.

What is right is what torch itself writes and reads.

Covers checkpoints/zip_directory.py.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from glmchat.checkpoints.adapter_files import find_weights
from glmchat.checkpoints.torch_file import read_torch_file
from glmchat.checkpoints.weight_files import refuse_cut
from glmchat.core.errors import Damaged, GlmchatError, Hostile
from glmchat.engine.formats.weights import load_bin


@contextmanager
def at_once(megabytes: int = 100) -> Iterator[None]:
    """Under a second, and under so many megabytes more than there were."""
    tracemalloc.start()
    begin = time.process_time()
    try:
        yield
        assert time.process_time() - begin < 1.0
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
    finally:
        tracemalloc.stop()


def saved(value: Any, *, archive: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=archive)
    return file.getvalue()


def archive(table: bytes, *records: bytes, compress: int = zipfile.ZIP_STORED) -> bytes:
    """An archive as torch writes one, around any pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compress) as made:
        made.writestr("archive/data.pkl", table)
        for number, record in enumerate(records):
            made.writestr(f"archive/data/{number}", record)
        made.writestr("archive/version", b"3\n")
    return file.getvalue()


def tensor(offset: int = 0, shape: object = (2,), stride: object = (1,), count: int = 2, key: str = "0") -> bytes:
    """The pickle of one float tensor with the numbers that it claims."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", count) if isinstance(value, Storage) else None

    class Lie:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, stride, False, OrderedDict())

    file = io.BytesIO()
    Pickler(file, 2).dump({"a.weight": Lie()})
    return file.getvalue()


LAYER = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
LONG = torch.arange(12.0)
TABLES: dict[str, Any] = {
    "a module's": LAYER.state_dict(),
    "parameters": dict(LAYER.named_parameters()),
    "settings beside it": {"w": LONG, "epoch": 3, "lr": 1e-4, "args": {"a": [1, 2.5, ("x", None)]}, "d": torch.float16},
    "views": {"a": LONG[2:5], "b": LONG.view(3, 4).t(), "c": LONG, "d": torch.arange(9).expand(1, -1)},
    "all kinds": {
        str(kind): torch.zeros(3, dtype=kind)
        for kind in (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.bool, torch.int64)
    },
    "nothing in it": {"a": torch.zeros(0, 4), "b": torch.tensor(1.0)},
    "no tensors": {"a": 1},
}


@pytest.mark.parametrize("layout", ["archive", "in a row"])
@pytest.mark.parametrize("case", TABLES)
def test_what_torch_writes_is_read_with_torchs_names_and_shapes(case: str, layout: str, tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(saved(TABLES[case], archive=layout == "archive"))
    right = torch.load(file, weights_only=True)
    found = {name: value.shape for name, value in read_torch_file(file).items()}
    assert found == {name: tuple(value.shape) for name, value in right.items() if isinstance(value, torch.Tensor)}
    assert list(load_bin(file)) == list(found)


def test_types_that_only_the_archive_knows_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(saved({"a": torch.zeros(3, dtype=torch.float8_e4m3fn), "b": torch.zeros(5, dtype=torch.uint16)}))
    assert {name: value.nbytes for name, value in read_torch_file(file).items()} == {"a": 3, "b": 10}


def test_a_shard_of_a_mixture_of_experts_is_read_in_a_moment(tmp_path: Path) -> None:
    names = (f"model.layers.{layer}.mlp.experts.{n}.up_proj.weight" for layer in range(30) for n in range(64))
    (tmp_path / "a.bin").write_bytes(saved(dict.fromkeys(names, LONG)))
    with at_once():
        assert len(read_torch_file(tmp_path / "a.bin")) == 30 * 64


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return self.canary.touch, ()


def packed(table: bytes) -> bytes:
    return archive(table, bytes(8), compress=zipfile.ZIP_DEFLATED)


def broken_deflate() -> bytes:
    data = bytearray(packed(tensor()))
    data[60:80] = b"\xff" * 20
    return bytes(data)


def twice() -> bytes:
    return archive(tensor(), bytes(8), bytes(8)).replace(b"archive/data/1", b"archive/data/0")


def encrypted() -> bytes:
    data = bytearray(archive(tensor(), bytes(8)))
    data[data.index(b"PK\1\2") + 8] |= 1
    return bytes(data)


def over_each_other() -> bytes:
    data = bytearray(archive(tensor(), bytes(8)))
    at = data.index(b"PK\1\2")
    struct.pack_into("<LL", data, at + 20, 10**6, 10**6)
    return bytes(data)


def many_members(claimed: int) -> bytes:
    data = bytearray(archive(tensor(), bytes(8)))
    struct.pack_into("<HH", data, len(data) - 14, claimed, claimed)
    return bytes(data)


def wide_lie() -> bytes:
    data = archive(tensor(), bytes(8))
    start, end = data.index(b"PK\1\2"), len(data) - 22
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2**60, 2**60, end - start, start)
    return data[:end] + record + struct.pack("<4sLQL", b"PK\6\7", 0, end, 1) + data[end:]


def in_a_row(count: int) -> bytes:
    """The old layout, of which one storage claims another size."""
    data = saved({"a": torch.zeros(2)}, archive=False)
    return re.sub(b"cpu(q.)K\x02", lambda m: b"cpu" + m[1] + b"J" + struct.pack("<i", count), data, flags=re.DOTALL)


MARK, NONE, STOP = b"(", b"N", b"."
DAMAGED: dict[str, Callable[[], bytes]] = {
    "127 MB of instructions in 129 kB": lambda: packed(b"\x80\x02" + NONE * 127_000_000 + STOP),
    "20 million marks": lambda: archive(b"\x80\x02" + MARK * 20_000_000 + STOP),
    "20 million marks, packed": lambda: packed(b"\x80\x02" + MARK * 20_000_000 + STOP),
    "marks that fit": lambda: archive(b"\x80\x02" + MARK * 200_000 + STOP),
    "instructions that fit": lambda: archive(b"\x80\x02" + NONE * 200_000 + STOP),
    "marks in a row": lambda: b"\x80\x02" + MARK * 20_000_000 + STOP,
    "a number of 200 bytes": lambda: archive(b"\x80\x02\x8a\xc8" + b"\x01" * 200 + STOP),
    "a text that ends nowhere": lambda: archive(b"\x80\x02X\xff\xff\xff\xff" + STOP),
    "a memo of nothing": lambda: archive(b"\x80\x02h\x05."),
    "an empty stack": lambda: archive(b"\x80\x02."),
    "no end": lambda: archive(b"\x80\x02N"),
    "no pickle": lambda: archive(b""),
    "keys that take for ever": lambda: archive(b"\x80\x02}))\x86" + b"q\x00h\x00\x86" * 60 + b"Ns."),
    "broken deflate": broken_deflate,
    "a name that stands twice": twice,
    "encrypted": encrypted,
    "a member of a megabyte in a kilobyte": over_each_other,
    "60,000 members": lambda: many_members(60_000),
    "no members": lambda: many_members(0),
    "2^60 members": wide_lie,
    "a comment": lambda: archive(tensor(), bytes(8))[:-2] + b"\x03\0abc",
    "cut": lambda: archive(tensor(), bytes(8))[:-40],
    "another archive": lambda: archive(tensor()).replace(b"data.pkl", b"data.txt"),
    "a storage that is not there": lambda: archive(tensor()),
    "a storage of 4 TB": lambda: archive(tensor(count=10**12), bytes(8)),
    "a stride that leads out": lambda: archive(tensor(stride=(1000,)), bytes(8)),
    "an offset that leads out": lambda: archive(tensor(offset=1), bytes(8)),
    "an offset below nothing": lambda: archive(tensor(offset=-1), bytes(8)),
    "a stride below nothing": lambda: archive(tensor(stride=(-1,)), bytes(8)),
    "a shape of 2^60": lambda: archive(tensor(shape=(2**60,)), bytes(8)),
    "a trillion times one number": lambda: archive(tensor(shape=(10**6, 10**6), stride=(0, 0)), bytes(8)),
    "a shape of words": lambda: archive(tensor(shape=("a",)), bytes(8)),
    "a shape without strides": lambda: archive(tensor(stride=()), bytes(8)),
    "a path as a key": lambda: archive(tensor(key="../../x"), bytes(8)),
    "in a row, 8 GB": lambda: in_a_row(2**31 - 1),
    "in a row, below nothing": lambda: in_a_row(-5),
    "in a row, cut": lambda: saved({"a": torch.zeros(2)}, archive=False)[:-4],
    "a pickle and nothing else": lambda: pickle.dumps({"a": 1}, 2),
    "two bytes": lambda: b"\x80\x02",
    "one byte": lambda: b"P",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_no_file_of_torch_is_refused_by_name_in_a_moment(case: str, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(DAMAGED[case]())
    for reader in (read_torch_file, refuse_cut, load_bin):
        with at_once(), pytest.raises(Damaged) as told:
            reader(file)
        assert told.value.code == "weights.damaged" and told.value.hint
        assert told.value.message.startswith("pytorch_model.bin (")
    with at_once(), pytest.raises(GlmchatError):
        find_weights(file)


HOSTILE: dict[str, bytes] = {
    "a call": archive(b"cos\nsystem\n(X\x02\x00\x00\x00lstR."),
    "a call by the old name": archive(b"c__builtin__\neval\n(X\x01\x00\x00\x001tR."),
    "memory": archive(b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR."),
    "a class": archive(b"ctorch.nn.modules.linear\nLinear\n)R."),
    "a tensor of no storage": archive(b"ctorch\nTensor\n(J\xff\xff\xff\x7ftR."),
    "attributes": archive(b"\x80\x02]}b."),
    "an instance": archive(b"(i__main__\nA\n."),
    "a name from the stack": archive(b"\x80\x04X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93)R."),
    "in a row": b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00lstR.",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_asks_for_more_than_tensors_is_told_apart(case: str, tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(HOSTILE[case])
    for reader in (read_torch_file, load_bin, find_weights):
        with at_once(), pytest.raises(Hostile) as told:
            reader(file)
        assert told.value.code == "weights.pickle"


def test_nothing_of_it_runs(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(archive(pickle.dumps({"a.weight": Bomb(tmp_path / "canary")}, 2)))
    with pytest.raises(Hostile):
        read_torch_file(tmp_path / "a.bin")
    assert not (tmp_path / "canary").exists()


def test_a_table_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(saved([torch.ones(2)]))
    with pytest.raises(Damaged, match="no table of tensors"):
        read_torch_file(tmp_path / "a.bin")


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(saved({"a": LONG}))
    assert list(read_torch_file(file)) == ["a"]
    file.write_bytes(saved({"other": torch.ones(40)}))
    assert list(read_torch_file(file)) == ["other"]


def test_torch_is_not_needed(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(saved({"a": LONG}))
    lines = (
        "import sys\nfrom pathlib import Path\nfrom glmchat.checkpoints.torch_file import read_torch_file\n"
        f"print(list(read_torch_file(Path({str(tmp_path / 'a.bin')!r}))), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", lines], capture_output=True, text=True, check=True)
    assert done.stdout == "['a'] False\n"
