"""The decode loop: read what the cache does not hold yet, choose an id, compute one more, and so on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from itertools import count

from glmchat.engine.decoding.sequences import ReadRows, Slot
from glmchat.engine.gpu.prompt import OnPrefill, Stopped
from glmchat.engine.sampling import Sampler


def generate(
    slot: Slot,
    ids: Sequence[int],
    sampler: Sampler,
    *,
    stop_ids: Collection[int],
    max_tokens: int,
    run_on: Collection[int] = (),
    room: int = 0,
    cancelled: Callable[[], bool] | None = None,
    on_prefill: OnPrefill | None = None,
    on_rows: ReadRows | None = None,
) -> Generator[int | None, None, None]:
    """The ids that follow `ids`; one of `stop_ids` ends it and is the last one yielded. None, while the prompt is read.

    run_on: ids that end a sentence; if there are any, an answer of `max_tokens` goes on to the next of them, to `room`
    ids at most. max_tokens 0: the prompt is read, and that is all. on_rows: see `Slot.read`.
    Close it to stop; the cache stays usable and the next call continues from what they have in common.
    """
    logits = yield from slot.read(ids, cancelled, on_prefill, on_rows)
    if max_tokens <= 0:
        return
    for length in count(1):
        if cancelled is not None and cancelled():
            raise Stopped
        token = sampler(logits)
        ends = token in stop_ids or (length >= max_tokens and (not run_on or token in run_on or length >= room))
        slot.pending = None if ends else token
        yield token
        if ends:
            return
        logits = slot.advance(token)
