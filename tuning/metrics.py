"""How near answers come to those wanted, and candidates side by side: ROUGE, BLEU and loss, and what a difference is
worth.

ROUGE is that of rouge_chinese 1.0.3 over jieba's words, BLEU-4 is nltk's sentence BLEU with smoothing method 3 over
characters (ChatGLM-6B, `ptuning/main.py`). All scores lie between 0 and 100; a text without words scores 0 there, where
the originals raise.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

_TINY = 1e-8  # rouge_chinese adds it below the line
_ORDERS = 4
# Where rouge_chinese ends a sentence: at these signs, unless a closing quote comes; then after it.
_ENDS = tuple(
    re.compile(pattern)
    for pattern in (r"([。！？?])([^”’])", r"(\.{6})([^”’])", r"(…{2})([^”’])", r"([。！？?][”’])([^，。！？?])")
)
Bleu = Literal["characters", "words"]
OF_ANSWERS = ("exact", "rouge-1", "rouge-2", "rouge-l", "bleu-4", "stopped", "tokens")
OF_PAIRS = ("preferred", "preferred-mean", "margin", "loss-worse")
STOPPED = ("eos", "stop")
_RESAMPLES = 2000
_COVERED = 95.0  # percent, of an interval


@dataclass(frozen=True, slots=True)
class Rouge:
    """F of words (1), of pairs of words (2), and of the longest common subsequence (L), each 0 to 100."""

    one: float
    two: float
    longest: float


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean difference, and where 95 of 100 samples drawn again from the same rows put it."""

    mean: float
    low: float
    high: float

    @property
    def shown(self) -> bool:
        """Whether a difference is shown at all: the interval does not hold 0."""
        return not self.low <= 0.0 <= self.high


def cut_words(text: str) -> list[str]:
    """jieba's words, blanks and signs among them."""
    import jieba

    return list(jieba.cut(text))


def _words(spaced: str) -> list[str]:
    for pattern in _ENDS:
        spaced = pattern.sub(r"\1\n\2", spaced)
    # A sentence of blanks alone is one empty word.
    return [word for line in spaced.rstrip().split("\n") if line for word in " ".join(line.split()).split(" ")]


