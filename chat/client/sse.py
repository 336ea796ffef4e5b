"""Server-sent events from bytes that may be cut anywhere: inside a line end, a character, a field name.

Follows the WHATWG event stream grammar as far as this API uses it: `data`, `event`, comments; LF, CRLF and CR.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from glmchat.core.errors import ServerFailed
from glmchat.core.language import tr

LINE_LIMIT = 64 * 1024 * 1024  # bytes; a first chunk with the ids of a million-token prompt takes 8 MB


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event: its data lines joined, and its name ("message" where the server gives none)."""

    data: str
    name: str = "message"


@dataclass(frozen=True, slots=True)
class Comment:
    """A line that starts with a colon: keep-alive, or progress for those who know."""

    text: str


class EventParser:
    """Feed bytes, take events. Lines are cut as bytes and decoded whole, so no character is ever split."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0  # bytes of the buffer that hold no line end; keeps long lines linear
        self._data: list[str] = []
        self._name = "message"
        self._first = True

    def feed(self, chunk: bytes) -> Iterator[ServerEvent | Comment]:
        self._buffer += chunk
        yield from self._lines(at_end=False)
        if len(self._buffer) > LINE_LIMIT:
            raise ServerFailed(
                tr("the server sent a line without an end"),
                hint=tr("is this an OpenAI-compatible server?"),
                code="server.form",
            )

    def end(self) -> Iterator[ServerEvent | Comment]:
        """What a server leaves behind that closes without the last blank line."""
        yield from self._lines(at_end=True)
        if self._buffer:
            yield from self._line(bytes(self._buffer))
            self._buffer.clear()
        yield from self._line(b"")

    def _lines(self, *, at_end: bool) -> Iterator[ServerEvent | Comment]:
        while True:
            positions = [p for p in (self._buffer.find(b, self._searched) for b in (b"\n", b"\r")) if p >= 0]
            if not positions:
                self._searched = len(self._buffer)
                return
            end = min(positions)
            width = 1
            if self._buffer[end] == 0x0D:
                if end + 1 == len(self._buffer) and not at_end:
                    self._searched = end  # the LF of this CRLF may be in the next chunk
                    return
                if self._buffer[end + 1 : end + 2] == b"\n":
                    width = 2
            line = bytes(self._buffer[:end])
            del self._buffer[: end + width]
            self._searched = 0
            yield from self._line(line)

    def _line(self, raw: bytes) -> Iterator[ServerEvent | Comment]:
        if self._first:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
            self._first = False
        line = raw.decode("utf-8", "replace")
        if not line:
            if self._data:
                yield ServerEvent("\n".join(self._data), self._name)
            self._data, self._name = [], "message"
            return
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not field:
            yield Comment(value)
        elif field == "data":
            self._data.append(value)
        elif field == "event":
            self._name = value
