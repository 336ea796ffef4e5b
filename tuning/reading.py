"""Rows out of files, one after another, in bounded memory: JSON lines, one array of JSON, CSV and TSV, plain text.

orjson reads each row by itself, cut out of the file here: readers of whole files stop at the first fault and cannot
say where a row stands. What cannot be read is a `Fault` of that place, and reading goes on behind it.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from glmchat.core.errors import Damaged, refusal
from glmchat.core.files import open_file
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.tuning.examples import Place
from glmchat.tuning.raw import Fault, Raw, position, require_rows_file

LARGEST = 16 * 2**20  # bytes of one row
_BLOCK = 2**20
_BOM = b"\xef\xbb\xbf"
_BOMS_16 = (b"\xff\xfe", b"\xfe\xff")
# A string ends on its own line, in JSON; one that does not is broken, and what follows is read on from there.
_MARK = re.compile(rb'"(?:[^"\\\n]|\\[^\n])*(["\n]|\\\n)?|[\[\]{},]')
_BLANK = b" \t\r\n"
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".md")


Heard = Callable[[int], None]  # (bytes read so far)
Note = Callable[[str, int], None]  # (what is odd about the file as a whole: "bom", "crlf"; line)


def read_rows(path: Path, note: Note, heard: Heard = lambda done: None) -> Iterator[Raw | Fault]:
    """All rows of a file, and what in it is none, in their order. heard: bytes read so far.

    Raises Damaged for a file that cannot be opened, or is known to be no text.
    """
    name = str(path)
    try:
        with open_file(path) as file:
            head = file.read(_BLOCK)
            require_rows_file(path, head)
            if head.startswith(_BOMS_16):
                wanted = tr("a file in UTF-8: `iconv -f UTF-16 -t UTF-8` makes one")
                yield Fault(Place(name, 1), "utf8", tr("text in UTF-16"), wanted, column=1)
                return
            begin = len(_BOM) if head.startswith(_BOM) else 0
            if begin:
                note("bom", 1)
            file.seek(begin)
            kind = path.suffix.lower()
            if kind in (".csv", ".tsv"):
                yield from _table(file, name, "\t" if kind == ".tsv" else None, heard)
            elif kind in (".txt", ".md"):
                yield from _text(file, name, note, heard)
            elif _is_array(head[begin:]):
                yield from _array(file, name, note, heard, column=1 + bool(begin))
            else:
                yield from _lines(file, name, note, heard, column=1 + bool(begin))
    except OSError as error:
        known = refusal(error)
        if known is not None:
            raise known from None
        raise Damaged(
            tr("{path} cannot be read: {error}", path=one_line(name), error=error.strerror or str(error)),
            hint=tr("check the name"),
            code="data.unreadable",
        ) from None


def _is_array(head: bytes) -> bool:
    """One array over the whole file; rows that are arrays themselves stand on a line each."""
    first, _, rest = head.lstrip(_BLANK).partition(b"\n")
    if not first.startswith(b"["):
        return False
    try:
        items = orjson.loads(first)
    except orjson.JSONDecodeError:
        return True
    is_talk = bool(items) and all(isinstance(item, dict) and item.keys() & {"role", "from"} for item in items)
    return not (is_talk or rest.lstrip(_BLANK).startswith(b"["))


def _lines(file: BinaryIO, name: str, note: Note, heard: Heard, column: int) -> Iterator[Raw | Fault]:
    done = file.tell()
    for number, line in _bounded_lines(file, note):
        done += len(line)
        heard(done)
        place = Place(name, number)
        if len(line) > LARGEST:
            yield _too_large(place)
        elif line.strip(_BLANK):
            yield _parsed(line.rstrip(b"\r\n"), place, column)
        column = 1


def _bounded_lines(file: BinaryIO, note: Note) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers; of one that is too large only the beginning, which is too large too."""
    number, is_plain = 1, True
    while line := file.readline(LARGEST + 1):
        if is_plain and line.endswith(b"\r\n"):
            note("crlf", number)
            is_plain = False
        yield number, line
        while len(line) > LARGEST and not line.endswith(b"\n"):
            line = file.readline(LARGEST + 1)
        number += 1


