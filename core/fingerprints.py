"""What a file is, said in a few bytes: the hash of its content where that is cheap, else of samples of it.

An answer records with which weights it was made. Hashing 13 GB for that would take longer than the answer, so what is
known is used: the name of a hub's blob, the manifest beside a copy that glmchat made, an earlier look at the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from glmchat.core import locations
from glmchat.core.files import open_file
from glmchat.core.json_files import small_json

SMALL = 512 * 2**20  # bytes; up to here a file is hashed whole, once
_BLOCK = 64 * 1024
_SAMPLES = 64  # blocks of a large file, its first megabyte and its end among them
_HEAD = 2**20
_MANIFEST = "glmchat.json"
_ADAPTER = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".jinja", ".model")
_REMEMBERED = 400  # files
State = tuple[tuple[str, int, int, int], ...]  # of each file: name, size, time of its last change, inode


@dataclass(frozen=True, slots=True)
class FilePrint:
    """digest: "sha256:…" of the whole content, or "sample:…" of its size, head, end and blocks between."""

    name: str
    size: int
    modified: int  # nanoseconds since 1970
    digest: str

    @property
    def exact(self) -> bool:
        return self.digest.startswith("sha256:")

    def to_json(self) -> list[Any]:
        return [self.name, self.size, self.modified, self.digest]

    @staticmethod
    def from_json(data: Any) -> FilePrint:
        """Raises ValueError or TypeError for what is none."""
        name, size, modified, digest = data
        return FilePrint(str(name), int(size), int(modified), str(digest))


def fingerprint(paths: Iterable[Path]) -> tuple[FilePrint, ...]:
    """One print for each file, believing what is known of files that have not changed since. Raises OSError."""
    noted = small_json(_notes())
    fresh: dict[str, Any] = {}
    prints = []
    for path in paths:
        real = path.resolve()
        status = real.stat()
        state = [status.st_size, status.st_mtime_ns, status.st_ino]
        digest = _written_hash(path, real, status)
        if digest is None:
            old = noted.get(str(real))
            if isinstance(old, list) and len(old) == 4 and old[:3] == state:
                digest = str(old[3])
            else:
                digest = whole(real) if status.st_size <= SMALL else sampled(real)
                fresh[str(real)] = [*state, digest]
        prints.append(FilePrint(path.name, status.st_size, status.st_mtime_ns, digest))
    if fresh:
        _save({**noted, **fresh})
    return tuple(prints)


def look_again(path: Path, recorded: str) -> FilePrint:
    """The print as the bytes are now, believing nothing. recorded: decides between the whole and samples."""
    status = path.stat()
    digest = sampled(path) if recorded.startswith("sample:") else whole(path)
    return FilePrint(path.name, status.st_size, status.st_mtime_ns, digest)


def of_adapter(path: Path) -> str:
    """One hash of an adapter's weights and configuration; path: its folder or file. Raises OSError."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in _ADAPTER and p.is_file())
    prints = fingerprint(p for p in files if p.name != _MANIFEST)
    return of_text("\n".join(f"{p.name} {p.size} {p.digest}" for p in prints))


def state_of(path: Path) -> State:
    """What changes when a file of an adapter is replaced, without reading it; path: its folder or file.

    Empty for a path that was taken away meanwhile.
    """
    try:
        files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in _ADAPTER)
        states = [(p.name, p.stat()) for p in files]
    except OSError:
        return ()
    return tuple((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in states)


@cache
def program_state() -> tuple[int, int]:
    """Of this glmchat's files: how many, and the last change. A version that was changed in place is another one."""
    root = Path(__file__).resolve().parent.parent
    rooms = [room for room in root.iterdir() if room.is_dir() and (room / "__init__.py").is_file()]
    files = [file for room in rooms for file in (*room.rglob("*.py"), *room.rglob("*.so"))]
    return len(files), max(file.stat().st_mtime_ns for file in files)


def whole(path: Path) -> str:
    return f"sha256:{sha256_of(path)}"


def sha256_of(path: Path) -> str:
    """Of the whole content, in hexadecimal. Raises OSError."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled(path: Path) -> str:
    """Of the size, the first megabyte, and blocks at even distances to the end."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open_file(path) as file:
        digest.update(file.read(_HEAD))
        for number in range(1, _SAMPLES + 1):
            file.seek(max(0, (size - _BLOCK) * number // _SAMPLES))
            digest.update(file.read(_BLOCK))
    return "sample:" + digest.hexdigest()


def of_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _written_hash(path: Path, real: Path, status: os.stat_result) -> str | None:
    """The hash that somebody who had all the bytes wrote down, if the file is still the one he had."""
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return f"sha256:{real.name}"
    manifest = path.parent / _MANIFEST
    try:
        written = manifest.stat().st_mtime_ns
        files = small_json(manifest)["files"]
        entry = next(f for f in files if f["path"] == path.name)
        same = entry["size"] == status.st_size and status.st_mtime_ns <= written
        return f"sha256:{entry['sha256']}" if same and entry.get("sha256") else None
    except (OSError, ValueError, KeyError, TypeError, StopIteration, RecursionError):
        return None


def _notes() -> Path:
    return locations.state_dir() / "fingerprints.json"


def _save(notes: Mapping[str, Any]) -> None:
    latest = dict(list(notes.items())[-_REMEMBERED:])
    with suppress(OSError):  # a home that takes no files costs a second look, nothing else
        folder = _notes().parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = folder / f".fingerprints.{os.getpid()}.tmp"
        try:
            temporary.write_text(json.dumps(latest), encoding="utf-8")
            temporary.replace(_notes())
        finally:
            temporary.unlink(missing_ok=True)
