"""KV caches of conversations on the disk: written when nobody waits, read when their ids come again.

A file is safetensors: the ids, their keys and values in blocks of positions, and a sum of each, so that a beginning can
be read alone and no damaged number is ever used. It belongs to what computed it (`key`), bit for bit; whatever is wrong
with it, the prompt is computed again. Only caches of `KVCache` on the CPU are kept: a card reads a prompt sooner, and
what transformers' own caches hold differs with the architecture.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glmchat.core import kv_files
from glmchat.core.files import open_file
from glmchat.core.text import one_line
from glmchat.engine.decoding.passes import Pass
from glmchat.engine.formats.folder_writer import Layout, header_bytes
from glmchat.engine.kv_cache import KVCache

log = logging.getLogger("glmchat.engine")

FORMAT = 1
BLOCK = 256  # positions that are read, written and summed together, at most
_BLOCK_BYTES = 2**24  # of one such block: the scratch that reading and writing takes
LEAST = 64  # ids; fewer are computed as fast as a file is opened
LEAST_MORE = 16  # ids beyond what a file holds for which it is written anew
IDLE_SECONDS = 20.0  # of rest after an answer; until then another question is likely to follow
_LARGEST_HEADER = 16 * 2**20  # bytes
_SUM = 32  # bytes, of sha256
# Caches that wait to be written in the place of none: a server that never rests must not keep all.
_MOST_HANDED_OVER = 2
_PARTS = count()  # for names of half files


class Unusable(Exception):
    """A file that is damaged, or was written by something else."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a cache holds: `ids` behind its prefix, and the passes that computed them.

    speed: ids a second at which this engine reads prompts, to say what a file saves; 0 if that is not known.
    """

    ids: tuple[int, ...]
    passes: tuple[Pass, ...]
    speed: float = 0.0


def _layout(cache: KVCache, length: int) -> Layout:
    """Of a file that holds the first `length` ids of such a cache."""
    heads, _, width = cache.keys[0].shape
    each = 2 * len(cache.keys) * heads * width * cache.keys[0].element_size()
    block = max(1, min(BLOCK, _BLOCK_BYTES // each))
    blocks = {
        str(start): (cache.keys[0].dtype, (len(cache.keys), 2, heads, min(block, length - start), width))
        for start in range(0, length, block)
    }
    return {"ids": (torch.int32, (length,)), **blocks, "sums": (torch.uint8, (len(blocks) + 2, _SUM))}


def _is_plain(cache: KVCache) -> bool:
    """Whether keys and values are all that it remembers, and lie where numpy finds them."""
    return type(cache) is KVCache and all(keys.device.type == "cpu" for keys in cache.keys)


def _size(header: bytes, layout: Layout) -> int:
    return len(header) + sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())


def _views(cache: KVCache) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and values of each layer as whole numbers of their width: numpy copies them in the thread that asks, where
    torch would start threads beside those that compute."""
    same = {1: torch.int8, 2: torch.int16, 4: torch.int32}[cache.keys[0].element_size()]
    return [(k.view(same).numpy(), v.view(same).numpy()) for k, v in zip(cache.keys, cache.values, strict=True)]


def key_of(words: Sequence[Any]) -> str:
    """One key of all that numbers depend on."""
    return hashlib.sha256(json.dumps(words, default=str, sort_keys=True).encode()).hexdigest()[:32]


def _sum(data: Any) -> bytes:
    return hashlib.sha256(data).digest()


