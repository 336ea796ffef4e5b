"""What an engine is to load, and its command line; how people write bits: `--quant 4`, `--bits q8`, `NAME:int4`."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line

_WORDS = {f"{prefix}{bits}": bits for bits in (4, 8) for prefix in ("", "int", "q")}


def quant_bits(word: str) -> int | None:
    """4 or 8 for "4", "int4", "q4" and their like in any case; None for every other word."""
    return _WORDS.get(word.lower())


def parse_quant(text: str | None, flag: str = "--quant") -> int | None:
    """The value of `flag`: 4 or 8, or None where it was not given. Raises Usage."""
    if text is None:
        return None
    bits = quant_bits(text)
    if bits is None:
        raise Usage(
            tr("{flag} cannot be {value}", flag=flag, value=repr(one_line(text))),
            hint=tr("4 or 8"),
            code="usage.value",
        )
    return bits


DTYPES = ("float32", "bfloat16", "float16")
PRODUCTS = ("int8",)
CACHE_TYPES = ("float32", "bfloat16", "int8")


def _argument(read: Callable[[str], Any], write: Callable[[Any], str] = str, **more: Any) -> dict[str, Any]:
    """What makes a field an option of the command line: how its text is read and written; more: for argparse."""
    return {"write": write, "argument": {"type": read, **more}}


def _pair(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    return name, Path(folder)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Whatever is None is left to the engine.

    A new option is a field here and in `EngineFlags`, whose `options` hands it on; one for a load also stands in
    `for_load`.
    """

    # A checkpoint folder or a GGUF file, absolute: children start from `/`. None: no model was chosen yet.
    folder: Path | None = field(default=None, metadata=_argument(Path))
    # The name that answers, clients and the window use.
    model: str | None = field(default=None, metadata=_argument(str))
    revision: str | None = field(default=None, metadata=_argument(str))
    # Bits to quantise to at load; None: the weights as they are.
    quant: int | None = field(default=None, metadata=_argument(int, choices=(4, 8)))
    # How the weights are named: "q4_1", "int4-g128".
    quant_label: str | None = field(default=None, metadata=_argument(str))
    # Where the copy quantised at load is kept: {"out": folder, "manifest": {…}}; None: only in memory.
    copy: Mapping[str, Any] | None = field(default=None, metadata=_argument(json.loads, json.dumps))
    dtype: str | None = field(default=None, metadata=_argument(str, choices=DTYPES))
    # Of which type activations are where they meet weights of 4 bits; None: as exact as it costs nothing.
    products: str | None = field(default=None, metadata=_argument(str, choices=PRODUCTS))
    # Of which type keys and values are kept; None: as the activations are.
    cache_type: str | None = field(default=None, metadata=_argument(str, choices=CACHE_TYPES))
    # "auto": a GPU where there is one.
    device: str = field(default="auto", metadata=_argument(str))
    threads: int | None = field(default=None, metadata=_argument(int))
    # Seconds that an engine stays for whoever comes next, after its last user has left; 0: it is one program's alone.
    keep_alive: float = field(default=0.0, metadata=_argument(float))
    # Tokens to hold.
    context: int | None = field(default=None, metadata=_argument(int))
    # Answers to write at once; None: as many as memory allows, at most 16.
    parallel: int | None = field(default=None, metadata=_argument(int))
    # Bytes of conversations' caches that may lie on the disk; 0: none is written or read.
    kv_cache: int = field(default=0, metadata=_argument(int))
    # (store name, folder) of adapters that may be asked for, beside those in the store's own folder.
    adapters: tuple[tuple[str, Path], ...] = field(
        default=(), metadata=_argument(_pair, "{0[0]}={0[1]}".format, action="append", metavar="NAME=FOLDER")
    )
    # Defaults for what a request leaves open: field of core.messages.Sampling -> value.
    sampling: Mapping[str, Any] = field(default_factory=dict, metadata=_argument(json.loads, json.dumps))

    def __post_init__(self) -> None:
        if self.folder is not None:
            object.__setattr__(self, "folder", self.folder.expanduser().absolute())

    def to_arguments(self) -> list[str]:
        """The command line that `from_arguments` reads as these options."""
        arguments, untouched = [], EngineOptions()
        for one in fields(self):
            value, write = getattr(self, one.name), one.metadata["write"]
            if value != getattr(untouched, one.name):
                parts = value if one.name == "adapters" else (value,)
                arguments += [f"{_flag(one.name)}={write(part)}" for part in parts]
        return arguments

    @staticmethod
    def from_arguments(arguments: Sequence[str]) -> EngineOptions:
        """Ends the process with argparse's words where they are none of ours."""
        parser = argparse.ArgumentParser(prog="engine options", allow_abbrev=False, argument_default=argparse.SUPPRESS)
        for one in fields(EngineOptions):
            parser.add_argument(_flag(one.name), dest=one.name, **one.metadata["argument"])
        values = vars(parser.parse_args(arguments))
        return EngineOptions(**{**values, "adapters": tuple(values.get("adapters", ()))})

    def for_load(self) -> dict[str, Any]:
        """The keywords of `Engine.load`."""
        names = ("quant", "dtype", "products", "cache_type", "device", "threads", "context", "parallel")
        return {name: getattr(self, name) for name in names}

    @property
    def files_folder(self) -> Path | None:
        """Where files beside the weights are, like generation_config.json."""
        return self.folder if self.folder is None or self.folder.is_dir() else self.folder.parent

    def require_folder(self) -> Path:
        """Raises Usage if no model was chosen."""
        if self.folder is None:
            raise Usage(tr("no model was chosen"), hint=tr("name one, or `glmchat list`"), code="model.none")
        return self.folder


