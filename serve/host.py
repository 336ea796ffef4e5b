"""The engine's life behind the server: loaded in a thread of its own, which does everything that the engine is asked.

One thread for everything, because torch keeps a pool of OpenMP workers per calling thread, and because the first
request must not wait for an import: `/health` answers while this thread still loads. As many answers as the engine can
write at once (`parallel`) take turns token by token, each with its own adapters; eight wait in order; the ninth is told
to come back.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from glmchat.core.errors import DoesNotFit, Failed, GlmchatError, ServerFailed, UnknownModel
from glmchat.core.fingerprints import State, of_adapter, state_of
from glmchat.core.kv_files import UNNAMED
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.serve.face import EngineFace, Load

WAITING = 8


class Busy(ServerFailed):
    """As many clients wait already as may: HTTP 429."""

    default_code = "server.busy"

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(
            f"the engine is busy and {waiting} requests are waiting already",
            hint=f"try again in {retry_after} seconds",
        )
        self.retry_after = retry_after


class Place:
    """A place in the line: those of number 0 are being served, 1 is next. Leave it in every case."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._moved = asyncio.Event()

    @property
    def number(self) -> int:
        return self._line.number(self)

    def advanced(self) -> None:
        self._moved.set()

    async def turns(self) -> AsyncIterator[int]:
        """The number now and after each move, ending with 0."""
        while True:
            number = self.number
            yield number
            if number == 0:
                return
            await self._moved.wait()
            self._moved.clear()

    def leave(self) -> None:
        """Make room; whoever waits behind moves up. Harmless when called twice."""
        self._line.leave(self)


class Line:
    """All calls come from the event loop's thread. parallel: how many are served at once."""

    def __init__(self, waiting: int = WAITING, parallel: int = 1) -> None:
        self.parallel = parallel
        self._places: deque[Place] = deque()
        self._waiting = waiting
        self._first_since = time.monotonic()  # when somebody came into an empty line
        self.seconds_per_turn = 0.0  # a running mean, for Retry-After

    def __len__(self) -> int:
        return len(self._places)

    def join(self) -> Place:
        """The next place. Raises Busy where all are taken."""
        if len(self._places) >= self._waiting + self.parallel:
            raise Busy(self._waiting, self.seconds_until_free())
        if not self._places:
            self._first_since = time.monotonic()
        place = Place(self)
        self._places.append(place)
        return place

    def number(self, place: Place) -> int:
        return max(0, self._places.index(place) - self.parallel + 1)

    def leave(self, place: Place) -> None:
        if place not in self._places:
            return
        self._places.remove(place)
        for other in self._places:
            other.advanced()

    def seconds_until_free(self) -> int:
        """When everybody who waits now has been served, as far as can be known: each of those who are refused together
        finds a place then. Before the first turn is over, that one's time so far is all there is.
        """
        turn = self.seconds_per_turn or time.monotonic() - self._first_since
        return max(1, math.ceil(turn * len(self._places) / self.parallel))

    def took(self, seconds: float) -> None:
        self.seconds_per_turn += (0.3 if self.seconds_per_turn else 1.0) * (seconds - self.seconds_per_turn)


log = logging.getLogger("glmchat.serve")
T = TypeVar("T")


class Beside:
    """Work that needs no turn and is done beside an answer: reading bodies, rendering, counting.

    There are two lines, so that what takes milliseconds never stands behind what takes seconds (a book to count, a
    schema of 100 kB). In the second one WAITING wait, as before the engine. The first one is several wide: a short
    text may take seconds too, for a process that tries whether a vocabulary's expressions get through it.
    """

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(4, "short")
        self._long = ThreadPoolExecutor(1, "long")
        self._waiting = 0
        self._closed = False

    async def do(self, work: Callable[[], T], *, long: bool = False) -> T:
        """Raises Busy where too much waits that is long, and whatever `work` raises."""
        if self._closed:
            raise ServerFailed(tr("the server is shutting down"), hint=tr("start it again"), code="server.stopping")
        loop, work = asyncio.get_running_loop(), partial(contextvars.copy_context().run, work)  # the client's language
        if not long:
            return await loop.run_in_executor(self._short, work)
        if self._waiting > WAITING:
            raise Busy(self._waiting, retry_after=1)
        self._waiting += 1
        try:
            return await loop.run_in_executor(self._long, work)
        finally:
            self._waiting -= 1

    def close(self) -> None:
        self._closed = True
        for line in (self._short, self._long):
            line.shutdown(wait=False, cancel_futures=True)


