"""What may lie in the place of a file: pipes, sockets, devices, folders, links to nowhere, files of a terabyte."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Mapping
from contextlib import chdir
from pathlib import Path


def _socket(path: Path) -> None:
    with chdir(path.parent), socket.socket(socket.AF_UNIX) as listener:  # a socket's path has 108 bytes at most
        listener.bind(path.name)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**12)


STRANGE: Mapping[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "socket": _socket,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "full device": lambda path: path.symlink_to("/dev/full"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "folder": Path.mkdir,
    "loop": lambda path: path.symlink_to(path.name),
    "own memory": lambda path: path.symlink_to("/proc/self/mem"),
    "terabyte": _sparse,
}


def put(kind: str, path: Path) -> None:
    """Put one of `STRANGE` in the place of `path`, whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    STRANGE[kind](path)