def parse_device(text: str) -> str:
    """ "auto", "cpu", "mps", "cuda", "cuda:1" or several cards, "cuda:0,cuda:1", in small letters. Raises Usage for
    anything else, and for a card that is named twice."""
    word = text.strip().lower().replace(" ", "")
    names = word.split(",")
    if not re.fullmatch(r"auto|cpu|mps|cuda|cuda:\d{1,2}(,cuda:\d{1,2})*", word) or len(set(names)) < len(names):
        raise Usage(
            tr("{flag} cannot be {value}", flag="--device", value=repr(one_line(text, 60))),
            hint="auto, cpu, cuda, cuda:N, cuda:0,cuda:1, mps",
            code="usage.device",
        )
    return word


def parse_dtype(text: str | None) -> str | None:
    """One of DTYPES, or None where none was given. Raises Usage."""
    return _one_of(DTYPES, text, "--dtype")


def parse_products(text: str | None) -> str | None:
    """One of PRODUCTS, or None where none was given. Raises Usage."""
    return _one_of(PRODUCTS, text, "--products")


def parse_cache_type(text: str | None) -> str | None:
    """One of CACHE_TYPES, or None where none was given or "auto". Raises Usage."""
    return None if text == "auto" else _one_of(("auto", *CACHE_TYPES), text, "--cache-type")


def _one_of(names: Sequence[str], text: str | None, flag: str) -> str | None:
    if text is not None and text not in names:
        raise Usage(
            tr("{flag} cannot be {value}", flag=flag, value=repr(one_line(text))),
            hint=", ".join(names),
            code="usage.value",
        )
    return text


MOST_PARALLEL = 64


def parse_parallel(text: str) -> int | None:
    """The value of `--parallel`: how many answers are written at once; None for "auto". Raises Usage."""
    word = text.strip().lower()
    if word == "auto":
        return None
    if not re.fullmatch(r"[0-9]{1,4}", word) or not 1 <= int(word) <= MOST_PARALLEL:
        raise Usage(
            tr("{flag} cannot be {value}", flag="--parallel", value=repr(one_line(word, 60))),
            hint=tr("auto, or 1 to {most}", most=MOST_PARALLEL),
            code="usage.value",
        )
    return int(word)


def _flag(name: str) -> str:
    return "--adapter" if name == "adapters" else "--" + name.replace("_", "-")
