"""The first page of a run: what was read, what is wrong with it, and what exactly will be learned.

Facts cross from the job's process to the views as JSON; `lines` writes them as text, where brackets say what colour
says on a screen: what stands in [ ] is learned.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line, show_controls
from glmchat.tuning.examples import Example, Place
from glmchat.tuning.raw import Fault

SHOWN = 20  # faults and places that are kept of each kind; the rest is counted
_BARS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_BAR = 40  # cells


@dataclass(slots=True)
class Counted:
    """Something that befell rows: how many, and the first of them in words."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, words: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(words)


@dataclass(slots=True)
class FileFacts:
    """use: "train", "mix" or "eval". read = used + refused; of those used, taken are learned, held are held out."""

    file: str
    form: str
    use: str
    bytes: int = 0
    read: int = 0
    used: int = 0
    refused: int = 0
    taken: int = 0
    held: int = 0


@dataclass(slots=True)
class Token:
    id: int
    text: str
    learned: bool


@dataclass(slots=True)
class Sample:
    """second: the token with which the worse answer of a pair begins, its question first; 0: it is no pair."""

    place: str
    tokens: list[Token]
    second: int = 0


@dataclass(slots=True)
class Facts:
    """refused: by reason. warned: by kind. lengths: upper bound of tokens -> documents, 0 for longer ones.

    settings: what a recipe of an original fixes of a run besides the data, by the names of tuning/settings.py.
    long: rows over the limit, over: which; split: texts over it, which go on in another document, `stride` tokens
    after the last where that is not 0; repeated: tokens that stand in two of these; taken: tokens that
    cutting took of `whole`. stopped: documents whose end is learned.
    """

    files: list[FileFacts] = field(default_factory=list)
    refused: dict[str, Counted] = field(default_factory=dict)
    warned: dict[str, Counted] = field(default_factory=dict)
    documents: int = 0
    tokens: int = 0
    learned: int = 0
    stopped: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    longest: int = 0
    longest_place: str = ""
    limit: int = 0
    policy: str = ""
    on: str = ""
    long: int = 0
    split: int = 0
    stride: int = 0
    repeated: int = 0
    over: Counted = field(default_factory=Counted)
    whole: int = 0
    taken: int = 0
    evaluation: int = 0
    evaluation_tokens: int = 0
    samples: list[Sample] = field(default_factory=list)
    recipe: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)
    fingerprint: str = ""
    systems: list[str] = field(default_factory=list)  # the system texts of the rows, "" for none; two mean several

    @property
    def read(self) -> int:
        return sum(file.read for file in self.files)

    @property
    def used(self) -> int:
        return sum(file.used for file in self.files)

    @property
    def refusals(self) -> int:
        return sum(file.refused for file in self.files)

    def refuse(self, fault: Fault) -> None:
        self.refused.setdefault(fault.reason, Counted()).add(str(fault))

    def warn(self, kind: str, place: Place, words: str = "") -> None:
        self.warned.setdefault(kind, Counted()).add(f"{place}: {words}" if words else str(place))

    def hear_system(self, text: str) -> None:
        if text not in self.systems and len(self.systems) < 2:
            self.systems.append(text)

    def count(self, size: int, learned: int, stops: int) -> None:
        """A document of `size` tokens that is learned from."""
        self.documents += 1
        self.tokens += size
        self.learned += learned
        self.stopped += stops
        bar = next((bound for bound in _BARS if size <= bound), 0)
        self.lengths[bar] = self.lengths.get(bar, 0) + 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Facts:
        """The inverse of `to_json`. Raises TypeError or KeyError for what is none."""
        given = dict(data)
        given["files"] = [FileFacts(**item) for item in data["files"]]
        for name in ("refused", "warned"):
            given[name] = {kind: Counted(**item) for kind, item in data[name].items()}
        given["settings"] = {name: tuple(v) if isinstance(v, list) else v for name, v in data["settings"].items()}
        given["over"] = Counted(**data["over"])
        given["lengths"] = {int(bound): count for bound, count in data["lengths"].items()}
        given["samples"] = [
            Sample(item["place"], [Token(**token) for token in item["tokens"]], item["second"])
            for item in data["samples"]
        ]
        return Facts(**given)


def kinds() -> Mapping[str, str]:
    """What faults and warnings are called."""
    return {
        "json": tr("no JSON"),
        "utf8": tr("no UTF-8"),
        "csv": tr("broken lines of a table"),
        "large": tr("too large"),
        "type": tr("a value of another kind"),
        "missing": tr("a field is missing"),
        "role": tr("an unknown role"),
        "pair": tr("no two answers to one question"),
        "order": tr("questions and answers out of order"),
        "empty": tr("nothing said"),
        "unlearned": tr("no answer that is to be learned"),
        "tools": tr("tools that cannot be written"),
        "format": tr("not a form of this model"),
        "long": tr("longer than the limit"),
        "cut": tr("the answer is cut away"),
        "bom": tr("begins with a byte order mark"),
        "crlf": tr("lines end as in Windows"),
        "control": tr("text that looks like control tokens; it is learned as plain text"),
        "placeholder": tr("placeholders such as {{name}} are learned as they stand: fill them in"),
        "unknown": tr("literal <UNK>: a model learns to write it"),
        "duplicate": tr("a row that was there before"),
        "unstopped": tr("the end is cut away, so that it is not learned where to stop"),
        "unused": tr("fields that are not used"),
        "leak": tr("a row to judge by that is learned too"),
        "mix": tr("too few rows to mix in"),
    }