@dataclass
class Counts:
    """What was done since the start, for whoever watches a server. Written in the engine's thread."""

    answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these: not computed, since a cache held them
    disk_tokens: int = 0  # of these: a cache on the disk
    disk_seconds_saved: float = 0.0
    answer_tokens: int = 0
    prompt_seconds: float = 0.0
    answer_seconds: float = 0.0

    def add(self, facts: Mapping[str, Any]) -> None:
        """An answer that is over, by the facts of its last chunk."""
        self.answers += 1
        self.prompt_tokens += facts.get("prompt_n", 0)
        self.cached_tokens += facts.get("cached_n", 0)
        self.answer_tokens += facts.get("predicted_n", 0)
        if disk := facts.get("disk"):
            self.disk_tokens += disk["ids"]
            self.disk_seconds_saved += disk["saved"]
        self.prompt_seconds += facts.get("prompt_ms", 0.0) / 1000
        self.answer_seconds += facts.get("predicted_ms", 0.0) / 1000


Settle = Callable[[Any, BaseException | None], None]


class Work:
    """Something that is done in the engine's thread, at one go and while no answer is being written."""

    def __init__(self, work: Callable[[], Any], settle: Settle) -> None:
        self._context = contextvars.copy_context()  # the language of who asks
        self._work = work
        self._settle = settle

    def run(self) -> None:
        try:
            value, error = self._context.run(self._work), None
        except BaseException as caught:  # noqa: BLE001 (handed to whoever waits)
            value, error = None, caught
        self._settle(value, error)


class Turn:
    """A request that is being answered: `advance` takes its answers one token further.

    is_over: whether nobody wants it any more; its next step is then its last.
    """

    def __init__(
        self,
        steps: Generator[None, None, Any],
        adapters: Mapping[str, float],
        is_over: Callable[[], bool],
        settle: Settle,
    ) -> None:
        self.adapters = dict(adapters)
        self.is_over = is_over
        self.begun = False
        self._context = contextvars.copy_context()
        self._steps = steps
        self._settle = settle

    def advance(self) -> bool:
        """False when it is over."""
        self.begun = True
        try:
            self._context.run(next, self._steps)
        except StopIteration as end:
            self._settle(end.value, None)
            return False
        except BaseException as caught:  # noqa: BLE001 (handed to whoever waits)
            self._settle(None, caught)
            return False
        return True


