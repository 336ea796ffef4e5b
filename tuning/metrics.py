"""How near an answer comes to the one wanted: ROUGE and BLEU of the ChatGLM world, and what a difference is worth.

ROUGE is that of rouge_chinese 1.0.3 over jieba's words, BLEU-4 is nltk's sentence BLEU with smoothing method 3 over
characters (ChatGLM-6B, `ptuning/main.py`). All scores lie between 0 and 100; a text without words scores 0 there, where
the originals raise.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_TINY = 1e-8  # rouge_chinese adds it below the line
_ORDERS = 4
# Where rouge_chinese ends a sentence: at these signs, unless a closing quote comes; then after it.
_ENDS = tuple(
    re.compile(pattern)
    for pattern in (r"([。！？?])([^”’])", r"(\.{6})([^”’])", r"(…{2})([^”’])", r"([。！？?][”’])([^，。！？?])")
)
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


def cut_words(text: str) -> str:
    """jieba's words, one blank between two of them."""
    import jieba

    return " ".join(jieba.cut(text))


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
    a, b = _words(cut_words(answer)), _words(cut_words(wanted))
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
