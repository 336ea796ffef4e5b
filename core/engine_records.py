"""What runs on this machine for this user: each engine writes down beside its socket what it is, and others read it.

Whether an engine lives is not believed of its record: somebody listens at its socket, or nobody does.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from glmchat.core.json_files import small_json
from glmchat.core.sockets import listens, socket_dir


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """key: what must agree for a program to join; "" for an engine that belongs to one program alone.

    device, context: as they were asked for. started: seconds since 1970. keep_alive: seconds that it stays after its
    last user has left. starter: the process that began it. log: its stderr.
    """

    socket: str
    pid: int
    key: str = ""
    model: str = ""
    folder: str = ""
    quant: str | None = None
    device: str = "auto"
    context: int | None = None
    started: float = 0.0
    keep_alive: float = 0.0
    starter: int = 0
    log: str = ""

    @property
    def shared(self) -> bool:
        return bool(self.key)

    @property
    def path(self) -> Path:
        return _beside(Path(self.socket))

    def write(self) -> None:
        """Whole or not at all, and for nobody else to read. Raises OSError."""
        descriptor, name = tempfile.mkstemp(dir=self.path.parent, suffix=".new")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(asdict(self), file)
            Path(name).replace(self.path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise

    def forget(self) -> None:
        """Remove it and the socket: nobody can find this engine any more."""
        for path in (self.path, Path(self.socket)):
            with suppress(FileNotFoundError, PermissionError):
                path.unlink()


def _beside(socket_path: Path) -> Path:
    return socket_path.with_suffix(".json")


def _read(path: Path) -> EngineRecord | None:
    """None for what is no record. The socket is the one beside it, whatever the record says."""
    data: dict[str, Any] = small_json(path)
    known = {one.name: data[one.name] for one in fields(EngineRecord) if one.name in data}
    texts, numbers = ("key", "model", "folder", "device", "log"), ("pid", "started", "keep_alive", "starter")
    if any(not isinstance(known.get(name, ""), str) for name in texts) or "pid" not in known:
        return None
    if any(not isinstance(known.get(name, 0), int | float) for name in numbers):
        return None
    return EngineRecord(**{**known, "socket": str(path.with_suffix(".sock"))})


def running() -> list[EngineRecord]:
    """The engines that live, the oldest first. What dead ones left behind is removed. Raises Hostile or Failed."""
    records = []
    for path in socket_dir().glob("*-*.json"):
        record = _read(path)
        if record is None:
            continue
        if listens(Path(record.socket)):
            records.append(record)
        else:
            record.forget()
    return sorted(records, key=lambda record: record.started)


@contextmanager
def one_starts() -> Iterator[None]:
    """One program at a time looks for an engine and starts it where there is none, so that two never start two."""
    import fcntl

    descriptor = os.open(socket_dir() / "start.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def listener_pid(record: EngineRecord) -> int | None:
    """The process that listens at its socket, as the kernel says where it can; None if nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(record.socket)
            if sys.platform != "linux":
                return record.pid
            credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return None
    return int(struct.unpack("3i", credentials)[0])