def write(
    path: Path, key: str, cache: KVCache, contents: Contents, go_on: Callable[[], bool] = lambda: True
) -> int | None:
    """Bytes of the file, which appears whole or not at all; None if `go_on`, asked before each block and at the end,
    says that what the cache holds is not what it was. Raises OSError."""
    layout = _layout(cache, len(contents.ids))
    header = header_bytes(layout, _metadata(key, cache, contents))
    ids = np.asarray(contents.ids, dtype=np.int32)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{next(_PARTS)}{kv_files.PARTIAL}")
    views, sums = _views(cache), [_sum(ids)]
    file = os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb", buffering=0)
    try:
        with file:
            _put(file, header)
            _put(file, ids)
            for name, (_, shape) in layout.items():
                if name.isdecimal():
                    if not go_on():
                        return None
                    start = cache.prefix + int(name)
                    block = np.empty(shape, dtype=views[0][0].dtype)
                    for layer, both in enumerate(views):
                        for number, rows in enumerate(both):
                            block[layer, number] = rows[:, start : start + shape[3]]
                    _put(file, block)
                    sums.append(_sum(block))
            _put(file, b"".join((*sums, _sum(header))))
            size = file.tell()
            os.fsync(file.fileno())
        if not go_on():
            return None
        partial.replace(path)
        return size
    finally:
        partial.unlink(missing_ok=True)


def _put(file: Any, data: Any) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[file.write(rest) :]


def _metadata(key: str, cache: KVCache, contents: Contents) -> dict[str, str]:
    return {
        "kv": str(FORMAT),
        "key": key,
        "place": json.dumps([cache.prefix, cache.shift]),
        "passes": json.dumps([one.to_json() for one in contents.passes]),
        "speed": repr(contents.speed),
    }


