"""One pass over all data: each row read, looked at, tokenised, and put on disk or refused with its line."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from glmchat.core.errors import Usage
from glmchat.core.fingerprints import of_text
from glmchat.core.language import tr
from glmchat.core.messages import Message
from glmchat.core.text import one_line
from glmchat.engine.prompts.base import NoChat
from glmchat.tuning.checking import held_out, none_left, require_form, require_rows
from glmchat.tuning.examples import Place
from glmchat.tuning.formats import Form
from glmchat.tuning.options import DataOptions
from glmchat.tuning.page import SHOWN, Facts, FileFacts, sample_of
from glmchat.tuning.pairs import Pair, read_pair
from glmchat.tuning.prompt_side import PromptSide
from glmchat.tuning.raw import Fault, Raw
from glmchat.tuning.recipes import differences
from glmchat.tuning.rendering import On, OverLength, Rendered, fit, fit_pair
from glmchat.tuning.rows import Conversation, RowFault, Text, read_row, words_of
from glmchat.tuning.sources import Source, share_of
from glmchat.tuning.store import Store

_MOST_CUT = 0.01  # of the rows: where more are too long, a person decides
_PLACEHOLDER = re.compile(r"\{\{ ?\w+ ?\}\}")
_UNKNOWN = re.compile("<unk>", re.IGNORECASE)


class Gathering:
    """`read` once, then `chosen`, then `tell`."""

    def __init__(
        self,
        options: DataOptions,
        side: PromptSide,
        sources: Sequence[Source],
        path: Path | None,
        on_progress: Callable[[int, int], None],
    ) -> None:
        """path: where the examples go. on_progress: bytes read, of all."""
        self._options, self._side, self._sources = options, side, sources
        self._on_progress = on_progress
        self._sizes = [source.path.stat().st_size for source in sources]
        self.store = Store(path)
        self.facts = Facts()
        names = sorted(side.tokenizer.controls, key=len, reverse=True)
        names = [name for name in names if not _UNKNOWN.fullmatch(name)]
        self._controls = re.compile("|".join([*map(re.escape, names), r"<\|\w+\|>"]))
        self._first = array("I")  # of each used row: its first example,
        self._keys = array("Q")  # a hash of what it says,
        self._use = array("H")  # and its file
        self._recipe = options.recipe(side.checkpoint.spec.family)
        self._limit = options.limit(self._recipe, side.checkpoint.spec.context)
        begin = () if self._recipe is not None else side.prompt.complete("")
        if options.stride is not None and not 1 <= options.stride <= self._limit - len(begin):
            raise Usage(
                tr("windows of {length:,} tokens cannot begin every {stride:,}", length=self._limit,
                   stride=options.stride),
                hint=tr("--stride from 1 to {most:,}", most=max(1, self._limit - len(begin))),
                code="data.stride",
            )  # fmt: skip
        self._policy: OverLength = options.over_length or "cut-question"
        self._on: On = options.on or "answers"
        self._is_text = True  # until questions and answers are met

    def read(self) -> Facts:
        """Everything, in the order of the files. Raises Usage for data that cannot be learned from as they are."""
        done = 0
        for number, source in enumerate(self._sources):
            self._read_file(number, source, done)
            done += self._sizes[number]
        self._on_progress(done, done)
        self._first.append(len(self.store))
        facts = self.facts
        facts.on, facts.limit, facts.policy = self._on, self._limit, self._policy
        facts.stride = self._options.stride or 0
        if self._options.pairs:
            facts.on = "pairs"
        if self._is_text:
            facts.on, facts.policy = "text", self._options.over_length or "split"
        facts.recipe = of_text(repr((self._options, self._side.prompt.identity)))[:12]
        if self._recipe is not None:
            facts.policy = self._recipe.name
            facts.recipe = f"{self._recipe.name} {self._recipe.digest}"
            facts.differences = differences(self._recipe)
            facts.settings = dict(self._recipe.settings)
        require_rows(facts)
        self._require_fitting()
        return facts

    def _read_file(self, number: int, source: Source, before: int) -> None:
        about = FileFacts(str(source.path), "", source.use, self._sizes[number])
        self.facts.files.append(about)
        total = sum(self._sizes)
        opened = source.opened(
            lambda kind, line: self.facts.warn(kind, Place(about.file, line)),
            lambda done: self._on_progress(before + done, total),
        )
        form = opened.form
        if form.columns:
            about.form = form.name
            has_chat = not isinstance(self._side.prompt, NoChat)
            require_form(form, about.file, self._options, self._recipe, has_chat=has_chat)
            self._is_text = self._is_text and form.is_text
            self._tell_unused(opened.peeked, form, about.file)
        for row in opened.rows:
            about.read += 1
            fault = row if isinstance(row, Fault) else self._take(row, form, number)
            if fault is None:
                about.used += 1
            else:
                about.refused += 1
                self.facts.refuse(fault)

    def _take(self, row: Raw, form: Form, number: int) -> Fault | None:
        """Put the row's documents into the store, or say why not."""
        try:
            read = read_pair if form.is_pairs else read_row
            said = read(row, form, self._side.prompt, self._options.system)
            rendered = self._render(said)
        except RowFault as fault:
            return fault.of(row)
        except Usage as error:
            return words_of(error).of(row)
        facts = self.facts
        facts.whole += rendered.was
        facts.taken += rendered.taken
        facts.repeated += rendered.repeated
        facts.long += rendered.is_long
        facts.split += isinstance(said, Text) and len(rendered.examples) > 1
        if rendered.is_long:
            facts.over.add(str(row.place))
        if rendered.unstopped:
            facts.warn("unstopped", row.place)
        self._suspect(said)
        if not isinstance(said, Text):
            first = (said.question if isinstance(said, Pair) else said.messages)[0]
            facts.hear_system(first.content if first.role == "system" else "")
        self._first.append(len(self.store))
        self._keys.append(_key(said))
        self._use.append(number)
        for example in rendered.examples:
            self.store.add(example)
        return None

    def _render(self, said: Conversation | Text | Pair) -> Rendered:
        if isinstance(said, Pair):
            return fit_pair(said, self._side.prompt, self._limit, self._policy)
        if self._recipe is not None:
            return self._recipe.make(self._recipe, said, self._side.prompt)
        return fit(said, self._side.prompt, self._on, self._limit, self._policy, self._options.stride or 0)

    def _suspect(self, said: Conversation | Text | Pair) -> None:
        texts = [said.text] if isinstance(said, Text) else [message.content for message in _messages(said)]
        for kind, pattern in (("control", self._controls), ("placeholder", _PLACEHOLDER), ("unknown", _UNKNOWN)):
            found = next((match for text in texts if (match := pattern.search(text))), None)
            if found is not None:
                self.facts.warn(kind, said.place, one_line(found[0], 40))

    def _tell_unused(self, rows: Sequence[Raw], form: Form, file: str) -> None:
        keys = {key for row in rows if isinstance(row.value, dict) for key in row.value}
        unused = sorted(keys - set(form.columns.values()))
        if unused:
            self.facts.warn("unused", Place(file, 1), one_line(", ".join(map(str, unused)), 120))

    def _require_fitting(self) -> None:
        """Raise Usage where too many rows are too long, and nobody said what is to become of them."""
        facts = self.facts
        asked = self._options.over_length
        if (asked is None and facts.long <= _MOST_CUT * facts.used) or asked not in (None, "refuse") or not facts.long:
            return
        raise Usage(
            tr(
                "{long:,} of {used:,} rows are longer than {limit:,} tokens: {places}",
                long=facts.long,
                used=facts.used,
                limit=self._limit,
                places=one_line(", ".join(facts.over.first[:3]), 160),
            ),
            hint=tr("a shorter --prefix-length, or --over-length cut-question, cut-answer, split or drop")
            if self._options.prefix and self._limit + self._options.prefix == self._side.checkpoint.spec.context
            else tr("--max-length, or --over-length cut-question, cut-answer, split or drop"),
            code="data.long",
        )

    def chosen(self) -> tuple[list[int], list[int]]:
        """Numbers of the examples that are learned, and of those that are held out. Duplicates stay on one side."""
        uses = [source.use for source in self._sources]
        rows = range(len(self._keys))
        train = [row for row in rows if uses[self._use[row]] == "train"]
        held = [row for row in rows if uses[self._use[row]] == "eval"]
        share = share_of(self._options.evaluation or "")
        if share:
            count = held_out(share, len(train))
            drawn = {self._keys[row] for row in sorted(train, key=self._drawn)[:count]}
            held = [row for row in train if self._keys[row] in drawn]
            train = [row for row in train if self._keys[row] not in drawn]
            if not train:
                raise none_left(self._options.evaluation)
        train = sorted([*train, *self._mixed(len(train))])
        self._tell_duplicates(train, held)
        for row in train:
            self.facts.files[self._use[row]].taken += 1
        for row in held:
            self.facts.files[self._use[row]].held += 1
        return self._examples(train), self._examples(held)

    def _mixed(self, count: int) -> list[int]:
        """Rows of the files that are mixed in, so many that each has its share of all."""
        shares = {number: source.share for number, source in enumerate(self._sources) if source.use == "mix"}
        if not shares:
            return []
        taken: list[int] = []
        for path in dict.fromkeys(self._sources[number].path for number in shares):
            numbers = {number for number in shares if self._sources[number].path == path}
            wanted = round(count / (1 - sum(shares.values())) * max(shares[number] for number in numbers))
            there = [row for row in range(len(self._keys)) if self._use[row] in numbers]
            if len(there) < wanted:
                words = tr("{there:,} rows, {wanted:,} would be its share", there=len(there), wanted=wanted)
                self.facts.warn("mix", Place(str(path), 1), words)
            taken += sorted(there, key=self._drawn)[:wanted]
        return taken

    def _drawn(self, row: int) -> int:
        """The place of a row in an order that seed and content alone decide."""
        data = f"{self._options.seed} {self._keys[row]}".encode()
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")

    def _examples(self, rows: Sequence[int]) -> list[int]:
        return [number for row in rows for number in range(self._first[row], self._first[row + 1])]

    def _tell_duplicates(self, train: Sequence[int], held: Sequence[int]) -> None:
        """Rows that say what an earlier one says, and rows to judge by that are learned too."""
        before: dict[int, int] = {}
        order = sorted([*train, *held], key=self._keys.__getitem__)
        judged = set(held)
        for earlier, row in pairwise(order):
            first = before.get(self._keys[row], earlier)
            if self._keys[earlier] != self._keys[row]:
                before.clear()
                continue
            before[self._keys[row]] = first
            kind = "leak" if (first in judged) != (row in judged) else "duplicate"
            known = self.facts.warned.get(kind)
            if known is not None and len(known.first) >= SHOWN:
                known.count += 1
            else:
                places = [self.store.example(self._first[each]).place for each in (first, row)]
                self.facts.warn(kind, places[1], str(places[0]))

    def tell(self, train: Sequence[int], held: Sequence[int]) -> None:
        """Complete the facts by what is learned, and by three examples of it."""
        facts, store = self.facts, self.store
        for number in train:
            facts.count(store.lengths[number], store.counts[number], store.stops[number])
        longest = max(train, key=lambda number: store.lengths[number])
        facts.longest, facts.longest_place = store.lengths[longest], str(store.example(longest).place)
        facts.evaluation, facts.evaluation_tokens = len(held), sum(store.lengths[number] for number in held)
        names: Mapping[int, str] = {token: name for name, token in self._side.tokenizer.controls.items()}
        by_length = sorted(train, key=lambda number: store.lengths[number])
        for number in dict.fromkeys((train[0], by_length[len(by_length) // 2], by_length[0])):
            facts.samples.append(sample_of(store.example(number), names, self._side.tokenizer.piece_bytes))


def _messages(said: Conversation | Pair) -> tuple[Message, ...]:
    return (*said.question, *said.answers) if isinstance(said, Pair) else said.messages


def _key(said: Conversation | Text | Pair) -> int:
    if isinstance(said, Text):
        words = said.text
    else:
        words = "\0".join(part for message in _messages(said) for part in (message.role, message.content))
    return int.from_bytes(hashlib.blake2b(words.encode("utf-8", "replace"), digest_size=8).digest(), "big")
