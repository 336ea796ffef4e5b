"""A row as its file has it, and what is wrong with one: where exactly, what was found and what was wanted; and files
that hold none."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmchat.core.errors import Damaged
from glmchat.core.language import tr
from glmchat.core.shell import shell_word
from glmchat.core.text import one_line
from glmchat.tuning.examples import Place


@dataclass(frozen=True, slots=True)
class Fault:
    """Why something of a file is not used. reason: one of a few words, to count by; column: in characters, from 1."""

    place: Place
    reason: str
    found: str
    wanted: str
    example: str = ""
    column: int | None = None

    def __str__(self) -> str:
        where = f"{self.place}" if self.column is None else f"{self.place}:{self.column}"
        line = tr("{where}: found {found}; wanted {wanted}", where=where, found=self.found, wanted=self.wanted)
        return line + (tr(", for example {example}", example=self.example) if self.example else "")


@dataclass(frozen=True, slots=True)
class Raw:
    """One row as its file has it: a JSON value, the cells of a line by their names, or a line of text.

    source: the bytes it was read from, to find a field's column; none for tables and text. column: where it begins.
    """

    value: Any
    place: Place
    source: bytes = b""
    column: int = 1

    def column_of(self, path: tuple[str | int, ...]) -> tuple[int, int | None]:
        """Line and column of a part of the value, as ("messages", 2, "content")."""
        if not self.source:
            return self.place.line, None
        return position(self, _before(self.source.decode("utf-8"), path))


def position(row: Raw, before: str) -> tuple[int, int]:
    """Line and column behind the text `before`, with which the row begins."""
    newlines = before.count("\n")
    column = len(before) - before.rfind("\n") if newlines else row.column + len(before)
    return row.place.line + newlines, column


def _before(text: str, path: tuple[str | int, ...]) -> str:
    """What of a JSON text stands before the value at `path`; before what holds it, where it is not there."""
    decoder, at = json.JSONDecoder(), 0
    blank = re.compile(r"[ \t\r\n]*")

    def skip(index: int) -> int:
        found = blank.match(text, index)
        return index if found is None else found.end()

    at = skip(0)
    for step in path:
        inside, number = skip(at + 1), 0
        while text[inside : inside + 1] not in ("", "]", "}"):
            name: str | int = number
            if text[at] == "{":
                name, inside = decoder.raw_decode(text, inside)
                inside = skip(skip(inside) + 1)
            if name == step:
                break
            inside = skip(decoder.raw_decode(text, inside)[1])
            inside, number = skip(inside + (text[inside : inside + 1] == ",")), number + 1
        else:
            break
        at = inside
    return text[:at]


# first bytes -> the program that unpacks it (all four know -dc), the ending that it gives
_PACKED = {
    b"\x1f\x8b": ("gzip", ".gz"),
    b"BZh": ("bzip2", ".bz2"),
    b"\xfd7zXZ\x00": ("xz", ".xz"),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst"),
}


def require_rows_file(path: Path, head: bytes) -> None:
    """Raises Damaged for what is known to be no text. head: the first bytes of the file, a few hundred at least."""
    for magic, (program, ending) in _PACKED.items():
        if head.startswith(magic):
            plain = path.with_suffix("") if path.suffix == ending else path.with_name(f"{path.name}.jsonl")
            raise _foreign(path, program, f"{program} -dc {shell_word(str(path))} > {shell_word(str(plain))}")
    if head.startswith(b"PK\x03\x04") and b"[Content_Types].xml" not in head:
        raise _foreign(path, "ZIP", f"unzip {shell_word(str(path))}")
    if head.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):  # .xlsx and .docx; .xls and .doc
        raise _foreign(path, "Excel / Word", tr("save it as CSV in UTF-8; its first line names the columns"))
    if head.startswith(b"%PDF-"):
        raise _foreign(path, "PDF", f"pdftotext {shell_word(str(path))} {shell_word(str(path.with_suffix('.txt')))}")
    if head.startswith((b"PAR1", b"ARROW1")):
        raise _foreign(path, "Parquet" if head.startswith(b"PAR1") else "Arrow",
                       tr("write it as JSON lines: pandas' to_json(…, orient=\"records\", lines=True)"))  # fmt: skip
    if head.startswith(b"SQLite format 3\0"):
        raise _foreign(path, "SQLite", tr("export the table as CSV: sqlite3 -header -csv FILE 'SELECT …'"))


def _foreign(path: Path, kind: str, hint: str) -> Damaged:
    return Damaged(
        tr("{path} holds no rows: it is {kind}", path=one_line(str(path)), kind=kind), hint=hint, code="data.foreign"
    )
