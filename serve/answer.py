"""One answer: waits its turn, lets the engine speak, and stops it when the client has gone.

Everything that happens to it (a move in the line, progress of the prefill, a piece, the client's leaving) comes through
one queue, so there is one place that decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from starlette.types import Receive

from glmchat.core.decoding import TokenLogprob
from glmchat.core.errors import DoesNotFit, Failed, GlmchatError, ServerFailed
from glmchat.core.language import tr
from glmchat.core.messages import FinishReason
from glmchat.core.text import one_line
from glmchat.serve.face import Chunk
from glmchat.serve.host import Host, Place
from glmchat.serve.wire import GenerationRequest

log = logging.getLogger("glmchat.serve")
PREFILL_INTERVAL = 0.1  # seconds
# A screen shows 120 pictures a second at most, and each event takes the interpreter from the thread that computes.
PIECE_INTERVAL = 0.008
HASH_INTERVAL = 0.05  # seconds between two looks whether the weights have been hashed
HEARTBEAT = 1.0  # seconds of silence after which a comment says that all is well


@dataclass(frozen=True, slots=True)
class Waiting:
    """`place` requests will be served before this one."""

    place: int


@dataclass(frozen=True, slots=True)
class Begun:
    """This request is the one being served now."""


@dataclass(frozen=True, slots=True)
class Prefill:
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Silence:
    """Nothing happened for HEARTBEAT seconds."""


@dataclass(frozen=True, slots=True)
class Said:
    """A piece of one of the answers. final: nothing at all comes after it."""

    choice: int
    chunk: Chunk
    final: bool = False


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Chunks that came faster than one each PIECE_INTERVAL, as one."""

    text: str
    token_ids: tuple[int, ...]
    facts: Mapping[str, Any]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class _Over:
    error: Exception | None


@dataclass(frozen=True, slots=True)
class _Gone:
    pass


Event = Waiting | Begun | Prefill | Silence | Said


