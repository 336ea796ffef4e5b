"""The decode loop: read what the cache does not hold yet, choose an id, compute one more, and so on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Hashable, Sequence
from itertools import count

import torch

from glmchat.core.errors import DoesNotFit
from glmchat.core.language import tr
from glmchat.engine.decoding.passes import Pass, Passes
from glmchat.engine.formats.weights import trim
from glmchat.engine.gpu.prompt import OnPrefill, Pace, Stopped, watch_layers
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.native.cards import free_memory, give_back, no_memory
from glmchat.engine.sampling import Sampler

# Rows of one prefill step on causal families. More rows make each dequantised matrix pay better; fewer make the memory
# of one step smaller. Between layers a stop is heard anyway.
CHUNK = 512
CARD_CHUNK = 2048  # on a card; there each matrix is unpacked once for all rows of a step

LEAST = 64  # rows of a step when memory is short
SPARE_CACHES = 3  # caches of other sets of adapters, beside the one in use
_ROOM = 4  # times its bytes must be free for a cache to be kept


class Sequences:
    """The one sequence a model works on: its cache, and the ids that the cache holds."""

    def __init__(self, model: LanguageModel, context: int, device: str) -> None:
        self.model = model
        self.context = context
        self.device = device
        self.pace = Pace(torch.cuda.Event) if device.startswith("cuda") else None
        self._cache: KVCache | None = None
        self._ids: list[int] = []  # what stands in the cache, behind its prefix
        self.passes = Passes()  # how it came there
        self._name: Hashable = ()  # what was computed with: the active adapters
        self._spare: dict[Hashable, tuple[KVCache, list[int], Passes]] = {}  # the least recently used first

    @property
    def cache(self) -> KVCache:
        """Allocated at first use. Raises DoesNotFit if there is no memory for it."""
        if self._cache is None:
            try:
                self._cache = self._allocate()
            except (RuntimeError, MemoryError):
                raise DoesNotFit(
                    tr("there is not enough memory for a context of {context} tokens", context=self.context),
                    hint=tr("use a smaller one: --context {value}", value=max(512, self.context // 4)),
                    code="memory.cache",
                ) from None
        return self._cache

    def _allocate(self) -> KVCache:
        try:
            return self.model.new_cache(self.context, self.model.dtype)
        except (RuntimeError, MemoryError):
            if not self._spare:
                raise
            self._spare.clear()
            give_back()
            return self.model.new_cache(self.context, self.model.dtype)

    @property
    def cache_bytes(self) -> int:
        caches = [cache for cache, _, _ in self._spare.values()]
        return sum(cache.nbytes for cache in (*caches, self._cache) if cache is not None)

    def forget(self) -> None:
        """Drop what every cache holds: the weights have changed."""
        self._cache = None
        self._ids = []
        self.passes = Passes()
        self._spare.clear()

    def switch(self, name: Hashable) -> None:
        """The model computes differently from now on: `name` says how, and equal names mean the same computation.

        The cache so far is kept for the way back if memory is plentiful, and one that was kept for `name` is used.
        """
        if name == self._name:
            return
        if self._cache is not None and self._ids and _fits_beside(self._cache, self.device):
            self._spare[self._name] = (self._cache, self._ids, self.passes)
        self._cache, self._ids, self.passes = self._spare.pop(name, (None, [], Passes()))
        self._name = name
        while len(self._spare) > SPARE_CACHES:
            del self._spare[next(iter(self._spare))]

    def drop(self, is_gone: Callable[[Hashable], bool]) -> None:
        """Forget the caches of all names that `is_gone` says will not come back as they were."""
        for name in [name for name in self._spare if is_gone(name)]:
            del self._spare[name]

    def held(self, ids: Sequence[int]) -> int:
        """How many of `ids` need no computing: the longest common prefix, but at least one id is always computed."""
        if not self.model.spec.causal:
            return 0  # the prompt is read in both directions: a grown one is another prompt
        count = 0
        for old, new in zip(self._ids, ids[:-1], strict=False):
            if old != new:
                break
            count += 1
        return count

    def prefill(
        self,
        ids: Sequence[int],
        cancelled: Callable[[], bool] | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> torch.Tensor:
        """Bring the cache to `ids` and return the float32 logits [vocab] behind the last of them.

        Raises DoesNotFit if they are longer than the context, and Stopped when `cancelled` says so; the cache then
        holds what was finished and remembers exactly that.
        """
        if len(ids) >= self.context:
            raise DoesNotFit(
                tr("the prompt has {ids} tokens, the context only {context}", ids=len(ids), context=self.context),
                hint=tr("shorten it, start a new conversation, or make room with --context"),
                code="context.full",
            )
        start = first = self.held(ids)
        self.cut(start)
        cache = self.cache
        if not self.model.spec.causal:
            cache.layout = None
        step = CHUNK if self.device == "cpu" else CARD_CHUNK
        step = step if self.model.spec.causal else len(ids)
        logits: torch.Tensor | None = None
        while start < len(ids):
            end = min(start + step, len(ids))
            layers = self.model.spec.layers
            watch = watch_layers(cancelled, on_prefill, start, end, len(ids), layers, self.pace)
            try:
                logits = self._forward(ids[start:end], watch)
            except torch.OutOfMemoryError as error:
                step = self._fewer(step, error)
                continue
            start = end
            if self.pace is not None and start < len(ids):
                continue  # the card is not there yet: the next step's layers tell when it is
            if self.pace is not None:
                self.pace.behind(cancelled, 0)
            if on_prefill is not None:
                on_prefill(start, len(ids))
        if len(ids) - first >= CHUNK:
            trim()  # of a long prompt's scratch the allocator would keep hundreds of megabytes
        assert logits is not None
        return logits

    def _fewer(self, rows: int, error: Exception) -> int:
        """How many rows to try now that a card's memory ran out: as many, once caches of other adapters are gone; then
        half. Raises DoesNotFit."""
        if self._spare:
            self._spare.clear()
        elif rows // 2 >= LEAST and self.model.spec.causal:
            rows //= 2
        else:
            raise no_memory(error, self.device, self.context) from None
        give_back()
        return rows

    def advance(self, token: int) -> torch.Tensor:
        """Logits [vocab] behind `token`, which follows what the cache holds."""
        while True:
            try:
                return self._advance(token)
            except torch.OutOfMemoryError as error:
                self._fewer(1, error)

    def _advance(self, token: int) -> torch.Tensor:
        cache = self.cache
        step = self.model.compiled(cache)
        if step is None:
            return self._forward((token,), None, "decode")
        with torch.inference_mode():
            logits: torch.Tensor = step(token, cache, *self.model.positions(cache))
        cache.advance(1)
        self._note((token,), "decode")
        return logits

    def rebuild(self, ids: Sequence[int], passes: Sequence[Pass]) -> torch.Tensor:
        """Fill an empty cache with `ids` in the very passes that did it once; logits [vocab] behind the last id."""
        self.forget()
        logits: torch.Tensor | None = None
        for one in passes:
            if one.kind == "decode":
                for token in ids[one.start : one.end]:
                    logits = self.advance(token)
                continue
            logits = self._forward((*ids[one.start : one.end], *one.dropped), None)
            self.cut(one.end)
        assert logits is not None
        return logits

    def cut(self, length: int) -> None:
        """Keep the first `length` ids."""
        self.cache.truncate(self.cache.prefix + length)
        self.passes.cut(length, self._ids)
        del self._ids[length:]

    def _forward(
        self, ids: Sequence[int], between_layers: Callable[[], None] | None, kind: str = "prefill"
    ) -> torch.Tensor:
        cache = self.cache
        before = cache.length
        try:
            with torch.inference_mode():
                row = torch.tensor(ids, device=self.device)
                logits: torch.Tensor = self.model(row, cache, last_only=True, between_layers=between_layers)[-1]
                logits.ids = row  # type: ignore[attr-defined]  # for who chooses on a card: they are there already
        except BaseException:
            cache.truncate(before)
            raise
        self._note(ids, kind)
        return logits

    def _note(self, ids: Sequence[int], kind: str) -> None:
        """These ids stand in the cache now."""
        self.passes.add(len(self._ids), len(self._ids) + len(ids), kind)
        self._ids.extend(ids)


def _fits_beside(cache: KVCache, device: str) -> bool:
    """On the CPU pages that were never written cost nothing, so it is the filled part that must fit; a card's are."""
    free = free_memory(device)
    filled = min(1.0, cache.length / max(cache.capacity, 1)) if device == "cpu" else 1.0
    return free is None or cache.nbytes * filled * _ROOM < free


def generate(
    sequence: Sequences,
    ids: Sequence[int],
    sampler: Sampler,
    *,
    stop_ids: Collection[int],
    max_tokens: int,
    run_on: Collection[int] = (),
    room: int = 0,
    cancelled: Callable[[], bool] | None = None,
    on_prefill: OnPrefill | None = None,
) -> Generator[int, None, None]:
    """The ids that follow `ids`; one of `stop_ids` ends it and is the last one yielded.

    run_on: ids that end a sentence; if there are any, an answer of `max_tokens` goes on to the next of them, to `room`
    ids at most. Close it to stop; the cache stays usable and the next call continues from what they have in common.
    """
    logits = sequence.prefill(ids, cancelled, on_prefill)
    for length in count(1):
        if cancelled is not None and cancelled():
            raise Stopped
        token = sampler(logits)
        yield token
        if token in stop_ids or (length >= max_tokens and (not run_on or token in run_on or length >= room)):
            return
        logits = sequence.advance(token)
