"""What an engine process is told on its command line. Standard library only: it is read before torch is imported."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """folder: a checkpoint folder or a GGUF file. sampling: defaults for what a request leaves open.

    adapters: store name -> folder, for those the store's own folder does not hold.
    uds: the Unix socket; otherwise host and port.
    """

    folder: Path
    model: str
    revision: str | None = None
    quant: int | None = None
    quant_label: str | None = None
    copy: Mapping[str, Any] | None = None  # where the quantised copy is kept: {"out": folder, "manifest": {…}}
    dtype: str | None = None
    device: str = "auto"
    threads: int | None = None
    context: int | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    uds: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    lifeline: bool = False


def parse_options(arguments: Sequence[str]) -> ServeOptions:
    parser = argparse.ArgumentParser(prog="python -m glmchat.serve", allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True, help="checkpoint folder or GGUF file")
    parser.add_argument("--model", required=True, help="the name clients use")
    parser.add_argument("--revision")
    parser.add_argument("--quant", type=int, choices=(4, 8))
    parser.add_argument("--quant-label")
    parser.add_argument("--copy", type=json.loads)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--context", type=int)
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--sampling", type=json.loads, default={})
    parser.add_argument("--uds", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--lifeline", action="store_true", help="end when stdin does")
    found = vars(parser.parse_args(arguments))
    pairs = [text.partition("=") for text in found.pop("adapter")]
    return ServeOptions(**found, adapters={name: Path(folder) for name, _, folder in pairs})