class Host:
    """One engine: its state, its thread, the line before it, and the adapters it may be given.

    model, revision, quant: what answers and `/v1/models` say of it. adapters: store name -> folder. keep_prompts:
    caches of all clients may lie on the disk, not only of conversations that a window names.
    """

    def __init__(
        self,
        load: Load,
        model: str,
        *,
        revision: str | None = None,
        quant: str | None = None,
        adapters: Mapping[str, Path] | None = None,
        find_adapter: Callable[[str], Path | None] | None = None,
        sampling: Mapping[str, Any] | None = None,
        waiting: int = WAITING,
        keep_prompts: bool = False,
    ) -> None:
        self._keep_prompts = keep_prompts
        self.model, self.revision, self.quant = model, revision, quant
        self.sampling = dict(sampling or {})
        self.line = Line(waiting)
        self.counts = Counts()
        self.created = int(time.time())
        self.load_ms: float | None = None
        self.stage, self.done = "import", 0.0
        self.error: GlmchatError | None = None
        self.engine: EngineFace | None = None
        self.loaded = threading.Event()  # set once `engine` or `error` is
        self.stopping = threading.Event()
        self.awake = threading.Event()  # cleared while everybody who uses the engine rests
        self.awake.set()
        self.text = Beside()
        self._folders = dict(adapters or {})
        self._find_adapter = find_adapter or (lambda name: None)
        self._attached: dict[str, State] = {}  # name -> its files as they were read
        self.digests: dict[str, str] = {}  # of the adapters that are attached
        self.forced: set[str] = set()  # of these: attached although they name another base
        self._active: dict[str, float] = {}
        self._load = load
        self.writing = 0  # answers, of all clients; counted in the engine's thread
        self._running: list[Turn] = []
        self._jobs: queue.SimpleQueue[Work | Turn | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float = 2.0) -> None:
        """Ask whatever runs to end, and wait for it; a thread that takes longer ends with the process."""
        self.stopping.set()
        self.text.close()
        self._jobs.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _work(self) -> None:
        started = time.perf_counter()
        try:
            self.engine = self._load(self._report)
            self.load_ms = (time.perf_counter() - started) * 1000
            self.line.parallel = self.engine.parallel
            log.info("ready after %.0f ms", self.load_ms)
        except GlmchatError as error:
            log.error("cannot load: %s (%s)", error.message, error.hint)
            self.error = error
        except MemoryError as error:
            log.exception("cannot load")
            self.error = DoesNotFit(
                tr(
                    "memory ran out while the model was being loaded: {error}",
                    error=one_line(str(error)) or "no reason given",
                ),
                hint=tr("try --quant 4, a smaller --context, or close other programs"),
                code="memory",
            )
        except Exception as error:
            log.exception("cannot load")
            self.error = Failed(
                tr(
                    "the model cannot be loaded: {name}: {error}", name=type(error).__name__, error=one_line(str(error))
                ),
                hint=tr("see the engine's log for details (glmchat doctor shows where it is)"),
                code="engine.load",
            )
        self.loaded.set()
        self._serve()
        if self.engine is not None:
            self.engine.close()

    def _serve(self) -> None:
        """Do what is asked, in order, until None is: work alone, answers together."""
        waiting: deque[Work | Turn] = deque()
        while True:
            while not (self._running or waiting) or not self._jobs.empty():
                job = self._jobs.get()
                if job is None:
                    return
                waiting.append(job)
            for turn in [job for job in waiting if isinstance(job, Turn) and job.is_over()]:
                waiting.remove(turn)
                turn.advance()
            while waiting and (not self._running or self._may_join(waiting[0])):
                match waiting.popleft():
                    case Work() as work:
                        work.run()
                    case joining:
                        self._running.append(joining)
            self._advance()

    def _may_join(self, job: Work | Turn) -> bool:
        if not (self.has_room and isinstance(job, Turn)):
            return False
        return self.ready().mixes_adapters or job.adapters == self._running[0].adapters

    @property
    def running(self) -> int:
        """How many requests are being answered; others of the line wait."""
        return len(self._running)

    @property
    def has_room(self) -> bool:
        """Whether one more answer may be written beside those that are, and those about to begin. In the engine's
        thread.
        """
        begin = sum(not turn.begun for turn in self._running)
        return self.writing + begin < self.line.parallel

    def _advance(self) -> None:
        """Each turn by a token, which one step computes for all where the engine can.

        Where that step fails each computes its own token, so that one for which there is no memory ends alone.
        """
        try:
            if self.writing > 1:
                self.ready().step()
        except Exception as error:  # noqa: BLE001 (whoever cannot go on alone says why)
            log.warning("answers are computed one by one: %s", one_line(f"{type(error).__name__}: {error}"))
        self._running = [turn for turn in self._running if turn.advance()]

    def conversation(self, name: str | None) -> str | None:
        """Under which name the engine may keep what it computes: None for nothing, UNNAMED where it finds one."""
        return UNNAMED if name is None and self._keep_prompts else name

    def left(self, seconds: float = 0.0) -> None:
        """Nobody uses the engine any more: what it keeps is written now. From any thread."""
        if self.engine is not None:
            self.engine.leave(seconds)

    def _report(self, stage: str, done: float) -> None:
        self.stage, self.done = stage, max(0.0, min(1.0, done))

    def ready(self) -> EngineFace:
        """The engine, or the reason why there is none: it still loads (503), or it could not be loaded (500)."""
        if self.error:
            raise self.error
        if self.engine is None:
            raise StillLoading(self.stage, self.done)
        return self.engine

    async def call(self, work: Callable[[], T]) -> T:
        """Run `work` in the engine's thread, alone, behind whatever runs and waits there."""
        answer: T = await self._ask(lambda settle: Work(work, settle))
        return answer

    async def write(
        self, steps: Generator[None, None, T], adapters: Mapping[str, float], is_over: Callable[[], bool]
    ) -> T:
        """Let these steps of an answer take turns with those of others; what they return at their end.

        is_over: asked while they wait for others; where it is true their first step is taken at once, and must end.
        """
        answer: T = await self._ask(lambda settle: Turn(steps, adapters, is_over, settle))
        return answer

    async def _ask(self, make: Callable[[Settle], Work | Turn]) -> Any:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()

        def settle(value: Any, error: BaseException | None) -> None:
            if not answer.cancelled():
                answer.set_exception(error) if error else answer.set_result(value)

        def from_engine(value: Any, error: BaseException | None) -> None:
            try:
                loop.call_soon_threadsafe(settle, value, error)
            except RuntimeError:  # the loop has ended: the process is about to
                log.debug("nobody waits any more")

        self._jobs.put(make(from_engine))
        return await answer

    # Adapters. `adapters()` is asked from the event loop; the rest runs in the engine's thread.

    def adapters(self) -> list[str]:
        return sorted(name for name in {*self._folders, *self._attached} if self.has_adapter(name))

    def has_adapter(self, name: str) -> bool:
        return self._folder(name) is not None

    def _folder(self, name: str) -> Path | None:
        """Where the adapter lies now; the store is asked anew, since adapters come and go while the engine runs."""
        folder = self._folders.get(name)
        return folder if folder is not None and folder.exists() else self._find_adapter(name)

    def folders(self, adapters: Mapping[str, float]) -> list[Path]:
        """Where those lie that are to be active, for whoever renders for them before they are."""
        return [folder for name, weight in adapters.items() if weight and (folder := self._folder(name)) is not None]

    def attach(self, name: str) -> None:
        """Attach by store name what lies there now. Raises UnknownModel for a name that the store does not know.

        An adapter whose files were replaced under its name is read again.
        """
        folder = self._folder(name)
        if folder is None:
            raise UnknownModel(
                tr("there is no adapter {name} in the store", name=one_line(repr(name), 80)),
                hint="glmchat adapters list; adapters are named, never given as a path",
                code="adapter.unknown",
            )
        state = state_of(folder)
        if self._attached.get(name) == state:
            return
        adapter = self.ready().attach(folder, name)
        self._attached[name] = state
        self._active.pop(name, None)  # what was active under this name were other numbers
        self.forced.discard(name)
        if getattr(adapter, "forced", False):
            self.forced.add(name)
        self.digests.pop(name, None)
        with suppress(OSError):  # taken away meanwhile: what is not known is not told
            self.digests[name] = of_adapter(folder)
        self._folders[name] = folder

    def facts_of(self, adapters: Mapping[str, float]) -> dict[str, Any]:
        """What an answer that begins with these, which are active now, tells of them at its end."""
        told = self.ready().facts()
        return {
            **{name: told[name] for name in OF_ADAPTERS if name in told},
            "adapters": [
                {"name": n, "scale": s, **({"forced": True} if n in self.forced else {})} for n, s in adapters.items()
            ],
            "adapter_hashes": {name: self.digests.get(name) for name in adapters},
        }

    def detach(self, name: str) -> None:
        if name not in self._attached:
            raise UnknownModel(
                tr("the adapter {name} is not loaded", name=one_line(repr(name), 80)),
                hint=tr("GET /v1/models lists the loaded ones"),
                code="adapter.unknown",
            )
        self.ready().detach(name)
        del self._attached[name]
        self._active.pop(name, None)

    def activate(self, adapters: Mapping[str, float]) -> None:
        """Make exactly these active for answers that begin now; they are attached first if need be, and what left the
        store is forgotten."""
        for name in [name for name in self._attached if not self.has_adapter(name)]:
            self.detach(name)
        for name in adapters:
            self.attach(name)
        if dict(adapters) != self._active:
            self.ready().activate(dict(adapters))
            self._active = dict(adapters)


OF_ADAPTERS = ("template", "kernel")  # what an engine tells of itself that moves with its adapters


class StillLoading(ServerFailed):
    default_code = "server.loading"

    def __init__(self, stage: str, done: float) -> None:
        super().__init__(
            f"the model is still loading ({stage}, {done:.0%})", hint="ask /health, or try again in a second"
        )
        self.stage, self.done = stage, done
