"""Rows that models are judged by: each one's last question in ids, the answer that is wanted, and what loss is of.

Several ways of reading a row stand beside each other, one for each tokenizer and chat format, so that all candidates
are judged by the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.messages import Message
from glmchat.core.text import one_line, whole_text
from glmchat.engine.prompts.base import NoChat, PromptFormat
from glmchat.tuning.checking import no_questions
from glmchat.tuning.examples import Example
from glmchat.tuning.formats import Form
from glmchat.tuning.pairs import read_pair
from glmchat.tuning.raw import Fault, Raw
from glmchat.tuning.rendering import fit, fit_pair
from glmchat.tuning.rows import RowFault, Text, read_row, words_of
from glmchat.tuning.sources import Source
from glmchat.tuning.store import Store

_ASKED = 2000  # characters of a question that are kept to be shown
_TOLD = 3  # refused rows that are named
Kind = Literal["question", "text", "pair"]


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
    """number: from 1, of all rows of the data, used or not. wanted, documents: by reader. worse: of a pair the answer
    that is not wanted. Texts and pairs are not answered: what counts is how probable the model finds them."""

    number: int
    place: str
    asked: str
    kind: Kind
    wanted: tuple[str, ...]
    documents: tuple[range, ...]
    worse: str | None = None

    @property
    def is_answered(self) -> bool:
        return self.kind == "question"


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
        opened = source.opened(heard=partial(_heard, on_progress, before, sum(sizes)))
        form = opened.form
        if not form.is_text and any(isinstance(reader.prompt, NoChat) for reader in readers):
            raise Usage(
                tr("a model without a chat format is asked the questions of {file}", file=one_line(str(source.path))),
                hint=tr('take an instruction-tuned model, or texts: rows with a field "text", or .txt files'),
                code="data.no_chat",
            )
        for raw in opened.rows:
            if most is not None and len(found.rows) >= most:
                break
            number += 1
            used = raw if isinstance(raw, Fault) else _read(raw, form, number, readers, system)
            if isinstance(used, Row):
                found.rows.append(used)
                continue
            found.refused += 1
            if len(found.first) < _TOLD and isinstance(used, Fault):
                found.first.append(str(used))
        before += size
    on_progress(before, before)
    if not found.rows:
        raise no_questions(next(iter(found.first), None), sources)
    return found


def _heard(on_progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    on_progress(before + done, total)


def _read(raw: Raw, form: Form, number: int, readers: Sequence[Reader], system: str | None) -> Row | Fault:
    """One row by every reader; nothing of it is kept where one refuses it."""
    read = []
    for reader in readers:
        try:
            read.append(_said(raw, form, reader, system))
        except RowFault as fault:
            return fault.of(raw)
        except Usage as error:
            return words_of(error).of(raw)
    ranges = []
    for reader, (_, examples) in zip(readers, read, strict=True):
        begin = len(reader.store)
        for example in examples:
            reader.store.add(example)
        ranges.append(range(begin, len(reader.store)))
    kind: Kind = "pair" if form.is_pairs else "text" if form.is_text else "question"
    said = read[-1][0]
    asked, worse = whole_text(said.asked[:_ASKED]), None if said.worse is None else whole_text(said.worse)
    wanted = tuple(whole_text(each.wanted) for each, _ in read)
    return Row(number, str(raw.place), asked, kind, wanted, tuple(ranges), worse)


class _Said(NamedTuple):
    asked: str
    wanted: str = ""
    worse: str | None = None


def _said(raw: Raw, form: Form, reader: Reader, system: str | None) -> tuple[_Said, list[Example]]:
    """What a row says, and its documents. Raises RowFault and Usage."""
    prompt, limit = reader.prompt, reader.limit
    if form.is_pairs:
        pair = read_pair(raw, form, prompt, system)
        better, worse = (answer.content for answer in pair.answers)
        return _Said(_asked(pair.question), better, worse), fit_pair(pair, prompt, limit, "cut-question").examples
    said = read_row(raw, form, prompt, system)
    examples = fit(said, prompt, "last", limit, "cut-question").examples
    if isinstance(said, Text):
        return _Said(said.text), examples
    return _Said(_asked(said.messages[:-1]), said.messages[-1].content), examples


def _asked(messages: Sequence[Message]) -> str:
    return next((message.content for message in reversed(messages) if message.role == "user"), "")