class _Counted:
    """A file read in blocks, of which only what is still looked at is kept."""

    def __init__(self, file: BinaryIO, note: Note, heard: Heard, column: int) -> None:
        self._file, self._note, self._heard, self._done = file, note, heard, file.tell()
        self._is_plain = True
        self.data = b""
        self.line, self.column, self._at = 1, column, 0  # of data[_at]

    def place(self, at: int) -> tuple[int, int]:
        """Line and column of data[at]; never asked for something before what was asked for last."""
        between = self.data[self._at : at]
        if newlines := between.count(b"\n"):
            self.line += newlines
            between, self.column = between[between.rindex(b"\n") + 1 :], 1
        self.column += sum(1 for byte in between if byte & 0xC0 != 0x80)
        self._at = at
        return self.line, self.column

    def more(self, keep: int) -> bool:
        """Read on, and forget what stands before data[keep]. False at the end of the file."""
        self.place(max(keep, self._at))
        block = self._file.read(_BLOCK)
        self._done += len(block)
        self._heard(self._done)
        self.data = self.data[keep:] + block
        self._at -= keep
        if self._is_plain and (end := self.data.find(b"\r\n")) >= 0:
            self._note("crlf", self.line + self.data[self._at : end].count(b"\n"))
            self._is_plain = False
        return bool(block)

    def row(self, name: str, begin: int, end: int) -> Raw | Fault | None:
        """What stands in data[begin:end]; None for blanks."""
        data = self.data[begin:end]
        lead = len(data) - len(data.lstrip(_BLANK))
        if lead == len(data):
            return None
        line, column = self.place(begin + lead)
        return _parsed(data.strip(_BLANK), Place(name, line), column)


def _array(file: BinaryIO, name: str, note: Note, heard: Heard, column: int) -> Iterator[Raw | Fault]:
    """The elements of one array. A broken one ends where the next begins on a line of its own, indented alike; what
    stands behind the end of the array is named, and read as if it went on."""
    text = _Counted(file, note, heard, column)
    text.more(0)
    at = begin = text.data.index(b"[") + 1
    depth, closed, first = 1, False, True
    while True:
        mark = _MARK.search(text.data, at)
        if mark is None or (mark[1] is None and mark[0].startswith(b'"')):  # nothing, or half a string
            end = len(text.data)
            is_large, at = end - begin > LARGEST, end if mark is None else mark.start()
            if not is_large:
                is_more = text.more(begin)
                at, begin, end = at - begin, 0, len(text.data)
                if is_more:
                    continue
            rest = text.data[begin:].strip(_BLANK)
            row = text.row(name, begin, end) if rest else None
            following = _next_row(text.data, begin, end)
            if row is not None and closed:
                yield _behind(row)
                return
            if following is not None and isinstance(row, Fault):
                yield row
                at, begin, depth = following, following, 1
                continue
            if is_large:
                yield _too_large(Place(name, text.place(begin)[0]))
                at, begin, depth = end, end, 1
                continue
            if row is not None:
                yield row
            if not closed:
                line, place_column = text.place(end)
                found, wanted = tr("the end of the file"), tr("] behind the last row")
                yield Fault(Place(name, line), "json", found, wanted, column=place_column)
            return
        at, sign = mark.end(), mark[0]
        if closed:
            row = text.row(name, begin, at)
            yield _behind(row)
            closed, begin = sign == b"]", begin if sign == b"{" else at
            depth = 1 + (sign == b"{")
        elif sign in (b"[", b"{"):
            depth += 1
        elif depth > 1 and sign in (b"]", b"}"):
            depth -= 1
        elif depth == 1 and sign in (b",", b"]"):
            row = text.row(name, begin, mark.start())
            if row is None:
                if not (sign == b"]" and first):
                    line, place_column = text.place(mark.start())
                    wanted = tr("a row, or no comma behind the last one")
                    yield Fault(Place(name, line), "json", repr(sign.decode()), wanted, column=place_column)
            else:
                yield row
                following = _next_row(text.data, begin, mark.start()) if isinstance(row, Fault) else None
                if following is not None:
                    at = begin = following
                    continue
            begin, closed, first = at, sign == b"]", False


def _next_row(data: bytes, begin: int, end: int) -> int | None:
    """Where, inside a broken row, a line begins as the row's first line does."""
    lead = data[begin:end][: end - begin - len(data[begin:end].lstrip(_BLANK))]
    if b"\n" not in lead:
        return None
    found = data.find(lead[lead.rindex(b"\n") :] + b"{", begin + len(lead), end)
    return None if found < 0 else found


