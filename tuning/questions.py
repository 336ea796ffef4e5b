"""Rows that models are judged by: each one's last question in ids, the answer that is wanted, and what loss is of.

Several ways of reading a row stand beside each other, one for each tokenizer and chat format, so that all candidates
are judged by the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line, whole_text
from glmchat.engine.prompts.base import PromptFormat
from glmchat.tuning.examples import Example
from glmchat.tuning.formats import Form, recognise
from glmchat.tuning.reading import Fault, Raw, read_rows
from glmchat.tuning.rendering import fit
from glmchat.tuning.rows import Conversation, RowFault, read_row, words_of
from glmchat.tuning.sources import Source
from glmchat.tuning.store import Store

_PEEK = 50  # rows that are looked at to recognise a format
_ASKED = 2000  # characters of a question that are kept to be shown
_TOLD = 3  # refused rows that are named


@dataclass(slots=True)
class Reader:
    """One way of reading. limit: tokens of a row; a longer one loses its oldest turns, then its question's start."""

    prompt: PromptFormat
    limit: int
    store: Store = field(default_factory=Store)

    def question(self, row: Row, number: int) -> tuple[int, ...]:
        """The ids that are answered. number: of this reader."""
        example = self.store.example(row.documents[number][0])
        return example.ids[: example.segments[0].end]

    def documents(self, row: Row, number: int) -> Iterator[Example]:
        """What the loss is of."""
        return (self.store.example(at) for at in row.documents[number])


@dataclass(frozen=True, slots=True)
class Row:
    """number: from 1, of all rows of the data, used or not. wanted, documents: by reader. A text is not answered."""

    number: int
    place: str
    asked: str
    is_text: bool
    wanted: tuple[str, ...]
    documents: tuple[range, ...]


@dataclass(slots=True)
class Questions:
    """first: the first refused rows in words."""

    rows: list[Row] = field(default_factory=list)
    refused: int = 0
    first: list[str] = field(default_factory=list)


def read_questions(
    sources: Sequence[Source],
    readers: Sequence[Reader],
    *,
    most: int | None = None,
    system: str | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Questions:
    """The first `most` rows that every reader can use. on_progress: bytes read, of all.

    Raises Usage where there is none, with the first reason, and Damaged for a file that cannot be read.
    """
    found, number, before = Questions(), 0, 0
    sizes = [source.path.stat().st_size for source in sources]
    for source, size in zip(sources, sizes, strict=True):
        notes = read_rows(source.path, lambda kind, line: None, partial(_heard, on_progress, before, sum(sizes)))
        head = list(islice(notes, _PEEK))
        peeked = [row for row in head if isinstance(row, Raw)]
        form = source.form or (recognise(peeked, str(source.path)) if peeked else None)
        for raw in islice(chain(head, notes), source.most):
            if most is not None and len(found.rows) >= most:
                break
            number += 1
            used = raw if isinstance(raw, Fault) or form is None else _read(raw, form, number, readers, system)
            if isinstance(used, Row):
                found.rows.append(used)
                continue
            found.refused += 1
            if len(found.first) < _TOLD and isinstance(used, Fault):
                found.first.append(str(used))
        before += size
    on_progress(before, before)
    if not found.rows:
        raise Usage(
            tr("no row can be used: {first}", first=one_line((found.first or [tr("it is empty")])[0], 300)),
            hint=tr("the rows hold questions and answers, or texts; --columns names the fields"),
            code="data.nothing",
        )
    return found


def _heard(on_progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    on_progress(before + done, total)


def _read(raw: Raw, form: Form, number: int, readers: Sequence[Reader], system: str | None) -> Row | Fault:
    """One row by every reader; nothing of it is kept where one refuses it."""
    read: list[tuple[str, list[Example]]] = []
    asked, is_text = "", True
    for reader in readers:
        try:
            said = read_row(raw, form, reader.prompt, system)
            examples = fit(said, reader.prompt, "last", reader.limit, "cut-question").examples
        except RowFault as fault:
            return fault.of(raw)
        except Usage as error:
            return words_of(error).of(raw)
        if isinstance(said, Conversation):
            is_text = False
            asked = next((m.content for m in reversed(said.messages[:-1]) if m.role == "user"), "")
            read.append((whole_text(said.messages[-1].content), examples))
        else:
            asked = said.text
            read.append(("", examples))
    ranges = []
    for reader, (_, examples) in zip(readers, read, strict=True):
        begin = len(reader.store)
        for example in examples:
            reader.store.add(example)
        ranges.append(range(begin, len(reader.store)))
    wanted = tuple(text for text, _ in read)
    return Row(number, str(raw.place), whole_text(asked[:_ASKED]), is_text, wanted, tuple(ranges))
