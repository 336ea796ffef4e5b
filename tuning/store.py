"""Examples on disk: millions of them take a few bytes of memory each, and any of them is one read away."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, overload

from glmchat.core.errors import Damaged
from glmchat.core.files import open_file
from glmchat.core.language import tr
from glmchat.tuning.examples import Example, Part, Place, Segment

_PARTS: tuple[Part, ...] = ("prompt", "answer", "stop")
_WORD = 4  # bytes; the lowest bit of a token's word says whether it is learned
_HEAD = 6  # words before the segments of an example


class Store:
    """Written from its beginning, then read. One thread may write, any may read."""

    def __init__(self, path: Path | None = None) -> None:
        """path: where the examples are kept; None: a file without a name, gone with the process."""
        self._file: BinaryIO = tempfile.TemporaryFile() if path is None else path.open("w+b")  # noqa: SIM115
        self._is_dirty = False
        self.files: list[str] = []
        self._offsets = array("Q", [0])  # in words, and the end of the last
        self.lengths = array("I")
        self.counts = array("I")  # of learned tokens
        self.stops = array("B")  # whether one of them ends an answer

    @classmethod
    def opened(cls, path: Path, files: Sequence[str]) -> Store:
        """One that was written. Raises Damaged where its end is missing."""
        store = cls.__new__(cls)
        store._file, store.files, store._is_dirty = open_file(path), list(files), False
        store._offsets, store.lengths, store.counts, store.stops = array("Q", [0]), array("I"), array("I"), array("B")
        end = os.fstat(store._file.fileno()).st_size // _WORD
        while (at := store._offsets[-1]) < end:
            head = array("I", store._read(at, _HEAD))
            if len(head) < _HEAD or at + head[0] > end or head[0] < _HEAD:
                store.close()
                raise Damaged(
                    tr("{path} is cut off", path=path.name), hint=tr("read the data again"), code="data.store"
                )
            store._offsets.append(at + head[0])
            store.lengths.append(head[0] - _HEAD - 3 * head[3])
            store.counts.append(head[4] >> 1)
            store.stops.append(head[4] & 1)
        return store

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, example: Example) -> None:
        place = example.place
        if place.file not in self.files[-1:]:
            if place.file in self.files:
                number = self.files.index(place.file)
            else:
                self.files.append(place.file)
                number = len(self.files) - 1
        else:
            number = len(self.files) - 1
        learned = sum(example.learned)
        stops = any(part.part == "stop" and example.learned[part.start] for part in example.segments)
        words = array("I", [0, number, place.line, len(example.segments), learned << 1 | stops, example.second])
        for segment in example.segments:
            words.extend((_PARTS.index(segment.part), segment.start, segment.end))
        words.extend(token << 1 | counts for token, counts in zip(example.ids, example.learned, strict=True))
        words[0] = len(words)
        words.tofile(self._file)
        self._is_dirty = True
        self._offsets.append(self._offsets[-1] + len(words))
        self.lengths.append(len(example.ids))
        self.counts.append(learned)
        self.stops.append(stops)

    def finish(self) -> None:
        """Everything is on disk from here on, whatever happens to the process."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def example(self, number: int) -> Example:
        words = array("I", self._read(self._offsets[number], self._offsets[number + 1] - self._offsets[number]))
        _, file, line, count, _, second = words[:_HEAD]
        begin = _HEAD + 3 * count
        parts = (words[at : at + 3] for at in range(_HEAD, begin, 3))
        segments = tuple(Segment(_PARTS[part], start, end) for part, start, end in parts)
        ids = tuple(word >> 1 for word in words[begin:])
        learned = tuple(bool(word & 1) for word in words[begin:])
        return Example(ids, learned, segments, Place(self.files[file], line), second)

    def close(self) -> None:
        self._file.close()

    def _read(self, at: int, count: int) -> bytes:
        if self._is_dirty:
            self._file.flush()
            self._is_dirty = False
        return os.pread(self._file.fileno(), count * _WORD, at * _WORD)


class Examples(Sequence[Example]):
    """Some examples of a store, by number. lengths, counts: of tokens and of learned ones, without reading any."""

    def __init__(self, store: Store, numbers: Sequence[int]) -> None:
        self._store, self._numbers = store, array("I", numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self._store, self._numbers[index])
        return self._store.example(self._numbers[index])

    @property
    def lengths(self) -> list[int]:
        return [self._store.lengths[number] for number in self._numbers]

    @property
    def counts(self) -> list[int]:
        return [self._store.counts[number] for number in self._numbers]
