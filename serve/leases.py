"""Who uses an engine that several programs share, and when it ends: a lease is a connection that a program holds open.

The kernel closes it however the program dies, so nobody is counted who is gone. A program that is stopped (Ctrl+Z) says
that it rests; while all do, the engine does too.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from glmchat.core.engine_records import EngineRecord
from glmchat.serve.host import Host
from glmchat.serve.render import to_bytes

FIRST_SECONDS = 20.0  # for the program that started the engine to take its lease


@dataclass(slots=True, eq=False)
class Lease:
    """pid: who holds it."""

    number: int
    pid: int
    since: float
    rests: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Leases:
    """All calls come from the event loop. record: forgotten as soon as nobody may join any more."""

    def __init__(self, host: Host, record: EngineRecord) -> None:
        self._host = host
        self._record = record
        self._held: dict[int, Lease] = {}
        self._numbers = itertools.count(1)
        self._changed = time.monotonic()  # when the first or the last came or left
        self._ever = False
        self._closed = False

    def routes(self) -> list[Route]:
        return [
            Route("/lease", self._take),
            Route("/lease/{number:int}/{state}", self._rest, methods=["PUT"]),
            Route("/users", self._users),
        ]

    def over(self) -> bool:
        """True once, and from then on, when nobody has used the engine for as long as it stays."""
        if not self._closed and self._seconds_left() == 0:
            self.close()
        return self._closed

    def close(self) -> None:
        """Nobody can join any more, and who is here is told so by the end of the lease."""
        if not self._closed:
            self._closed = True
            self._record.forget()
        for lease in self._held.values():
            lease.ended.set()

    def _seconds_left(self) -> float | None:
        """None while somebody uses it."""
        if self._held or len(self._host.line):
            return None
        if not self._ever:
            patience = FIRST_SECONDS
        elif not self._host.loaded.is_set() or self._host.error:  # who wanted it does not want it any more
            patience = 0.0
        else:
            patience = self._record.keep_alive
        return max(0.0, patience - (time.monotonic() - self._changed))

    async def _take(self, request: Request) -> Response:
        if self._closed:
            raise HTTPException(503, "the engine ends")
        pid = request.query_params.get("pid", "")
        lease = Lease(next(self._numbers), int(pid) if pid.isdecimal() and len(pid) < 10 else 0, time.time())
        return _Held(self, lease)

    def hold(self, lease: Lease) -> None:
        self._ever = True
        self._held[lease.number] = lease
        self._wake()

    def leave(self, lease: Lease) -> None:
        self._held.pop(lease.number, None)
        self._changed = time.monotonic()
        if not self._held:
            self._host.left()
        self._wake()

    async def _rest(self, request: Request) -> Response:
        lease = self._held.get(request.path_params["number"])
        if lease is None:
            raise HTTPException(404)
        lease.rests = request.path_params["state"] == "rest"
        self._wake()
        return Response(status_code=204)

    def _wake(self) -> None:
        if self._held and all(lease.rests for lease in self._held.values()):
            self._host.awake.clear()
        else:
            self._host.awake.set()

    async def _users(self, request: Request) -> Response:
        users = [{"pid": lease.pid, "since": lease.since, "rests": lease.rests} for lease in self._held.values()]
        state = "failed" if self._host.error else "loading" if self._host.engine is None else "ready"
        body = {
            "users": users,
            "seconds_left": self._seconds_left(),
            "answers": len(self._host.line),
            "state": state,
            "device": self._host.engine.facts().get("device") if self._host.engine else None,
        }
        return Response(to_bytes(body), media_type="application/json")


class _Held(Response):
    """The lease's number in one line, and then nothing until either side ends."""

    def __init__(self, leases: Leases, lease: Lease) -> None:
        super().__init__(None, 200, {"Connection": "close"}, "application/json")
        self._leases, self._lease = leases, lease

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._leases.hold(self._lease)
        try:
            headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            line = to_bytes({"lease": self._lease.number}) + b"\n"
            await send({"type": "http.response.body", "body": line, "more_body": True})
            gone = asyncio.ensure_future(_gone(receive))
            ended = asyncio.ensure_future(self._lease.ended.wait())
            await asyncio.wait((gone, ended), return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            ended.cancel()
            with contextlib.suppress(OSError):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._leases.leave(self._lease)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
