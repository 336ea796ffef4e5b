"""Which files a run reads, and what for: to learn, to mix in, to judge by; folders and dataset_info.json among them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from glmchat.core.errors import Damaged, Hostile, Usage
from glmchat.core.json_files import read_json
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.tuning.formats import FORMS, OPENAI, SHAREGPT, UNKNOWN, Form, Tags, recognise, with_columns, with_tags
from glmchat.tuning.raw import Fault, Raw
from glmchat.tuning.reading import SUFFIXES, Heard, Note, read_rows

Use = Literal["train", "mix", "eval"]
_PEEK = 50  # rows that are looked at to recognise a format; more where none of them can be read,
_MOST_PEEKED = 10_000  # but no more than these
_SHARE = re.compile(r"(\d{1,2}(?:\.\d+)?)%")
# LLaMA-Factory's names of what a column is for.
_PARTS = {
    "prompt": "prompt", "query": "query", "response": "answer", "history": "history", "system": "system",
    "tools": "tools", "messages": "messages", "chosen": "chosen", "rejected": "rejected",
}  # fmt: skip
_ROLE_TAGS = {
    "user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "function_tag": "call",
    "system_tag": "system",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """form: how its rows are written, None: it is recognised. share: of all rows, for what is mixed in. most: rows."""

    path: Path
    use: Use = "train"
    form: Form | None = None
    share: float = 0.0
    most: int | None = None

    def opened(self, note: Note = lambda kind, line: None, heard: Heard = lambda done: None) -> Opened:
        """Begin to read. Raises Damaged for a file that cannot be read, Usage where no format has its keys."""
        rows = read_rows(self.path, note, heard)
        head = list(islice(rows, _PEEK))
        while not any(isinstance(row, Raw) for row in head[-_PEEK:]) and len(head) < _MOST_PEEKED:
            if not (more := list(islice(rows, _PEEK))):
                break
            head += more
        peeked = [row for row in head if isinstance(row, Raw)]
        if self.form is not None:
            form = with_tags(self.form, peeked)
        else:
            form = recognise(peeked, str(self.path)) if peeked else UNKNOWN
        return Opened(form, peeked, islice(chain(head, rows if form.columns else map(_unread, rows)), self.most))


@dataclass(frozen=True, slots=True)
class Opened:
    """form: UNKNOWN where none of the first rows could be read. peeked: those that could. rows: all of them."""

    form: Form
    peeked: Sequence[Raw]
    rows: Iterator[Raw | Fault]


def _unread(row: Raw | Fault) -> Fault:
    if isinstance(row, Fault):
        return row
    found = tr("a row behind {count:,} that cannot be read", count=_MOST_PEEKED)
    return Fault(row.place, "format", found, tr("rows of one format from the beginning"))


def share_of(text: str) -> float | None:
    """ "5%" -> 0.05; None for what is none."""
    found = _SHARE.fullmatch(text.strip())
    return float(found[1]) / 100 if found else None


def find_sources(
    data: Sequence[str],
    *,
    mixes: Sequence[str] = (),
    evaluation: str | None = None,
    form: Form | None = None,
) -> list[Source]:
    """All files in the order in which they are read. form: of all of them, whatever their keys.

    Raises Usage for a name that is nothing, and for a share that is none.
    """
    sources = [source for word in data for source in _expand(word)]
    if not sources:
        raise Usage(
            tr("there are no data to learn from"),
            hint=tr("name a file: `glmchat tune smollm2 rows.jsonl`"),
            code="data.none",
        )
    for word in mixes:
        name, _, share = word.rpartition(":")
        value = share_of(share)
        if not name or not value:
            raise Usage(
                tr("{word} does not say how much is mixed in", word=one_line(repr(word), 60)),
                hint=tr("for example --mix general.jsonl:20%"),
                code="data.mix",
            )
        files = _expand(name)
        sources += [replace(source, use="mix", share=value / len(files)) for source in files]
    if sum(source.share for source in sources) >= 1:
        raise Usage(
            tr("the shares that are mixed in leave nothing for the data themselves"),
            hint=tr("for example --mix general.jsonl:20%"),
            code="data.mix",
        )
    if evaluation is not None and share_of(evaluation) is None:
        sources += [replace(source, use="eval") for source in _expand(evaluation)]
    return sources if form is None else [replace(source, form=form) for source in sources]


def form_of(name: str | None, columns: Mapping[str, str]) -> Form | None:
    """What a person says of the format: a name of the table, or columns. Raises Usage."""
    if columns:
        return with_columns(columns)
    if name is None:
        return None
    if name not in FORMS:
        raise Usage(
            tr("there is no format {name}", name=one_line(repr(name), 40)),
            hint=tr("the formats are {names}", names=", ".join(FORMS)),
            code="data.format",
        )
    return FORMS[name]


def _expand(word: str) -> list[Source]:
    name, mark, entry = word.partition(".json#")
    if mark:
        return [_entry(Path(name + ".json").expanduser(), entry)]
    path = Path(word).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        kinds = {file.suffix.lower() for file in found}
        if not found or (".txt" in kinds and len(kinds) > 1):
            raise Usage(
                tr("{folder} is no folder of texts", folder=one_line(word)),
                hint=tr("name the files, or a folder that holds .txt files alone"),
                code="data.folder",
            )
        return [Source(file) for file in found if file.name != "dataset_info.json"]
    if not path.exists():  # a pipe or a device is told by who opens it
        raise Usage(
            tr("there is no file {path}", path=one_line(word)),
            hint=tr("name a .json, .jsonl, .csv, .tsv or .txt file, or a folder of texts"),
            code="data.missing",
        )
    return [Source(path)]


def _entry(table: Path, name: str) -> Source:
    """One entry of LLaMA-Factory's dataset_info.json."""
    if not table.is_file():
        raise Usage(
            tr("there is no file {path}", path=one_line(str(table))),
            hint=tr("the form is path/dataset_info.json#name"),
            code="data.missing",
        )
    try:
        entries = read_json(table)
    except Damaged as error:
        hint = tr("a dataset_info.json is an object: name of a data set -> its file and columns")
        raise Damaged(error.message, hint=hint, code="data.table") from None
    entry: Any = entries.get(name)
    if not isinstance(entry, dict):
        raise Usage(
            tr("{path} has no entry {name}", path=one_line(str(table)), name=one_line(repr(name), 60)),
            hint=tr("it has {names}", names=one_line(", ".join(entries), 400)),
            code="data.entry",
        )
    file = entry.get("file_name")
    if not isinstance(file, str):
        raise Usage(
            tr("the data of {name} are not in a file beside it", name=one_line(name, 60)),
            hint=tr("download them, and name the file itself"),
            code="data.entry",
        )
    path = table.parent / file
    if not path.resolve().is_relative_to(table.parent.resolve()):
        raise Hostile(
            tr("{name} names a file outside its folder: {file}", name=one_line(name, 60), file=one_line(file)),
            hint=tr("name the file itself, if you trust it"),
            code="data.outside",
        )
    if not path.is_file():
        raise Usage(
            tr("there is no file {path}", path=one_line(str(path))),
            hint=tr("{table} names it", table=table.name),
            code="data.missing",
        )
    most = entry.get("num_samples")
    return Source(path, form=_told(entry), most=most if isinstance(most, int) else None)


def _told(entry: Mapping[str, Any]) -> Form | None:
    """The form that an entry describes; None where it says nothing, so that the keys decide."""
    columns = {_PARTS[part]: key for part, key in (entry.get("columns") or {}).items() if part in _PARTS and key}
    tags, listed = entry.get("tags") or {}, entry.get("formatting") == "sharegpt"
    if not columns and not listed:
        return None
    if listed:
        columns.setdefault("messages", "conversations")
        base = OPENAI if entry.get("formatting") == "openai" else SHAREGPT
        roles = {**base.roles, **{str(tags[tag]): role for tag, role in _ROLE_TAGS.items() if tag in tags}}
        if entry.get("ranking"):
            columns = {"chosen": "chosen", "rejected": "rejected", **columns}
        form = with_columns(columns)
        return replace(
            form, name="sharegpt", tags=Tags(tags.get("role_tag", "from"), tags.get("content_tag", "value"), roles)
        )
    columns = {"prompt": "instruction", "query": "input", "answer": "output", **columns}
    if entry.get("ranking"):
        columns.pop("answer")
        columns = {"chosen": "chosen", "rejected": "rejected", **columns}
    return with_columns(columns)
