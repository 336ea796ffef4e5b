"""What a file of `torch.save` says of itself, read without torch and without making anything that it asks for.

A pickle is a program: a few bytes of it can ask for any amount of time and memory, and torch starts to carry it out
before it knows what comes. Here its instructions are followed on plain values. What is more than a table of tensors,
or speaks of bytes that are not there, is refused before torch sees it.

Sources: torch/serialization.py (both layouts: the zip archive since 1.6, and pickles with the numbers behind them),
torch/_weights_only_unpickler.py, Lib/pickletools.py.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from glmchat.checkpoints.zip_directory import FileBytes, read_directory
from glmchat.core.errors import Damaged, Hostile
from glmchat.core.files import open_file
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line

_MOST_STEPS = 1_000_000
_STEPS = 20_000  # of a pickle without tensors; a tensor takes about 30, and its module's entry in `_metadata` 10
_STEPS_EACH = 100
_BYTES, _BYTES_EACH = 2**18, 2**11  # the same for its size
_DEEPEST = 64
_LARGEST_NUMBER = 16  # bytes
_EXPANDED = 2**20  # elements that a tensor may have beyond its storage's, by strides of 0

_STORAGES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1,
    "Bool": 1, "ComplexDouble": 16, "ComplexFloat": 8, "QInt8": 1, "QUInt8": 1, "QInt32": 4, "QUInt4x2": 1,
    "QUInt2x4": 1, "Untyped": 1,
}  # fmt: skip
_STORAGE = re.compile(r"torch\.(?:cuda\.|storage\.)?(?P<kind>\w+)Storage")
_TYPE = re.compile(r"torch\.(?:(?:u?int|float|bfloat|complex|q?u?int)(?P<bits>\d+)(?:_\w+)?|bool|double|half)")


@dataclass(frozen=True, slots=True)
class TorchTensor:
    """One tensor of the table: what it would take where it lies in one piece."""

    shape: tuple[int, ...]
    nbytes: int


@lru_cache(maxsize=64)
def _read(path: Path, size: int, modified: int) -> Mapping[str, TorchTensor]:
    with open_file(path) as file:
        read = FileBytes(path, file.fileno())
        table = _archive(read) if read.take(0, 2) == b"PK" else _in_a_row(read)
    if not isinstance(table, dict):
        raise Damaged(
            tr("{name} contains no table of tensors", name=one_line(path.name)),
            hint=tr("it is not a checkpoint"),
            code="weights.kind",
        )
    return {name: value for name, value in table.items() if isinstance(name, str) and isinstance(value, TorchTensor)}


def read_torch_file(path: Path) -> Mapping[str, TorchTensor]:
    """Name -> tensor, in order. Raises Damaged, or Hostile for a file that asks for more than tensors.

    One that has not changed since is not read again.
    """
    state = path.stat()
    return _read(path, state.st_size, state.st_mtime_ns)


def _hostile(path: Path, what: str) -> NoReturn:
    raise Hostile(
        tr("{name} contains more than tensors: {what}", name=one_line(path.name), what=what),
        hint=tr("the code was not run. Do not use this model, or use its safetensors version"),
        code="weights.pickle",
    )


def _archive(read: FileBytes) -> Any:
    """The table of a zip archive. torch stores its members as they are, so a packed one is not torch's."""
    members = read_directory(read)
    root = next(iter(members), "").partition("/")[0] + "/"
    records = {name.removeprefix(root): member for name, member in members.items() if name.startswith(root)}
    if "data.pkl" not in records or len(records) != len(members) or "constants.pkl" in records:
        read.broken(tr("it is an archive, but not one of tensors"))
    if packed := next((name for name, member in records.items() if member.is_packed), None):
        read.broken(tr("{name} is compressed or encrypted, which torch never does", name=one_line(packed, 60)))
    at, size, _ = records["data.pkl"]
    if size > _BYTES + _BYTES_EACH * len(records):
        read.broken(tr("its table takes {size}, too much for {n} members", size=human_bytes(size), n=len(records)))
    sizes = {name.removeprefix("data/"): member.size for name, member in records.items()}
    program = _Program(read, read.take(at, size), min(_STEPS + _STEPS_EACH * len(records), _MOST_STEPS))
    table = program.run()
    for key, storage in program.storages.items():
        if storage.nbytes > sizes.get(key, -1):
            read.broken(tr("it names {size} of numbers that are not there", size=human_bytes(storage.nbytes)))
    return table


