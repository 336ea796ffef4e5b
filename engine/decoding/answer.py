"""An answer from its ids to its text: what ends it, and what is told of it piece by piece."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from glmchat.core.decoding import TokenLogprob
from glmchat.core.messages import FinishReason, Sampling
from glmchat.engine.decoding.decoder import Decoder
from glmchat.engine.decoding.sequences import ReadRows, Sequences, Slot
from glmchat.engine.generate import generate
from glmchat.engine.gpu.prompt import OnPrefill, Stopped
from glmchat.engine.sampling import Sampler
from glmchat.engine.text_stream import TextStream, repeats_itself

MAX_TOKENS = 2048  # an answer without a limit of its own ends here at the latest


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer: whole characters, and the ids they came from.

    Only the last one has a finish reason and all facts: prompt_n, cached_n, prompt_ms (reading what was not cached),
    predicted_n, predicted_ms, ttft_ms, seed, passes (engine/generate.py), stopped_by ("eos", "stop", "length",
    "context", "loop", "cancelled"). The first one has those that a replay needs, for whoever stops before the end.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    logprobs: tuple[TokenLogprob, ...] = ()  # where a decoder tells them


@dataclass(frozen=True, slots=True)
class Asked:
    """An answer to `ids` as a model gives it. ends: ids that end it; run_on: see `generate`; context: positions in all.

    sampler: chooses under `sampling` with `seed`, and under the decoder where there is one. on_rows: see `Slot.read`.
    only_reads: nothing is answered.
    """

    ids: Sequence[int]
    sampling: Sampling
    seed: int
    sampler: Sampler
    ends: Collection[int]
    run_on: Collection[int]
    context: int
    cancelled: Callable[[], bool] | None = None
    on_prefill: OnPrefill | None = None
    on_rows: ReadRows | None = None
    only_reads: bool = False

    @property
    def room(self) -> int:
        return max(self.context - len(self.ids), 0)

    @property
    def limit(self) -> int:
        """The number of ids that was asked for or that there is room for."""
        return 0 if self.only_reads else min(self.sampling.max_tokens or MAX_TOKENS, self.room)

    def steps(self, slot: Slot) -> Generator[int | None, None, None]:
        return generate(
            slot,
            self.ids,
            self.sampler,
            stop_ids=self.ends,
            max_tokens=self.limit,
            run_on=self.run_on,
            room=self.room,
            cancelled=self.cancelled,
            on_prefill=self.on_prefill,
            on_rows=self.on_rows,
        )


def ids_of(sequences: Sequences, asked: Asked) -> Generator[int, None, None]:
    """The ids alone; the one that ends the answer is the last one."""
    slot = sequences.take(asked.ids)
    try:
        for token in asked.steps(slot):
            if token is not None:
                yield token
    except Stopped:
        return
    finally:
        sequences.give_back(slot)


def write(
    sequences: Sequences, asked: Asked, text: TextStream, decoder: Decoder | None, conversation: str | None
) -> Generator[Chunk | None, None, None]:
    """The answer as `text` lets it through; yields after every token, None where there is nothing to say yet."""
    ids, sampling = asked.ids, asked.sampling
    slot = sequences.take(ids, conversation)
    started = time.perf_counter()
    try:
        brought = yield from sequences.restore(slot, ids)
        steps, limit = asked.steps(slot), asked.limit
    except BaseException:
        sequences.give_back(slot)
        raise
    told = (lambda **_: ()) if decoder is None else decoder.told
    ids_so_far: list[int] = []
    pending: list[int] = []
    opening: dict[str, Any] = {}  # how the prompt came into the cache; told with the first piece
    untold = True
    first: float | None = None
    reason: FinishReason = "length"
    by = "length" if limit < asked.context - len(ids) or limit == sampling.max_tokens else "context"
    try:
        for token in steps:
            if token is None:
                yield None
                continue
            first = first or time.perf_counter()
            opening = opening or {"seed": asked.seed, "cached_n": slot.cached, "passes": slot.passes.to_json()}
            ids_so_far.append(token)
            pending.append(token)
            if token in asked.ends:
                reason, by = "stop", "eos"
                break
            piece = text.push(token)
            loops = not sampling.ignore_eos and repeats_itself(ids_so_far)
            if text.stopped or loops:
                slot.pending = None
            if piece:
                yield Chunk(piece, tuple(pending), facts=opening if untold else {}, logprobs=told())
                pending.clear()
                untold = False
            if text.stopped:
                reason, by = "stop", "stop"
                break
            if loops:
                reason, by = "length", "loop"
                break
            if not piece:
                yield None
    except Stopped:
        reason = by = "cancelled"
    finally:
        steps.close()
        sequences.give_back(slot)
    ended = time.perf_counter()
    read = (first or ended) - started
    facts = {
        "prompt_n": len(ids),
        "cached_n": slot.cached,
        "prompt_ms": (read - (brought.seconds if brought is not None else 0.0)) * 1000,
        "predicted_n": len(ids_so_far),
        "predicted_ms": (ended - first) * 1000 if first else 0.0,
        "ttft_ms": read * 1000 if first else None,
        "seed": asked.seed,
        **opening,
        "stopped_by": by,
        **({} if brought is None else {"disk": asdict(brought)}),
    }
    yield Chunk(text.finish(), tuple(pending), reason, facts, told(ended=by == "eos"))