def lines(facts: Facts, width: int = 80) -> list[str]:
    """The page as text. Nothing of the data drives a terminal."""
    words = kinds()
    said = [
        tr(
            "{file}: {form}, {size}: {read:,} rows read, {used:,} used, {refused:,} refused ({use})",
            file=one_line(file.file),
            form=file.form,
            size=human_bytes(file.bytes),
            read=file.read,
            used=file.used,
            refused=file.refused,
            use={"train": tr("to learn"), "mix": tr("mixed in"), "eval": tr("to judge by")}[file.use],
        )
        for file in facts.files
    ]
    for head, counted in ((tr("refused"), facts.refused), (tr("look at"), facts.warned)):
        for kind, what in sorted(counted.items(), key=lambda item: -item[1].count):
            said.append(f"{head}: {words.get(kind, kind)} ({what.count:,})")
            said += [f"  {one_line(line, max(40, 3 * width))}" for line in what.first[:3]]
            if what.count > 3:
                said.append(tr("  … and {count:,} more", count=what.count - 3))
    said += _bars(facts)
    cut = tr("rows over {limit:,} tokens: {long:,} ({policy})", limit=facts.limit, long=facts.long, policy=facts.policy)
    if facts.taken:
        share = facts.taken / max(1, facts.whole)
        cut += tr("; cutting takes {taken:,} tokens ({share:.1%})", taken=facts.taken, share=share)
    said.append(cut)
    if facts.split:
        said.append(tr("texts that go on in another document: {split:,}; no token of them is lost", split=facts.split))
    if facts.stride:
        said.append(
            tr("windows of {limit:,} tokens, {stride:,} from one to the next; {repeated:,} tokens come again, {how}",
               limit=facts.limit, stride=facts.stride, repeated=facts.repeated,
               how=tr("and are learned again") if facts.differences else tr("as context that is not learned again"))
        )  # fmt: skip
    counts: dict[str, Any] = {
        "documents": facts.documents,
        "tokens": facts.tokens,
        "learned": facts.learned,
        "share": facts.learned / max(1, facts.tokens),
        "stopped": facts.stopped,
    }
    sums = (
        tr(
            "{documents:,} pairs, {tokens:,} tokens of both sides, of which {learned:,} are learned ({share:.0%}); "
            "the end is learned in {stopped:,} of {documents:,}",
            **counts,
        )
        if facts.on == "pairs"
        else tr(
            "{documents:,} documents, {tokens:,} tokens, of which {learned:,} are learned ({share:.0%}); "
            "the end is learned in {stopped:,} of {documents:,}",
            **counts,
        )
    )
    said.append(sums)
    if facts.evaluation:
        count, tokens = facts.evaluation, facts.evaluation_tokens
        said.append(tr("judged by {count:,} documents of {tokens:,} tokens", count=count, tokens=tokens))
    for sample in facts.samples:
        said += ["", sample.place, *_marked(sample)]
    if facts.differences:
        given = {k: ",".join(v) if isinstance(v, tuple) else v for k, v in facts.settings.items()}
        numbers = ", ".join(f"{name} {value}" for name, value in given.items())
        said += ["", tr("where this recipe differs from glmchat's own way:")]
        said += [f"  {line}" for line in (*facts.differences, numbers)]
    said.append(tr("recipe {recipe}, {fingerprint}", recipe=facts.recipe, fingerprint=facts.fingerprint[:19]))
    return said


def _bars(facts: Facts) -> list[str]:
    if not facts.lengths:
        return []
    most = max(facts.lengths.values())
    said = [tr("lengths in tokens; the longest is {longest:,} ({place})",
               longest=facts.longest, place=one_line(facts.longest_place))]  # fmt: skip
    for bound in (*_BARS, 0):
        if count := facts.lengths.get(bound, 0):
            name = f"≤ {bound:,}" if bound else f"> {_BARS[-1]:,}"
            said.append(f"{name:>9} {'█' * max(1, round(_BAR * count / most))} {count:,}")
    return said


def _marked(sample: Sample) -> list[str]:
    """The tokens of a sample, a line for each of its own; what is learned in brackets."""
    said: list[str] = [tr("better:"), ""] if sample.second else [""]
    for number, token in enumerate(sample.tokens):
        if sample.second and number == sample.second:
            said += [tr("worse:"), ""]
        text = show_controls(token.text.replace("\n", "⏎"))
        said[-1] += f"[{text}]" if token.learned else f"{text}·"
        if "\n" in token.text:
            said.append("")
    return [f"  {line}" for line in said if line]


def sample_of(example: Example, names: Mapping[int, str], piece: Callable[[int], bytes]) -> Sample:
    """names: of control tokens. piece: id -> the bytes it stands for.

    A character of several tokens is shown with the last of them, and the others as `‹›`.
    """
    tokens: list[Token] = []
    reader = codecs.getincrementaldecoder("utf-8")("replace")
    for token, learned in zip(example.ids, example.learned, strict=True):
        data = piece(token)
        if token in names or not data:
            reader.reset()
            text = names.get(token) or f"<{token}>"
        else:
            text = reader.decode(data) or "‹›"
        tokens.append(Token(token, text, learned))
    return Sample(str(example.place), tokens, example.second)