# Pickles in a row, as torch wrote them before 1.6 -------------------------------------------------------------------

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LONGEST = 16 * 2**20  # bytes at the beginning of a file in which its five pickles stand


def _in_a_row(read: FileBytes) -> Any:
    if read.take(0, 1) != b"\x80":
        read.broken(tr("it does not begin as a file of torch does"))
    head, at, steps = read.take(0, min(read.size, _LONGEST)), 0, _MOST_STEPS
    values: list[Any] = []
    storages: dict[str, _Storage] = {}
    for number in range(5):
        program = _Program(read, head, steps, at)
        values.append(program.run())
        at, steps, storages = program.at, steps - program.steps, program.storages if number == 3 else storages
        if number == 0 and values != [_MAGIC]:
            read.broken(tr("it does not begin as a file of torch does"))
    if any(storage.kind == "Untyped" for storage in storages.values()):
        read.broken(tr("its numbers are not those of its tensors"))
    table, keys = values[3], values[4]
    if values[1] != _PROTOCOL or not isinstance(keys, list) or at > _BYTES + 2 * _BYTES_EACH * (len(keys) + 1):
        read.broken(tr("it does not begin as a file of torch does"))
    if len(keys) != len(storages) or set(map(str, keys)) != storages.keys():
        read.broken(tr("its numbers are not those of its tensors"))
    for key in keys:
        count, storage = int.from_bytes(read.take(at, 8), "little"), storages[str(key)]
        if count * storage.width != storage.nbytes or at + 8 + storage.nbytes > read.size:
            read.broken(tr("it names {size} of numbers that are not there", size=human_bytes(storage.nbytes)))
        at += 8 + storage.nbytes
    return table


# The program ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Name:
    """Something of Python's that the pickle asks for."""

    text: str


@dataclass(frozen=True, slots=True)
class _Storage:
    kind: str
    key: str
    count: int  # elements
    width: int  # bytes of one

    @property
    def nbytes(self) -> int:
        return self.count * self.width


_OTHER = object()  # a value that is no part of a table

_DICT, _LAYOUT = "collections.OrderedDict", "torch.serialization._get_layout"
_PLAIN = frozenset({"torch.Size", "torch.device", "_codecs.encode", "builtins.complex", _LAYOUT})
_CLASSES = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter", "torch._tensor.Tensor"})
_OLD = {"__builtin__": "builtins"}  # what Python 2 called it


