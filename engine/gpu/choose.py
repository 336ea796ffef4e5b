"""What choosing a token needs of a row of logits on a card: one small copy to the host, whatever the vocabulary.

The most likely ids with their logits, and the log-sum-exp of all, decide temperature, top-k, top-p and min-p nearly
always, and whether they do is known exactly. A compiled step computes them with its token (`CardStep.candidates`); for
any other row torch does, on the row's device. The repetition penalty is applied there too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from glmchat.core.messages import Sampling

TOP = 64  # candidates that come back with each token
SAID, BANNED = 1, 2  # marks of an id


@dataclass(frozen=True, slots=True)
class Candidates:
    """The most likely ids of a row, on the host.

    values float32 [n], descending, as the penalty left them and not divided by the temperature; ids int64 [n]; total:
    log-sum-exp of all logits divided by the temperature.
    """

    values: torch.Tensor
    ids: torch.Tensor
    total: torch.Tensor

    @classmethod
    def of(cls, numbers: torch.Tensor) -> Candidates:
        """numbers float32 [1 + 2 n] on the host: total, values, ids (exact: below 2**24)."""
        count = len(numbers) // 2
        return cls(numbers[1 : 1 + count], numbers[1 + count :].long(), numbers[0])


class Choice:
    """How the tokens of one answer are chosen, as far as whole rows are looked at for it.

    said: ids that a repetition penalty weighs; whoever chooses adds to the list. banned: ids that are never chosen.
    """

    def __init__(self, temperature: float, penalty: float, said: Sequence[int], banned: Sequence[int]) -> None:
        self.temperature, self.penalty, self.said, self.banned = temperature, penalty, said, banned
        self._marks: torch.Tensor | None = None  # on the device of the rows
        self._marked = 0

    def candidates(self, row: torch.Tensor) -> Candidates | None:
        """Of a row [vocab] on a card; None for one that lies on the host, which costs nothing to look at."""
        by_step: Callable[[Choice], Candidates] | None = getattr(row, "candidates", None)
        if by_step is not None:
            return by_step(self)
        return None if row.device.type == "cpu" else self._by_torch(row)

    def marks(self, vocab: int) -> torch.Tensor:
        """uint8 [vocab] on the host: what is known of each id now."""
        marks = torch.zeros(vocab, dtype=torch.uint8)
        if self.penalty != 1.0:
            marks[list(self.said)] = SAID
        marks[list(self.banned)] = BANNED
        return marks

    def _by_torch(self, row: torch.Tensor) -> Candidates:
        if self.penalty != 1.0 or self.banned:
            marks = self._marks_beside(row)
            costly = torch.where(row > 0, row / self.penalty, row * self.penalty)
            row = row.where(marks != SAID, costly).masked_fill(marks == BANNED, -torch.inf)
        values, ids = row.topk(min(TOP, len(row)))
        total = torch.logsumexp(row / self.temperature, 0, keepdim=True)
        return Candidates.of(torch.cat((total, values, ids.to(values.dtype))).cpu())

    def _marks_beside(self, row: torch.Tensor) -> torch.Tensor:
        """The marks on the row's device; the id that was chosen last went there already, for the network to read."""
        latest: torch.Tensor | None = getattr(row, "ids", None)
        if self._marks is None or (len(self.said) > self._marked and latest is None):
            self._marks = self.marks(len(row)).to(row.device)
        elif self.penalty != 1.0 and latest is not None:
            self._marks.index_fill_(0, latest, SAID)
        self._marked = len(self.said)
        return self._marks


def decided(best: Candidates, vocab: int, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What the filters leave of the whole row (engine/sampling.py), from its best; None where these do not decide it.

    The most likely first, as there; where min-p alone cuts, in the order of the row.
    """
    values, ids = best.values / sampling.temperature, best.ids
    numbers = values.tolist()  # the same float32 numbers, compared without an operation of torch for each
    known, cut = len(numbers), sampling.top_k or vocab
    least = float(values[0] + math.log(sampling.min_p)) if sampling.min_p > 0 else -math.inf
    if known == vocab:
        return None  # a row of nothing else
    if cut < vocab:
        if cut >= known or numbers[-1] == numbers[cut - 1]:
            return None  # nobody knows how many more are equals of the last one that is kept
        kept = sum(number >= numbers[cut] for number in numbers) if numbers[cut] == numbers[cut - 1] else cut
        count = nucleus(values[:kept], None, sampling.top_p) if sampling.top_p < 1.0 else kept
    elif sampling.top_p < 1.0:
        count = nucleus(values, best.total, sampling.top_p)
    elif numbers[-1] < least:
        kept = sum(number >= least for number in numbers)
        ids, order = ids[:kept].sort()  # as they stand in the row
        return values[order], ids
    else:
        return None
    if count is None:
        return None
    kept = max(1, sum(number >= least for number in numbers[:count]))
    return values[:kept], ids[:kept]


def nucleus(values: torch.Tensor, total: torch.Tensor | None, top_p: float) -> int | None:
    """How many of the sorted `values` make up `top_p` of the probability; None if all of them do not reach it.

    total: log-sum-exp over the whole vocabulary where `values` is only its beginning.
    """
    if total is None:
        total = torch.logsumexp(values, 0)
        complete = True
    else:
        complete = False
    before = torch.exp(values - total).cumsum(0)
    reached = (before >= top_p).nonzero()
    if len(reached):
        return int(reached[0]) + 1
    return len(values) if complete else None