def _behind(row: Raw | Fault | None) -> Fault:
    assert row is not None
    shown = row.found if isinstance(row, Fault) else one_line(repr(row.value), 40)
    wanted = tr("the end of the file behind the ] that closes the array")
    return Fault(row.place, "json", shown, wanted, column=row.column)


def _parsed(data: bytes, place: Place, column: int) -> Raw | Fault:
    """One row of JSON."""
    try:
        value = orjson.loads(data)
        if (name := _twice(data)) is None:
            return Raw(value, place, data, column)
        found = tr("the name {name} twice in one object", name=repr(one_line(name, 40)))
        return Fault(place, "json", found, tr("each name once: the later value would hide the first"), column=column)
    except orjson.JSONDecodeError as error:
        words, at = error.msg, error.pos
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line, where = position(Raw(None, place, column=column), data[: error.start].decode("utf-8"))
        found = tr("the byte 0x{byte:02x}, which is no UTF-8", byte=data[error.start])
        return Fault(Place(place.file, line), "utf8", found, _utf8(), column=where)
    line, where = position(Raw(None, place, column=column), text[:at])
    found = one_line(repr(text[at : at + 20]), 60) if text[at:].strip() else tr("the end of the row")
    return Fault(Place(place.file, line), "json", found, tr("JSON ({words})", words=words), column=where)


def _twice(data: bytes) -> str | None:
    """A name that an object of this row has twice, of which orjson keeps the last without a word."""
    twice: list[str] = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice.append(next(name for name in names if names.count(name) > 1))

    with suppress(RecursionError):
        json.loads(data, object_pairs_hook=look, parse_int=str, parse_float=str)
    return twice[0] if twice else None


def _utf8() -> str:
    return tr("a file in UTF-8: `iconv -f GB18030 -t UTF-8` makes one of Chinese text")


def _too_large(place: Place) -> Fault:
    return Fault(place, "large", tr("a row of more than {size} MB", size=LARGEST // 2**20), tr("rows that fit a model"))


def _table(file: BinaryIO, name: str, between: str | None, heard: Heard) -> Iterator[Raw | Fault]:
    """Rows as {column: cell}, the first line naming the columns. Raises Damaged for one that cannot."""
    csv.field_size_limit(LARGEST)
    text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
    head = text.readline()
    if between is None:
        between = max(",;\t", key=head.count)
    names = next(csv.reader([head], delimiter=between), [])
    names = [column.strip() for column in names]
    if not names or len(set(names)) < len(names) or "" in names:
        raise Damaged(
            tr("{file}:1: the first line does not name the columns, each by another name", file=one_line(name)),
            hint=tr("for example: question,answer"),
            code="data.table",
        )
    rows, line = csv.reader(text, delimiter=between, strict=True), 2
    while True:
        place = Place(name, line)
        try:
            cells = next(rows, None)
        except csv.Error as error:
            yield Fault(place, "csv", one_line(str(error), 80), tr("cells with their quotes doubled and closed"))
            line = rows.line_num + 2
            continue
        if cells is None:
            break
        line = rows.line_num + 2
        heard(file.tell())
        if not cells:
            continue
        if any("\udc80" <= character <= "\udcff" for cell in cells for character in cell):
            yield Fault(place, "utf8", tr("bytes that are no UTF-8"), _utf8())
        elif len(cells) != len(names):
            last = line - 1
            found = tr("{count} cells", count=len(cells))
            if last > place.line:
                first = place.line
                found = tr("{count} cells on the lines {first} to {last}", count=len(cells), first=first, last=last)
            wanted = tr("{count} cells: {names}", count=len(names), names=one_line(", ".join(names), 80))
            yield Fault(place, "csv", found, wanted)
        else:
            yield Raw(dict(zip(names, cells, strict=True)), place)
    text.detach()


def _text(file: BinaryIO, name: str, note: Note, heard: Heard) -> Iterator[Raw | Fault]:
    """Each line that is not blank."""
    done = 0
    for number, line in _bounded_lines(file, note):
        done += len(line)
        heard(done)
        place = Place(name, number)
        if len(line) > LARGEST:
            yield _too_large(place)
            continue
        try:
            said = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            found = tr("the byte 0x{byte:02x}, which is no UTF-8", byte=line[error.start])
            before = len(line[: error.start].decode("utf-8"))
            yield Fault(place, "utf8", found, _utf8(), column=before + 1)
            continue
        if said:
            yield Raw({"text": said}, place)