class _Program:
    """The instructions of one pickle, followed on plain values.

    storages: those that were named. at, steps: where the next pickle begins, and what this one took.
    """

    def __init__(self, read: FileBytes, data: bytes, most: int, at: int = 0) -> None:
        self._read, self._data, self._most = read, data, most
        self.at, self.steps = at, 0
        self.storages: dict[str, _Storage] = {}
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        steps = _INSTRUCTIONS
        try:
            while (code := self._data[self.at]) != _STOP:
                self.at += 1
                self.steps += 1
                if self.steps > self._most:
                    self._read.broken(tr("its table has more than {n} instructions", n=f"{self._most:,}"))
                if (step := steps.get(code)) is None:
                    _hostile(
                        self._read.path,
                        tr("an instruction {code}, which no table of tensors needs", code=f"0x{code:02x}"),
                    )
                step(self)
            self.at += 1
            return self._stack.pop()
        except (IndexError, KeyError, struct.error, ValueError, TypeError, OverflowError):
            self._read.broken(tr("its table cannot be followed"))

    # what stands in it ------------------------------------------------------------------------------------------

    def _take(self, count: int) -> bytes:
        self.at += count
        if self.at > len(self._data):
            raise IndexError
        return self._data[self.at - count : self.at]

    def _line(self) -> str:
        end = self._data.index(b"\n", self.at, self.at + 300)
        return self._take(end + 1 - self.at)[:-1].decode()

    def _number(self, form: str, width: int) -> Any:
        return struct.unpack(form, self._take(width))[0]

    def _protocol(self) -> None:
        self._take(1)

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _long(self) -> None:
        length = self._take(1)[0]
        if length > _LARGEST_NUMBER:
            self._read.broken(tr("a number in its table has {n} bytes", n=length))
        self._push(int.from_bytes(self._take(length), "little", signed=True))

    def _text(self) -> None:
        self._push(self._take(self._number("<I", 4)).decode("utf-8", "surrogatepass"))

    def _octets(self) -> None:
        self._push(self._take(self._take(1)[0]).decode("latin-1"))

    def _global(self) -> None:
        module, name = self._line(), self._line()
        full = f"{_OLD.get(module, module)}.{name}"
        known = full in _PLAIN or full in _CLASSES or full in _BUILDERS or full == _DICT
        if not known and not _STORAGE.fullmatch(full) and not _TYPE.fullmatch(full):
            _hostile(self._read.path, tr("it asks for {name}", name=one_line(full.removeprefix("builtins."), 100)))
        self._push(_Name(full))

    def _persistent(self) -> None:
        """The storage behind a tensor: ("storage", type, key, device, elements), and in old files a part of another."""
        word, kind, key, _, count, *view = self._stack.pop()
        found = _STORAGE.fullmatch(kind.text) if isinstance(kind, _Name) else None
        if word != "storage" or found is None or type(count) is not int or count < 0 or not isinstance(key, str):
            raise ValueError
        width = _STORAGES[found["kind"]]
        storage = _Storage(found["kind"], key, count, width)
        if self.storages.setdefault(key, storage) != storage:
            self._read.broken(tr("it names one storage in two sizes"))
        if view and view[0] is not None:
            _, first, part = view[0]
            if not 0 <= first <= first + part <= count:
                self._read.broken(tr("a tensor reaches beyond its storage"))
            storage = _Storage(storage.kind, key, part, width)
        self._push(storage)

    # what is put together ---------------------------------------------------------------------------------------

    def _mark(self) -> None:
        if len(self._marks) >= _DEEPEST:
            self._read.broken(tr("its table is nested too deeply"))
        self._marks.append(self._stack)
        self._stack = []

    def _marked(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _tuple(self, count: int | None = None) -> None:
        items = self._marked() if count is None else self._stack[-count:]
        if count is not None:
            if len(items) != count:
                raise IndexError
            del self._stack[-count:]
        self._push(tuple(items))

    def _append(self, *, several: bool) -> None:
        items = self._marked() if several else [self._stack.pop()]
        target = self._stack[-1]
        if not isinstance(target, list):
            raise TypeError
        target.extend(items)

    def _set(self, *, several: bool) -> None:
        items = self._marked() if several else [self._stack.pop(-2), self._stack.pop()]
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | float | None):  # the hash of a tuple of tuples can take for ever
                raise TypeError
            target[key] = value

    def _get(self, form: str, width: int) -> None:
        self._push(self._memo[self._number(form, width)])

    def _put(self, form: str, width: int) -> None:
        self._memo[self._number(form, width)] = self._stack[-1]

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise TypeError
        self._push(self._made(function.text, arguments))

    def _build(self) -> None:
        """Attributes are set on tables (`_metadata`) and on values of no account, on nothing else."""
        self._stack.pop()
        if not isinstance(self._stack[-1], dict):
            _hostile(self._read.path, tr("it sets attributes of a value that is no table"))

    def _made(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name not in _PLAIN and name not in _BUILDERS and name != _DICT:
            _hostile(self._read.path, tr("it asks for {name}", name=one_line(name, 100)))
        if name == _DICT:
            pairs = arguments[0] if arguments else []
            if not all(isinstance(pair, list | tuple) and isinstance(pair[0], str) for pair in pairs):
                raise TypeError
            return dict(pairs)
        if name in _BUILDERS:
            return _BUILDERS[name](self, *arguments)
        if name == "torch.Size":
            return tuple(arguments[0])
        return _OTHER

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any, width: int | None = None) -> Any:
        if not isinstance(storage, _Storage):
            raise TypeError
        width = storage.width if width is None else width
        numbers = (offset, *shape, *stride)
        if len(shape) != len(stride) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
            self._read.broken(tr("a tensor has an impossible shape"))
        elements = math.prod(shape)
        last = offset + sum((extent - 1) * step for extent, step in zip(shape, stride, strict=True))
        if elements and (last + 1) * width > storage.nbytes:
            self._read.broken(tr("a tensor reaches beyond its storage"))
        if elements > storage.nbytes // width + _EXPANDED:
            self._read.broken(tr("a tensor has an impossible shape"))
        return TorchTensor(tuple(shape), elements * width)

    def _typed(
        self, storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, kind: Any, *_: Any
    ) -> Any:
        found = _TYPE.fullmatch(kind.text) if isinstance(kind, _Name) else None
        if found is None:
            raise TypeError
        return self._tensor(storage, offset, shape, stride, width=max(int(found["bits"] or 8) // 8, 1))

    def _parameter(self, data: Any, *_: Any) -> Any:
        return data

    def _of_type(self, function: Any, kind: Any, arguments: Any, state: Any) -> Any:
        """A tensor with attributes; those of a class of somebody's own are not torch's to make."""
        if not isinstance(function, _Name) or function.text not in _BUILDERS or function.text == _OF_TYPE:
            raise TypeError
        return _BUILDERS[function.text](self, *arguments)


_OF_TYPE = "torch._tensor._rebuild_from_type_v2"
_BUILDERS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _Program._tensor,
    "torch._utils._rebuild_tensor_v2": _Program._tensor,
    "torch._utils._rebuild_tensor_v3": _Program._typed,
    "torch._utils._rebuild_parameter": _Program._parameter,
    "torch._utils._rebuild_parameter_with_state": _Program._parameter,
    _OF_TYPE: _Program._of_type,
}
_STOP = ord(".")
_INSTRUCTIONS: Mapping[int, Callable[[_Program], None]] = {
    0x80: _Program._protocol,
    ord("("): _Program._mark,
    ord("N"): lambda p: p._push(None),
    0x88: lambda p: p._push(True),
    0x89: lambda p: p._push(False),
    ord(")"): lambda p: p._push(()),
    ord("]"): lambda p: p._push([]),
    ord("}"): lambda p: p._push({}),
    0x8F: lambda p: p._push(_OTHER),
    ord("J"): lambda p: p._push(p._number("<i", 4)),
    ord("K"): lambda p: p._push(p._number("<B", 1)),
    ord("M"): lambda p: p._push(p._number("<H", 2)),
    ord("G"): lambda p: p._push(p._number(">d", 8)),
    0x8A: _Program._long,
    ord("X"): _Program._text,
    ord("U"): _Program._octets,
    ord("c"): _Program._global,
    ord("Q"): _Program._persistent,
    ord("t"): _Program._tuple,
    0x85: lambda p: p._tuple(1),
    0x86: lambda p: p._tuple(2),
    0x87: lambda p: p._tuple(3),
    ord("a"): lambda p: p._append(several=False),
    ord("e"): lambda p: p._append(several=True),
    ord("s"): lambda p: p._set(several=False),
    ord("u"): lambda p: p._set(several=True),
    ord("h"): lambda p: p._get("<B", 1),
    ord("j"): lambda p: p._get("<I", 4),
    ord("q"): lambda p: p._put("<B", 1),
    ord("r"): lambda p: p._put("<I", 4),
    ord("R"): _Program._reduce,
    ord("b"): _Program._build,
}