def _f(common: int, answered: int, wanted: int) -> float:
    precision, recall = common / max(answered, 1), common / max(wanted, 1)
    return 2.0 * (precision * recall / (precision + recall + _TINY))


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest: one addition of integers of len(a) bits for each word of b (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << place
    every = (1 << len(a)) - 1
    row = every
    for word in b:
        hits = row & places.get(word, 0)
        row = (row + hits | row - hits) & every
    return len(a) - row.bit_count()


def rouge(answer: str, wanted: str) -> Rouge:
    """Both as people write them; n-grams are sets, so what is repeated counts once."""
    a, b = (_words(" ".join(cut_words(text))) for text in (answer, wanted))
    if not a or not b:
        return Rouge(0.0, 0.0, 0.0)
    scores = []
    for n in (1, 2):
        grams = [set(zip(*(words[k:] for k in range(n)), strict=False)) for words in (a, b)]
        scores.append(_f(len(grams[0] & grams[1]), len(grams[0]), len(grams[1])))
    scores.append(_f(_common_subsequence(a, b), len(a), len(b)))
    return Rouge(*(round(score * 100, 4) for score in scores))


def bleu4(answer: Sequence[str], wanted: Sequence[str]) -> float:
    """Of characters where both are texts, of words where both are lists of them."""
    if not answer:
        return 0.0
    logs, zeros = 0.0, 0
    for n in range(1, _ORDERS + 1):
        given, sought = (
            Counter(tuple(units[k : k + n]) for k in range(len(units) - n + 1)) for units in (answer, wanted)
        )
        hits, total = (given & sought).total(), max(1, given.total())
        if hits == 0:
            if n == 1:
                return 0.0
            zeros += 1
            logs += math.log(1 / (2**zeros * total))
        else:
            logs += math.log(hits / total)
    brevity = min(1.0, math.exp(1 - len(wanted) / len(answer)))
    return round(brevity * math.exp(logs / _ORDERS) * 100, 4)


def paired_difference(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Interval:
    """Of two candidates on the same rows, by a bootstrap over rows: the same rows give the same interval."""
    differences = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    rows, draw = len(differences), np.random.default_rng(seed)
    if rows == 0:
        return Interval(0.0, 0.0, 0.0)
    means = [differences[draw.integers(0, rows, rows)].mean() for _ in range(_RESAMPLES)]
    beside = (100.0 - _COVERED) / 2
    low, high = np.percentile(means, [beside, 100.0 - beside])
    return Interval(float(differences.mean()), float(low), float(high))


@dataclass(frozen=True, slots=True)
class Answer:
    """What a candidate made of a row. predict: None for a text or a pair, which are not answered. nats: the loss of all
    `learned` tokens together. tokens: of the answer, without the one that ends it. worse: of a pair the answer that is
    not wanted, whose loss is the last two; `labels`, `nats` and `learned` are the better one's."""

    row: int
    labels: str
    predict: str | None
    nats: float
    learned: int
    tokens: int = 0
    stopped_by: str | None = None
    worse: str | None = None
    worse_nats: float = 0.0
    worse_learned: int = 0

    @property
    def margin(self) -> float:
        """log p of the better answer - log p of the worse one; 0 where there is none."""
        return self.worse_nats - self.nats if self.worse is not None else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Answer:
        """The inverse of `to_json`. Raises TypeError, ValueError or KeyError for what is none."""
        predict, by, worse = data["predict"], data["stopped_by"], data["worse"]
        return Answer(
            int(data["row"]),
            str(data["labels"]),
            None if predict is None else str(predict),
            float(data["nats"]),
            int(data["learned"]),
            int(data["tokens"]),
            None if by is None else str(by),
            None if worse is None else str(worse),
            float(data["worse_nats"]),
            int(data["worse_learned"]),
        )


def measures(answer: Answer, bleu: Bleu = "characters") -> dict[str, float]:
    """Of one answer, by the names in `OF_ANSWERS`; shares as 0 or 100. An empty one is worth 0."""
    given, wanted = answer.predict or "", answer.labels
    scores = rouge(given, wanted)
    words = bleu == "words"
    return {
        "exact": 100.0 * (given.strip() == wanted.strip()),
        "rouge-1": scores.one,
        "rouge-2": scores.two,
        "rouge-l": scores.longest,
        "bleu-4": bleu4(cut_words(given), cut_words(wanted)) if words else bleu4(given, wanted),
        "stopped": 100.0 * (answer.stopped_by in STOPPED),
        "tokens": float(answer.tokens),
    }


def preference(pair: Answer) -> dict[str, float]:
    """Of one pair, by the names in `OF_PAIRS`; shares as 0 or 100. A tie is no preference."""
    better, worse = pair.nats / max(pair.learned, 1), pair.worse_nats / max(pair.worse_learned, 1)
    return {
        "preferred": 100.0 * (pair.margin > 0),
        "preferred-mean": 100.0 * (better < worse),
        "margin": pair.margin,
        "loss-worse": worse,
    }


def compare(candidates: Sequence[Sequence[Answer]], bleu: Bleu = "characters", seed: int = 0) -> dict[str, Any]:
    """The table. candidates: the answers of each to the same rows, in the same order.

    {"rows", "answered", "pairs", "candidates": [{"values": measure -> mean, "differences": measure -> Interval and
    "shown"}]}; differences are to the first candidate. Loss has one only between candidates that count the same tokens.
    Of pairs "gained" is the share whose margin is larger than the first candidate's: what DPO calls its accuracy.
    """
    scored = [[measures(answer, bleu) for answer in answers if answer.predict is not None] for answers in candidates]
    pairs = [[preference(answer) for answer in answers if answer.worse is not None] for answers in candidates]
    table = []
    for number, (answers, scores, sides) in enumerate(zip(candidates, scored, pairs, strict=True)):
        learned = sum(answer.learned for answer in answers)
        loss = sum(answer.nats for answer in answers) / max(learned, 1)
        values = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        values |= {name: _mean([score[name] for score in scores]) for name in OF_ANSWERS if scores}
        values |= {name: _mean([side[name] for side in sides]) for name in OF_PAIRS if sides}
        differences: dict[str, Any] = {}
        first = candidates[0]
        if number and [a.learned for a in answers] == [a.learned for a in first]:
            differences["loss"] = _told(*_loss_by_row(answers, first), seed)
        for names, mine, theirs in ((OF_ANSWERS, scores, scored[0]), (OF_PAIRS, sides, pairs[0])):
            for name in names if number and mine else ():
                differences[name] = _told([s[name] for s in mine], [s[name] for s in theirs], seed)
        if number and sides:
            moved = [a["margin"] - b["margin"] for a, b in zip(sides, pairs[0], strict=True)]
            differences["gained"] = _share(moved, seed)
        table.append({"values": values, "differences": differences})
    counts = {"rows": len(candidates[0]), "answered": len(scored[0]), "pairs": len(pairs[0])}
    return {**counts, "bleu": bleu, "candidates": table}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _loss_by_row(ours: Sequence[Answer], theirs: Sequence[Answer]) -> tuple[list[float], list[float]]:
    """A number for each row, whose mean is the loss per token.

    That loss is a ratio of two sums over rows; this is its linear part, so the interval knows that rows differ in
    length.
    """
    learned = [answer.learned for answer in ours]
    size = max(sum(learned), 1) / max(len(learned), 1)
    sides = []
    for answers in (ours, theirs):
        loss = sum(answer.nats for answer in answers) / max(sum(learned), 1)
        sides.append([loss + (a.nats - loss * a.learned) / size for a in answers])
    return sides[0], sides[1]


def _told(ours: Sequence[float], theirs: Sequence[float], seed: int) -> dict[str, Any]:
    interval = paired_difference(ours, theirs, seed)
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "shown": interval.shown}


def _share(moved: Sequence[float], seed: int) -> dict[str, Any]:
    """How many percent are positive, of those that stay half; it shows something where its interval holds no 50."""
    hits = [100.0 * (each > 0) if each else 50.0 for each in moved]
    found = paired_difference(hits, [0.0] * len(hits), seed)
    return {"mean": found.mean, "low": found.low, "high": found.high, "shown": not found.low <= 50.0 <= found.high}


def worth(answer: Answer) -> float:
    """What rows are ranked by: ROUGE-L of an answer, the margin of a pair; of a text minus its loss per token."""
    if answer.worse is not None:
        return answer.margin
    if answer.predict is None:
        return -answer.nats / max(answer.learned, 1)
    return rouge(answer.predict, answer.labels).longest


def extremes(worths: Sequence[Sequence[float]], most: int) -> tuple[list[int], list[int]]:
    """Places of the rows that the last candidate does worst and best, against the first one if there are several.

    worths: of each candidate what its answers are worth. No row stands on both sides, and of several candidates none
    where the two are worth the same: there neither is behind.
    """
    first, last = worths[0], worths[-1]
    ahead = [own - (base if len(worths) > 1 else 0.0) for own, base in zip(last, first, strict=True)]
    order = sorted(range(len(ahead)), key=ahead.__getitem__)
    most = min(most, len(order) // 2 or len(order))
    worst, best = order[:most], order[::-1][: min(most, len(order) - most)]
    if len(worths) == 1:
        return worst, best
    return [at for at in worst if ahead[at] < 0], [at for at in best if ahead[at] > 0]