class KVReader:
    """One file, open. Raises Unusable or OSError, now and from each method."""

    def __init__(self, path: Path, key: str, cache: KVCache) -> None:
        """cache: one that such a file would be read into; every measure of the file is compared with it."""
        self.bytes_read = 0
        self._file: BufferedReader = open_file(path)
        try:
            self._read_header(key, cache)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def _read_header(self, key: str, cache: KVCache) -> None:
        size = os.fstat(self._file.fileno()).st_size
        beginning = self._take(8)
        length = int.from_bytes(beginning, "little")
        if length > min(_LARGEST_HEADER, size - 8):
            raise Unusable("its header is longer than it can be")
        header = beginning + self._take(length)
        self._file.seek(size - _SUM)
        if self._take(_SUM) != _sum(header):
            raise Unusable("its header is damaged")
        try:
            told = json.loads(header[8:])
            metadata, (number,) = told["__metadata__"], told["ids"]["shape"]
            passes = tuple(Pass(*one[:3], *(tuple(rest) for rest in one[3:])) for one in json.loads(metadata["passes"]))
            self.speed = float(metadata["speed"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Unusable("its header says something else") from None
        if not isinstance(number, int) or not 0 < 4 * number < size:
            raise Unusable("its header says something else")
        self._cache, self._layout = cache, _layout(cache, number)
        if header != header_bytes(self._layout, _metadata(key, cache, Contents((), passes, self.speed))):
            raise Unusable("it is of another model or another version")
        ends = [0, *(one.end for one in passes)]
        if [one.start for one in passes] != ends[:-1] or ends[-1] != number:
            raise Unusable("its passes leave a hole")
        blocks = len(self._layout) - 2
        if size != _size(header, self._layout):
            raise Unusable("it ends too early or too late")
        self._file.seek(size - (blocks + 2) * _SUM)
        sums = self._take((blocks + 1) * _SUM)
        self._sums = [sums[at : at + _SUM] for at in range(0, len(sums), _SUM)]
        self._file.seek(len(header))
        ids = self._take(4 * number)
        if _sum(ids) != self._sums[0]:
            raise Unusable("its ids are damaged")
        self.ids, self.passes = np.frombuffer(ids, dtype=np.int32), passes

    def _take(self, length: int) -> bytes:
        data = self._file.read(length)
        if len(data) != length:
            raise Unusable("it ends too early")
        return data

    def read(self, length: int) -> Generator[None, None, None]:
        """Put what belongs to the first `length` ids into the cache, yielding between blocks. Its `length` does not
        move. Once."""
        views, cache = _views(self._cache), self._cache
        blocks = [(int(name), shape) for name, (_, shape) in self._layout.items() if name.isdecimal()]
        for number, (start, shape) in enumerate(blocks):
            if start >= length:
                return
            count = min(shape[3], length - start)
            block = np.empty(shape, dtype=views[0][0].dtype)
            data = block.data.cast("B")
            if self._file.readinto(data) != len(data):
                raise Unusable("it ends too early")
            if _sum(block) != self._sums[number + 1]:
                raise Unusable("its numbers are damaged")
            first = cache.prefix + start
            for layer, both in enumerate(views):
                for rows, read in zip(both, block[layer], strict=True):
                    rows[:, first : first + count] = read[:, :count]
            self.bytes_read += len(data)
            yield


@dataclass(eq=False)
class Job:
    """A cache that is to be written. due: of time.monotonic. used: when it was used last, in seconds since 1970."""

    key: str
    conversation: str
    cache: KVCache
    contents: Contents
    due: float
    used: float
    done: bool = False  # it is on the disk
    handed_over: bool = False  # nothing but this holds it


class KVStore:
    """The files of one engine, and the thread that writes them while the engine rests.

    key: what the numbers depend on beside their ids, for the name of a slot (`Slot.name`); None where that is not
    known. limit: bytes of all files together. is_busy: whether an answer is being written. A conversation is named by
    32 hexadecimal digits, which become part of its file's name; UNNAMED is one whose name is made here.
    All calls come from the engine's thread, but for `hurry`.
    """

    def __init__(
        self,
        key: Callable[[Hashable], str | None],
        limit: int,
        is_busy: Callable[[], bool],
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self._key, self._limit, self._is_busy, self._idle_seconds = key, limit, is_busy, idle_seconds
        self._jobs: dict[int, Job] = {}  # by the id of their cache
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ends = False
        self._ids: dict[Path, tuple[tuple[int, int], np.ndarray]] = {}  # of files, as long as they are the same

    # Reading.

    def find(self, name: Hashable, conversation: str, ids: Sequence[int], held: int, cache: KVCache) -> Match | None:
        """The file that holds most of `ids`, if that is so much more than `held` that it is worth reading."""
        key = self._key(name)
        if key is None or not _is_plain(cache) or len(ids) < held + LEAST:
            return None
        row, best, most = np.asarray(ids[:-1], dtype=np.int64), None, 0
        for file in kv_files.kv_files(key):
            kept = self._ids_of(file, key, cache)
            short = min(len(kept), len(row))
            differs = np.flatnonzero(kept[:short] != row[:short])
            common = int(differs[0]) if len(differs) else short
            if (common, file.conversation == conversation) > (most, False):
                best, most = file, common
        if best is None or most < held + LEAST:
            return None
        try:
            reader = KVReader(best.path, key, cache)
            if len(reader.ids) < most or (reader.ids[:most] != row[:most]).any():  # another file by now
                reader.close()
                return None
            with suppress(OSError):  # a disk that only reads
                os.utime(best.path)
        except (OSError, Unusable) as error:
            self.refuse(best.path, error)
            return None
        return Match(best.path, reader, most, best.conversation)

    def _ids_of(self, file: kv_files.KVFile, key: str, cache: KVCache) -> np.ndarray:
        try:
            status = file.path.stat()
            state = status.st_ino, status.st_size
            known = self._ids.get(file.path)
            if known is None or known[0] != state:
                reader = KVReader(file.path, key, cache)
                reader.close()
                known = self._ids[file.path] = state, reader.ids
            return known[1]
        except FileNotFoundError:
            self._ids.pop(file.path, None)
        except (OSError, Unusable) as error:
            self.refuse(file.path, error)
        return np.empty(0, dtype=np.int32)

    def refuse(self, path: Path, error: Exception) -> None:
        """Say what is wrong with a file, and take away what is damaged; a disk may come to itself."""
        log.warning("the cache in %s cannot be used, and its prompt is read again: %s", path, one_line(str(error)))
        self._ids.pop(path, None)
        if isinstance(error, Unusable):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    # Writing.

    def keep(self, name: Hashable, conversation: str, cache: KVCache, contents: Contents) -> Job | None:
        """Write this cache when the engine has rested for a while, unless it is changed or another job for it comes."""
        key = self._key(name)
        if key is None or not _is_plain(cache) or len(contents.ids) < LEAST:
            return None
        cache.floor = cache.length
        job = Job(key, conversation, cache, contents, time.monotonic() + self._idle_seconds, time.time())
        with self._changed:
            for number, other in list(self._jobs.items()):  # several answers to one question: the last one's
                if (other.key, other.conversation) == (key, conversation):
                    del self._jobs[number]
            self._jobs[id(cache)] = job
            if self._thread is None:
                self._ends = False
                self._thread = threading.Thread(target=self._work, name="kv", daemon=True)
                self._thread.start()
        return job

    def takes_over(self, cache: KVCache) -> bool:
        """Whether something of this cache is still to be written. Then nothing may change in it any more, and it is
        written as soon as the engine rests."""
        with self._changed:
            job = self._jobs.get(id(cache))
            over = sum(other.handed_over for other in self._jobs.values())
            if job is None or not self._is_wanted(job) or over >= _MOST_HANDED_OVER:
                return False
            job.due, job.handed_over = 0.0, True
            self._changed.notify_all()
            return True

    def release(self, cache: KVCache) -> None:
        """Its memory is needed: what was not written is lost."""
        with self._changed:
            self._jobs.pop(id(cache), None)
            self._changed.notify_all()

    def rest(self) -> None:
        """The engine may be idle now."""
        with self._changed:
            self._changed.notify_all()

    def hurry(self) -> None:
        """Nobody is here any more: write now, and not in a while."""
        with self._changed:
            for job in self._jobs.values():
                job.due = 0.0
            self._changed.notify_all()

    def close(self, seconds: float) -> None:
        """Write what is still to be written, for so long at most, beside an answer too; nothing is half written."""
        with self._changed:
            thread, self._ends = self._thread, True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._jobs, seconds)
            self._jobs.clear()
            self._changed.notify_all()
        if thread is not None:
            thread.join(1.0)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.done = self._write(job)
            except (OSError, RuntimeError, MemoryError) as error:
                log.warning("the cache of a conversation is not kept: %s", one_line(str(error)))
            with self._changed:
                if self._jobs.get(id(job.cache)) is job:
                    del self._jobs[id(job.cache)]
                self._changed.notify_all()

    def _next(self) -> Job | None:
        """The next that is due, once the engine rests. None: there will be none."""
        with self._changed:
            while True:
                job = min(self._jobs.values(), key=lambda job: job.due, default=None)
                if self._ends:
                    if job is None:
                        self._thread = None
                    return job
                wait = None if job is None else job.due - time.monotonic()
                if job is not None and wait is not None and wait <= 0:
                    if not self._is_busy():
                        return job
                    wait = None
                self._changed.wait(wait)

    def _write(self, job: Job) -> bool:
        path, layout = kv_files.kv_path(job.key, job.conversation), _layout(job.cache, len(job.contents.ids))
        size = _size(header_bytes(layout, _metadata(job.key, job.cache, job.contents)), layout)
        folder = kv_files.open_folder()
        if not self._may_go_on(job) or not kv_files.make_room(size, self._limit, path):
            return False
        if shutil.disk_usage(folder).free < 2 * size:
            log.warning("the cache of a conversation is not kept: the disk has no room for %d bytes", size)
            return False
        return write(path, job.key, job.cache, job.contents, lambda: self._may_go_on(job)) is not None

    def _may_go_on(self, job: Job) -> bool:
        """Waits while an answer is being written."""
        with self._changed:
            self._changed.wait_for(lambda: self._ends or not self._is_wanted(job) or not self._is_busy())
            return self._is_wanted(job)

    def _is_wanted(self, job: Job) -> bool:
        is_whole = job.cache.floor >= job.cache.prefix + len(job.contents.ids)
        is_last = self._jobs.get(id(job.cache)) is job
        return is_whole and is_last and not kv_files.is_forgotten(job.conversation, job.used)


@dataclass(frozen=True, slots=True)
class Match:
    """length: ids that it holds of those that were asked for."""

    path: Path
    reader: KVReader
    length: int
    conversation: str