class Answer:
    """prompts: the ids of each; the last `continued` ids of the only one are the beginning of its answer."""

    def __init__(
        self,
        host: Host,
        place: Place,
        request: GenerationRequest,
        prompts: Sequence[list[int]],
        adapters: Mapping[str, float],
        continued: int = 0,
        echoes: Sequence[str] = (),
    ) -> None:
        self.host, self.place, self.request, self.prompts, self.adapters = host, place, request, prompts, adapters
        self.echoes = echoes  # what stands before the answers to each prompt, where that was asked for
        self.choices = len(prompts) * request.choices
        self.continued = continued
        self.began: Mapping[str, Any] = {}  # what the engine said of itself and of the adapters when it began
        self._cancelled = threading.Event()
        self._told_prefill = 0.0
        self._begun = False  # it stands before the engine, or is there
        self._piece_time = 0.0
        self._pieces: list[Said] = []  # pieces that a timer of the loop will send
        self._pieces_lock = threading.Lock()
        self._last: Said | None = None
        self._unfinished = self.choices
        self._events: asyncio.Queue[Event | _Over | _Gone] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    async def events(self, receive: Receive) -> AsyncGenerator[Event, None]:
        """What happens, in order. Ends after the last chunk, or silently once the client has gone.

        Raises the engine's error. When this generator ends, however it ends, the engine is at rest and the place in
        the line is free.
        """
        watcher = asyncio.create_task(self._watch(receive))
        worker = asyncio.create_task(self._take_turn())
        try:
            while True:
                try:
                    async with asyncio.timeout(HEARTBEAT):
                        event = await self._events.get()
                except TimeoutError:
                    yield Silence()
                    continue
                match event:
                    case _Gone():
                        return
                    case _Over(error):
                        if error:
                            raise error
                        return
                    case _:
                        yield event
        finally:
            self._cancelled.set()
            watcher.cancel()
            if not self._begun:
                worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(worker)
            self.place.leave()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._cancelled.set()  # at once, not behind the pieces that still wait to be sent
        self._events.put_nowait(_Gone())

    async def _take_turn(self) -> None:
        async for number in self.place.turns():
            if number:
                self._events.put_nowait(Waiting(number))
        self._begun = True
        started = time.monotonic()
        error: Exception | None = None
        try:
            error = await self.host.write(self._produce(), self.adapters, self._stop_wanted)
            if not self._stop_wanted():  # one that was given up says nothing of how long a turn takes
                self.host.line.took(time.monotonic() - started)
            self.place.leave()  # now, not when all is sent: a client that reads slowly keeps nobody waiting
            await self._wait_for_hashes()
        finally:
            self._send_pieces()
            if self._last is not None:
                self._events.put_nowait(self._last)
            self._events.put_nowait(_Over(error))

    async def _wait_for_hashes(self) -> None:
        """The last chunk tells by hashes what answered. Large files on a slow disk may still be read by then."""
        while self._last is not None and not self._stop_wanted() and not self.host.ready().identified:
            await asyncio.sleep(HASH_INTERVAL)

    def _stop_wanted(self) -> bool:
        return self._cancelled.is_set() or self.host.stopping.is_set()

    def _stop_or_rest(self) -> bool:
        """As the engine asks, between tokens: whether to stop. It rests here while everybody who uses it does."""
        while not self._stop_wanted() and not self.host.awake.wait(HEARTBEAT):
            pass
        return self._stop_wanted()

    def _tell(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _piece(self, said: Said) -> None:
        """A piece at once, or together with those that follow it within PIECE_INTERVAL of the one before."""
        with self._pieces_lock:
            now = time.monotonic()
            wait = self._piece_time + PIECE_INTERVAL - now
            if not self._pieces and wait <= 0:
                self._piece_time = now
                self._tell(said)
                return
            self._pieces.append(said)
            first = len(self._pieces) == 1
        if first:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._loop.call_later, wait, self._send_pieces)

    def _send_pieces(self) -> None:
        with self._pieces_lock:
            pieces, self._pieces = self._pieces, []
            self._piece_time = time.monotonic()
        # An end stays apart from the pieces before it: it is told in a way of its own.
        for (choice, reason), group in groupby(pieces, lambda said: (said.choice, said.chunk.finish_reason)):
            chunks = [said.chunk for said in group]
            text = "".join(chunk.text for chunk in chunks)
            ids = tuple(number for chunk in chunks for number in chunk.token_ids)
            facts = {name: value for chunk in chunks for name, value in chunk.facts.items()}
            logprobs = tuple(one for chunk in chunks for one in chunk.logprobs)
            self._events.put_nowait(Said(choice, _Pieces(text, ids, facts, logprobs, reason)))

    def _prefill(self, done: int, total: int) -> None:
        """The engine tells after every layer; ten times a second is enough for anybody who watches."""
        now = time.monotonic()
        if done == total or now - self._told_prefill >= PREFILL_INTERVAL:
            self._told_prefill = now
            self._tell(Prefill(done, total))

    def _produce(self) -> Generator[None, None, Exception | None]:
        """In the engine's thread, a token of each answer at a time. Tells every piece but the last, and returns what
        went wrong, for the client.
        """
        waiting = deque(range(self.choices))
        writing: list[Generator[None, None, None]] = []
        try:
            if not self._stop_wanted():
                self._tell(Begun())
            while (waiting or writing) and not self._stop_wanted():
                while waiting and (not writing or self.host.has_room):
                    writing.append(self._say(waiting.popleft()))
                    self.host.writing += 1
                for one in list(writing):
                    if next(one, _ENDED) is not _ENDED:
                        continue
                    writing.remove(one)
                    if waiting and not writing:  # the one place that it has is not given to another request
                        writing.append(self._say(waiting.popleft()))
                    else:
                        self.host.writing -= 1
                yield
            if self.host.stopping.is_set():
                return ServerFailed(
                    tr("the server is shutting down"), hint=tr("start it again"), code="server.stopping"
                )
        except Exception as caught:  # noqa: BLE001 (goes to the client; the engine lives on)
            return None if self._cancelled.is_set() else in_words(caught)
        finally:
            for one in writing:
                one.close()
            self.host.writing -= len(writing)
        return None

    def _say(self, choice: int) -> Generator[None, None, None]:
        """One of the answers. The first to a prompt has the seed that was asked for, the next ones those behind it, as
        in vLLM.
        """
        request, engine = self.request, self.host.ready()
        self.host.activate(self.adapters)  # what is written beside it goes on with its own
        self.began = self.began or self.host.facts_of(self.adapters)
        number, again = divmod(choice, request.choices)
        sampling, ids = request.sampling, self.prompts[number]
        if again and sampling.seed is not None:
            sampling = replace(sampling, seed=(sampling.seed + again) % 2**63)
        with contextlib.closing(
            engine.stream_tokens(
                ids,
                sampling,
                cancelled=self._stop_or_rest,
                on_prefill=self._prefill,
                answer=ids[len(ids) - self.continued :],
                # Nothing is cleaned up that was held to a form.
                chat=request.is_chat and request.decoding.grammar is None,
                decoder=engine.decoder(request.decoding, ids, self.host.folders(self.adapters)),
                # A cache would be of no use to what looks at every row.
                conversation=None if request.decoding.of_prompt else self.host.conversation(request.keep_as),
            )
        ) as chunks:
            for chunk in chunks:
                if chunk is not None:
                    self._tell_chunk(choice, chunk)
                if self._stop_wanted():
                    break
                yield

    def _tell_chunk(self, choice: int, chunk: Chunk) -> None:
        if chunk.finish_reason is not None:
            self.host.counts.add(chunk.facts)
            if chunk.finish_reason == "cancelled":
                return  # nobody listens, or is told why
            self._unfinished -= 1
            if not self._unfinished:
                self._last = Said(choice, chunk, final=True)
                return
        self._piece(Said(choice, chunk))


_ENDED = object()


def in_words(error: Exception) -> GlmchatError:
    """An engine's exception as an error that a client can be told. The traceback stays in the log."""
    if isinstance(error, GlmchatError):
        return error
    log.error("the engine failed", exc_info=error)
    words = one_line(f"{type(error).__name__}: {error}")
    if isinstance(error, MemoryError) or "out of memory" in words.lower() or "can't allocate memory" in words.lower():
        return DoesNotFit(
            tr("memory ran out while answering: {words}", words=words),
            hint=tr("try --quant 4, a smaller --context, or close other programs"),
            code="memory",
        )
    return Failed(
        tr("the engine failed: {words}", words=words),
        hint=tr("see the engine's log for details"),
        code="engine.failed",
    )
