"""How the next token is chosen: a closure over what was asked for, built once a turn."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence

import torch

from glmchat.core.errors import Damaged
from glmchat.core.language import tr
from glmchat.core.messages import Sampling
from glmchat.engine.gpu.choose import Choice, decided, nucleus

Sampler = Callable[[torch.Tensor], int]

# Sorting a vocabulary of 50,000 takes as long as computing the token (3.4 ms; the first 64 take 0.1). The most likely
# ones nearly always suffice for top-p, and whether they do is known exactly.
_LOOKS = (64, 512, 4096)


def new_seed() -> int:
    """A seed for an answer that asked for none; small enough for every JSON reader."""
    return secrets.randbelow(2**31)


def make_sampler(sampling: Sampling, seed: int, context_ids: Sequence[int] = (), banned: Sequence[int] = ()) -> Sampler:
    """A function from float32 logits [vocab] to an id, never one of `banned`.

    Temperature 0 is argmax and nothing else is looked at. Otherwise, in this order: repetition penalty on what stands
    in the context and was said since (Keskar et al. 2019), temperature, top-k, top-p (Holtzman et al. 2020), min-p
    (Nguyen et al. 2024); at least one token always stays. One uniform number is drawn per token from a generator of its
    own, so a seed gives the same answer whatever else runs. Of logits on a card only the best candidates come here, and
    the whole row where those do not decide (gpu/choose.py). Raises Damaged if the logits are not finite.
    """
    greedy = sampling.temperature == 0
    penalty = 1.0 if greedy else sampling.repetition_penalty
    said: list[int] = sorted(set(context_ids)) if penalty != 1.0 else []
    choice = Choice(sampling.temperature or 1.0, penalty, said, banned)
    random = torch.Generator().manual_seed(seed)
    index = torch.tensor(banned, dtype=torch.int64)

    def whole_row(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float().cpu()
        if banned:
            logits = logits.index_fill(0, index, -math.inf)
        return logits

    def most_likely(logits: torch.Tensor) -> int:
        best = choice.candidates(logits)
        value, token = (best.values[0], best.ids[0]) if best is not None else whole_row(logits).max(-1)
        _refuse_not_finite(float(value))  # NaN counts as the largest, so one look at it is enough
        return int(token)

    def sample(logits: torch.Tensor) -> int:
        best = choice.candidates(logits)
        few = None
        if best is not None:
            _refuse_not_finite(float(best.values[0]))
            few = decided(best, len(logits), sampling)
        if few is None:
            logits = whole_row(logits)
            _refuse_not_finite(float(logits.max()))
            if said:
                logits = penalise(logits, said, penalty)
            few = _candidates(logits / sampling.temperature, sampling)
        values, ids = few
        chosen = int(ids[_draw(values, random)])
        if penalty != 1.0:
            said.append(chosen)
        return chosen

    return most_likely if greedy else sample


def filter_logits(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits [vocab] with everything the filters exclude at minus infinity; what `make_sampler` draws from."""
    values, ids = _candidates(logits.float() / sampling.temperature, sampling)
    return torch.full_like(logits, -math.inf, dtype=torch.float32).scatter(0, ids, values)


def penalise(logits: torch.Tensor, said: Sequence[int], penalty: float) -> torch.Tensor:
    """Positive logits of the ids in `said` divided by the penalty, negative ones multiplied."""
    logits = logits.clone()
    index = torch.tensor(said)
    found = logits[index]
    logits[index] = torch.where(found > 0, found / penalty, found * penalty)
    return logits


def _refuse_not_finite(best: float) -> None:
    if not math.isfinite(best):
        raise Damaged(
            tr("the model computed values that are not numbers (NaN)"),
            hint=tr("the weights are damaged, or the precision is too low: verify the model, or try --dtype float32"),
            code="model.not_finite",
        )


def _draw(values: torch.Tensor, random: torch.Generator) -> int:
    sums = torch.softmax(values.double(), 0).cumsum(0)
    point = torch.rand(1, generator=random, dtype=torch.float64) * sums[-1]
    return min(int(torch.searchsorted(sums, point, right=True)), len(values) - 1)


def _candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and ids of the tokens that may be chosen, most likely first if anything was cut off."""
    vocab = logits.shape[0]
    cut = sampling.top_k or vocab
    if cut >= vocab and sampling.top_p >= 1.0:
        if sampling.min_p <= 0:
            return logits, torch.arange(vocab)
        ids = (logits >= logits.max() + math.log(sampling.min_p)).nonzero()[:, 0]
        return logits[ids], ids
    if cut < vocab:
        values, ids = logits.topk(cut + 1)
        tied = bool(values[cut] == values[cut - 1])  # equals of the last one that is kept stay too, as in transformers
        count = int((logits >= values[cut]).sum()) if tied else cut
        values, ids = logits.topk(count) if tied else (values[:cut], ids[:cut])
        if sampling.top_p < 1.0:
            kept = nucleus(values, None, sampling.top_p)
            values, ids = values[:kept], ids[:kept]
    else:
        values, ids = _most_likely(logits, sampling.top_p)
    if sampling.min_p > 0:
        kept = max(1, int((values >= values[0] + math.log(sampling.min_p)).sum()))
        values, ids = values[:kept], ids[:kept]
    return values, ids


def _most_likely(logits: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The nucleus of the whole vocabulary: values and ids, most likely first."""
    total = torch.logsumexp(logits, 0)
    for look in _LOOKS:
        if look < logits.shape[0]:
            values, ids = logits.topk(look)
            kept = nucleus(values, total, top_p)
            if kept is not None:
                return values[:kept], ids[:kept]
    values, ids = logits.sort(descending=True, stable=True)
    kept = nucleus(values, None, top_p)
    return values[:kept], ids[:kept]
