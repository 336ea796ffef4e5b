"""The sequences that a model works on: one for each answer that is being written, and what was computed before.

Several are advanced together by one compiled step, which reads the weights once for all of them, each with its own
adapters. A row of it has the same bits whatever stands beside it (native/step.h), so an answer is the same alone and in
company.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

import torch

from glmchat.core.errors import DoesNotFit
from glmchat.core.kv_files import UNNAMED
from glmchat.core.language import tr
from glmchat.engine.decoding.kv_store import LEAST_MORE, Contents, Job, KVStore, Unusable
from glmchat.engine.decoding.passes import Pass, Passes
from glmchat.engine.formats.weights import trim
from glmchat.engine.gpu.prompt import OnPrefill, Pace, watch_layers
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.models.variant import Variant
from glmchat.engine.native.cards import free_memory, give_back, no_memory
from glmchat.engine.native.pages import share

# Rows of one prefill step on causal families. More rows make each dequantised matrix pay better; fewer make the memory
# of one step smaller. Between layers a stop is heard anyway.
CHUNK = 512
CARD_CHUNK = 2048  # on a card; there each matrix is unpacked once for all rows of a step
SHARED_CHUNK = 64  # while other answers are being written: they wait for it

ROWS_CHUNK = 128  # while somebody looks at every row of logits, which has 150,000 numbers of a large vocabulary

LEAST = 64  # rows of a step when memory is short
SPARE_CACHES = 3  # caches of other sets of adapters, beside those in use
WORTH = 16  # ids that two prompts must have in common for their keys and values to be copied
_ROOM = 4  # times its bytes must be free for a cache to be kept
_GONE = object()  # the name of what was computed with adapters that are no more
ReadRows = Callable[[int, torch.Tensor], None]
"""What looks at the float32 logits [n, vocab] behind n ids of a prompt, of which the first has this index."""


class Slot:
    """One sequence: its cache, and the ids that the cache holds. name: some adapters, with which it is computed;
    variant: the model as these make it.

    An answer that is being written has taken it (`Sequences.take`); `pending` is then the id that it would go on with.
    """

    def __init__(self, all_slots: Sequences, name: Hashable, variant: Variant) -> None:
        self.name, self.variant = name, variant
        self.taken = False
        self.used = 0  # when it was taken last, as a number that grows
        self.pending: int | None = None
        self.cached = 0  # ids of the prompt that did not have to be computed
        self.passes = Passes()  # how what stands in the cache came there
        self.conversation: str | None = None  # whose it is, if what it holds may lie on the disk
        self.is_unnamed = False
        self._on_disk = 0  # ids that a file of this conversation holds
        self._job: Job | None = None  # the last time that it was to be written
        self._all = all_slots
        self._cache: KVCache | None = None
        self._ids: list[int] = []  # what stands in the cache, behind its prefix
        self._ready: torch.Tensor | None = None  # logits behind `pending`, computed together with others

    @property
    def model(self) -> LanguageModel:
        return self._all.model

    @property
    def cache(self) -> KVCache:
        """Allocated at first use. Raises DoesNotFit if there is no memory for it."""
        if self._cache is None:
            self.model.wear(self.variant)
            self._cache = self._all.allocate()
        return self._cache

    @property
    def nbytes(self) -> int:
        return 0 if self._cache is None else self._cache.nbytes

    @property
    def length(self) -> int:
        return len(self._ids)

    @property
    def is_waiting(self) -> bool:
        """For logits: it has an id to go on with, and nobody has computed yet what follows."""
        return self.pending is not None and self._ready is None

    def forget(self) -> None:
        self._cache = None
        self._ids = []
        self.passes = Passes()
        self.pending = self._ready = None

    def fits_beside(self) -> bool:
        """Whether there is memory for one more like it.

        On the CPU pages that were never written cost nothing, so it is the filled part that must fit; a card's are.
        """
        if self._cache is None:
            return True
        device, cache = self._all.device, self._cache
        free = free_memory(device)
        filled = min(1.0, cache.length / max(cache.capacity, 1)) if device == "cpu" else 1.0
        return free is None or cache.nbytes * filled * _ROOM < free

    def held(self, ids: Sequence[int]) -> int:
        """How many of `ids` need no computing: the longest common prefix, but at least one id is always computed."""
        if not self.model.spec.causal:
            return 0  # the prompt is read in both directions: a grown one is another prompt
        most = max(0, min(len(self._ids), len(ids) - 1))
        if self.begins_with(ids[:most]):
            return most
        return next(n for n, (old, new) in enumerate(zip(self._ids, ids, strict=False)) if old != new)

    def begins_with(self, ids: Sequence[int]) -> bool:
        return self._ids[: len(ids)] == list(ids)

    def copy(self, other: Slot, count: int) -> None:
        """Hold the first `count` ids that `other` holds."""
        source, cache = other.cache, self.cache
        cache.truncate(cache.prefix)
        start, end = source.prefix, source.prefix + count
        cache.reserve(end)
        if not share(cache, source, end):
            for mine, theirs in ((cache.keys, source.keys), (cache.values, source.values)):
                for to, given in zip(mine, theirs, strict=True):
                    to[:, start:end].copy_(given[:, start:end])
        cache.length = end
        self._ids = other._ids[:count]
        self.passes = other.passes.copy()
        self.passes.cut(count, other._ids)

    def belong(self, conversation: str | None, ids: Sequence[int]) -> None:
        """An answer of this conversation takes it. Without a name it has that of what it goes on with, or a new one."""
        self.is_unnamed = conversation == UNNAMED
        if self.is_unnamed:
            goes_on = self.conversation is not None and self.length > 0 and 2 * self.held(ids) >= self.length
            conversation = self.conversation if goes_on else token_hex(16)
        if conversation != self.conversation:
            self.conversation, self._on_disk, self._job = conversation, 0, None

    def restore(self, ids: Sequence[int], passes: Sequence[Pass], count: int, *, own: bool) -> None:
        """The cache holds the first `count` of `ids` now, as `passes` computed them once. own: and so does a file of
        this conversation."""
        self.cache.length = self.cache.floor = self.cache.prefix + count
        self._ids = list(ids[:count])
        self.passes.done = list(passes)
        self.passes.cut(count, ids)
        self.cached, self._on_disk = count, count if own else 0

    def keep(self, store: KVStore) -> None:
        """Have what it holds written, if that is worth it and the conversation may lie on the disk."""
        cache = self._cache
        if cache is None or self.conversation is None or not self.model.spec.causal:
            return
        if self._job is not None and self._job.done:
            self._on_disk = len(self._job.contents.ids)
        self._on_disk = min(self._on_disk, max(cache.floor - cache.prefix, 0))
        if self.length - self._on_disk >= LEAST_MORE:
            contents = Contents(tuple(self._ids), tuple(self.passes.done), self._all.prompt_speed)
            self._job = store.keep(self.name, self.conversation, cache, contents)

    def prefill(
        self,
        ids: Sequence[int],
        cancelled: Callable[[], bool] | None = None,
        on_prefill: OnPrefill | None = None,
    ) -> torch.Tensor:
        """Bring the cache to `ids` at one go and return the float32 logits [vocab] behind the last of them."""
        steps = self.read(ids, cancelled, on_prefill)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                logits: torch.Tensor = end.value
                return logits

    def read(
        self,
        ids: Sequence[int],
        cancelled: Callable[[], bool] | None = None,
        on_prefill: OnPrefill | None = None,
        on_rows: ReadRows | None = None,
    ) -> Generator[None, None, torch.Tensor]:
        """Bring the cache to `ids`; yields between chunks, and returns the float32 logits [vocab] behind the last id.

        on_rows: is shown the logits behind each id; so all of them are computed, whatever the cache holds.
        Raises DoesNotFit if they are longer than the context, and Stopped when `cancelled` says so; the cache then
        holds what was finished and remembers exactly that.
        """
        context, device, pace = self._all.context, self._all.device, self._all.pace
        if len(ids) >= context:
            raise DoesNotFit(
                tr("the prompt has {ids} tokens, the context only {context}", ids=len(ids), context=context),
                hint=tr("shorten it, start a new conversation, or make room with --context"),
                code="context.full",
            )
        start = first = self.held(ids) if on_rows is None else 0
        self.cached = min(self.cached, start)
        self.cut(start)
        cache = self.cache
        if not self.model.spec.causal:
            cache.layout = None
        step = (CHUNK if device == "cpu" else CARD_CHUNK) if self.model.spec.causal else len(ids)
        step = step if on_rows is None else min(step, ROWS_CHUNK)
        logits: torch.Tensor | None = None
        while start < len(ids):
            shared = self.model.spec.causal and self._all.is_shared and not self._all.reads_afresh
            if shared and on_rows is None and (ahead := self._all.ahead_of(self, ids)) is not None:
                held = ahead.held(ids)
                self.copy(ahead, held)
                self.cached, start = self.cached + held - start, held
            end = min(start + (min(step, SHARED_CHUNK) if shared else step), len(ids))
            layers = self.model.spec.layers
            watch = watch_layers(cancelled, on_prefill, start, end, len(ids), layers, pace)
            began = time.perf_counter()
            try:
                logits = self._forward(ids[start:end], watch, on_rows=on_rows)
            except torch.OutOfMemoryError as error:
                step = self._fewer(step, error)
                continue
            self._all.took(end - start, time.perf_counter() - began)
            start = end
            if start < len(ids):
                yield
            if pace is not None and start < len(ids):
                continue  # the card is not there yet: the next step's layers tell when it is
            if pace is not None:
                pace.behind(cancelled, 0)
            if on_prefill is not None:
                on_prefill(start, len(ids))
        if len(ids) - first >= CHUNK:
            trim()  # of a long prompt's scratch the allocator would keep hundreds of megabytes
        assert logits is not None
        return logits

    def _fewer(self, rows: int, error: Exception) -> int:
        """How many rows to try now that a card's memory ran out: as many, once caches of other adapters are gone; then
        half. Raises DoesNotFit."""
        if self._all.drop_idle():
            pass
        elif rows // 2 >= LEAST and self.model.spec.causal:
            rows //= 2
        else:
            raise no_memory(error, self._all.device, self._all.context) from None
        give_back()
        return rows

    def advance(self, token: int) -> torch.Tensor:
        """Logits [vocab] behind `token`, which follows what the cache holds."""
        if self._ready is not None:
            logits, self._ready, self.pending = self._ready, None, None
            return logits
        self.pending = None
        while True:
            try:
                return self._advance(token)
            except torch.OutOfMemoryError as error:
                self._fewer(1, error)

    def _advance(self, token: int) -> torch.Tensor:
        cache = self.cache
        step = self.model.compiled(cache, self.variant)
        if step is None:
            return self._forward((token,), None, "decode")
        with torch.inference_mode():
            logits: torch.Tensor = step(token, cache, *self.model.positions(cache))
        cache.advance(1)
        self.note((token,), "decode")
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
        self.pending = self._ready = None
        self.cache.truncate(self.cache.prefix + length)
        self.passes.cut(length, self._ids)
        del self._ids[length:]

    def _forward(
        self,
        ids: Sequence[int],
        between_layers: Callable[[], None] | None,
        kind: str = "prefill",
        on_rows: ReadRows | None = None,
    ) -> torch.Tensor:
        cache = self.cache
        before = cache.length
        self.model.wear(self.variant)
        try:
            with torch.inference_mode():
                row = torch.tensor(ids, device=self._all.device)
                rows = self.model(row, cache, last_only=on_rows is None, between_layers=between_layers)
                if on_rows is not None:
                    on_rows(len(self._ids), rows)
                logits: torch.Tensor = rows[-1].clone() if on_rows is not None else rows[-1]
                logits.ids = row  # type: ignore[attr-defined]  # for who chooses on a card: they are there already
        except BaseException:
            cache.truncate(before)
            raise
        self.note(ids, kind)
        return logits

    def note(self, ids: Sequence[int], kind: str) -> None:
        """These ids stand in the cache now."""
        self.passes.add(len(self._ids), len(self._ids) + len(ids), kind)
        self._ids.extend(ids)

    def give_logits(self, logits: torch.Tensor) -> None:
        """Those behind `pending`, which was computed together with others; its keys and values are in the cache."""
        assert self.pending is not None
        self.cache.advance(1)
        self.note((self.pending,), "decode")
        self._ready = logits


@dataclass(frozen=True, slots=True)
class FromDisk:
    """What a file brought: ids, the bytes that were read, how long that took, and what computing would have taken
    longer."""

    ids: int
    bytes: int
    seconds: float
    saved: float


class Sequences:
    """All slots of one model. most: how many of them the same adapters may have; one alone is used again and again."""

    def __init__(self, model: LanguageModel, context: int, device: str, most: int = 1) -> None:
        self.model = model
        self.context = context
        self.device = device
        self.most = most
        self.pace = Pace(torch.cuda.Event) if device.startswith("cuda") else None
        self.slots: list[Slot] = []
        self.store: KVStore | None = None  # where caches are kept on the disk
        self.reads_afresh = False  # each prompt whole and in the same steps, whatever was read before or beside it
        self._read = (0, 0.0)  # ids of prompts so far, and seconds
        self._name: Hashable = ()
        self._variant = model.plain
        self._count = 0  # of takings
        self.current = self._new()  # the one that was used last with these adapters

    def _new(self) -> Slot:
        slot = Slot(self, self._name, self._variant)
        self.slots.append(slot)
        return slot

    def _of(self, name: Hashable) -> list[Slot]:
        return [slot for slot in self.slots if slot.name == name]

    @property
    def is_shared(self) -> bool:
        """Whether more than one answer is being written."""
        return sum(slot.taken for slot in self.slots) > 1

    def took(self, ids: int, seconds: float) -> None:
        """So long reading so many took."""
        self._read = self._read[0] + ids, self._read[1] + seconds

    @property
    def prompt_speed(self) -> float:
        """Ids a second at which prompts are read here; 0 if that is not known."""
        return self._read[0] / self._read[1] if self._read[1] else 0.0

    @property
    def is_busy(self) -> bool:
        return any(slot.taken for slot in self.slots)

    def take(self, ids: Sequence[int], conversation: str | None = None) -> Slot:
        """A slot for an answer to `ids`, which holds as many of them already as any does. Give it back.

        conversation: the name under which what it holds may be kept on the disk, UNNAMED or None (`kv_store.KVStore`).
        """
        mine = self._of(self._name)
        idle = [slot for slot in mine if not slot.taken]
        if self.reads_afresh:
            for slot in idle[:1]:
                slot.cut(0)
            mine = idle = idle[:1]
        best = max(idle, key=lambda slot: (slot.held(ids), -slot.used), default=None)
        # What another conversation may go on with is left, while there is room for one more.
        is_loss = best is not None and best.length > 0 and 2 * best.held(ids) < best.length
        if best is None or (is_loss and len(mine) < self.most and best.fits_beside()):
            best = self._new()
        elif self._is_handed_over(best, ids, conversation):
            self.slots.remove(best)
            best = self._new()
        source = max(mine, key=lambda slot: slot.held(ids), default=best)
        if source is not best and (count := source.held(ids)) >= WORTH + best.held(ids):
            best.copy(source, count)
        self._count += 1
        best.taken, best.used, best.cached = True, self._count, best.held(ids)
        best.belong(conversation, ids)
        self.current = best
        return best

    def ahead_of(self, slot: Slot, ids: Sequence[int]) -> Slot | None:
        """One that has read more of `ids`, where that is worth copying: a prompt that several read at once is read
        once, by each of them in turns.
        """
        least = slot.length + WORTH
        if len(ids) <= least:
            return None
        longer = [other for other in self._of(slot.name) if other is not slot and other.length >= least]
        ahead = [other for other in longer if other.begins_with(ids[:least])]
        return max(ahead, key=lambda other: other.held(ids), default=None)

    def _is_handed_over(self, slot: Slot, ids: Sequence[int], conversation: str | None) -> bool:
        """Whether the cache of another conversation is still to be written, so that it goes to who does that."""
        if self.store is None or slot.held(ids) == slot.length or not slot.fits_beside():
            return False
        goes_on = 2 * slot.held(ids) >= slot.length and conversation in (slot.conversation, UNNAMED)
        return not goes_on and self.store.takes_over(slot.cache)

    def restore(self, slot: Slot, ids: Sequence[int]) -> Generator[None, None, FromDisk | None]:
        """Read what a file holds of `ids` beyond what the slot does, yielding between parts of it."""
        if self.store is None or slot.conversation is None or not self.model.spec.causal:
            return None
        started, held = time.perf_counter(), slot.held(ids)
        match = self.store.find(slot.name, slot.conversation, ids, held, slot.cache)
        if match is None:
            return None
        slot.cut(0)
        reader = match.reader
        try:
            for _ in reader.read(match.length):
                yield
            if slot.is_unnamed and 2 * match.length >= len(reader.ids):
                slot.conversation = match.conversation
            own = match.conversation == slot.conversation
            slot.restore(reader.ids.tolist(), reader.passes, match.length, own=own)
        except (OSError, Unusable) as error:
            slot.cut(0)
            self.store.refuse(match.path, error)
            return None
        finally:
            reader.close()
        took = time.perf_counter() - started
        saved = (match.length - held) / reader.speed - took if reader.speed > 0 else 0.0
        return FromDisk(match.length, reader.bytes_read, took, max(0.0, saved))

    def give_back(self, slot: Slot) -> None:
        slot.taken = False
        slot.pending = None
        if slot.name is _GONE:
            self.slots.remove(slot)
        if self.store is not None:
            slot.keep(self.store)
            self.store.rest()

    def step(self) -> None:
        """Compute what all answers that are being written go on with, as far as one step can do it for several."""
        waiting = [slot for slot in self.slots if slot.taken and slot.is_waiting]
        if len(waiting) < 2:
            return
        together: dict[Hashable, list[tuple[Slot, Any]]] = {}
        for slot in waiting:
            step = self.model.compiled(slot.cache, slot.variant)
            if getattr(step, "most_rows", 1) > 1:
                together.setdefault(step.base, []).append((slot, step))
        for rows in together.values():
            rows.sort(key=lambda row: id(row[1]))  # what the same adapters add is read once
            most = rows[0][1].most_rows
            for first in range(0, len(rows), most):
                self._step([slot for slot, _ in rows[first : first + most]], [s for _, s in rows[first : first + most]])

    def _step(self, slots: Sequence[Slot], steps: Sequence[Any]) -> None:
        tokens = [slot.pending for slot in slots if slot.pending is not None]
        positions = [self.model.position(slot.cache) for slot in slots]
        with torch.inference_mode():
            logits = steps[0].rows(tokens, [slot.cache for slot in slots], positions, steps)
        for slot, row in zip(slots, logits, strict=True):
            slot.give_logits(row)

    def allocate(self) -> KVCache:
        try:
            return self._allocate()
        except (RuntimeError, MemoryError):
            raise DoesNotFit(
                tr("there is not enough memory for a context of {context} tokens", context=self.context),
                hint=tr("use a smaller one: --context {value}", value=max(512, self.context // 4)),
                code="memory.cache",
            ) from None

    def _allocate(self) -> KVCache:
        try:
            return self.model.new_cache(self.context, self.model.cache_dtype)
        except (RuntimeError, MemoryError):
            if not self.drop_idle():
                raise
            give_back()
            return self.model.new_cache(self.context, self.model.cache_dtype)

    def drop_idle(self) -> bool:
        """Forget what nobody uses; False if there was nothing."""
        idle = [slot for slot in self.slots if not slot.taken and slot is not self.current and slot.nbytes]
        for slot in idle:
            self._remove(slot)
        return bool(idle)

    def _remove(self, slot: Slot) -> None:
        """Its memory is free, whatever was still to be written of it."""
        self.slots.remove(slot)
        if self.store is not None and slot.nbytes:
            self.store.release(slot.cache)

    @property
    def cache_bytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots)

    def switch(self, name: Hashable, variant: Variant) -> None:
        """Who comes from now on is answered by `variant`: `name` says what that is, and equal names mean the same
        computation. Answers that are being written go on as they began.

        Idle caches so far are kept for the way back if memory is plentiful; those that were kept for `name` are used.
        """
        if name == self._name:
            return
        for slot in self._of(self._name):
            if not slot.taken and not (slot.length and slot.nbytes and slot.fits_beside()):
                self._remove(slot)
        self._name, self._variant = name, variant
        mine = self._of(name)
        self.current = max(mine, key=lambda slot: slot.used) if mine else self._new()
        idle = (slot for slot in self.slots if slot.name != name and not slot.taken)
        others = sorted(idle, key=lambda slot: slot.used)
        for slot in others[: max(0, len(others) - SPARE_CACHES)]:
            self._remove(slot)

    def drop(self, is_gone: Callable[[Hashable], bool]) -> None:
        """Forget the caches of all names that `is_gone` says will not come back as they were; of answers that are being
        written, with their end."""
        for slot in [slot for slot in self.slots if slot.name not in (self._name, _GONE) and is_gone(slot.name)]:
            slot.name, slot.conversation, slot.is_unnamed = _GONE, None, False
            if not slot.taken:
                self.slots.remove(slot)
