"""One generation at a time; eight wait in order; the ninth is told to come back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from glmchat.core.errors import ServerFailed

WAITING = 8


class Busy(ServerFailed):
    """Nine clients are being served or wait already: HTTP 429."""

    default_code = "server.busy"

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(
            f"the engine is busy and {waiting} requests are waiting already",
            hint=f"try again in {retry_after} seconds",
        )
        self.retry_after = retry_after


class Place:
    """A place in the line: 0 is being served, 1 is next. Leave it in every case."""

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
    """All calls come from the event loop's thread."""

    def __init__(self, waiting: int = WAITING) -> None:
        self._places: deque[Place] = deque()
        self._waiting = waiting
        self.seconds_per_turn = 10.0  # a running mean, for Retry-After

    def __len__(self) -> int:
        return len(self._places)

    def join(self) -> Place:
        """The next place. Raises Busy where all are taken."""
        if len(self._places) > self._waiting:
            raise Busy(self._waiting, max(1, min(120, round(self.seconds_per_turn))))
        place = Place(self)
        self._places.append(place)
        return place

    def number(self, place: Place) -> int:
        return self._places.index(place)

    def leave(self, place: Place) -> None:
        if place not in self._places:
            return
        self._places.remove(place)
        for other in self._places:
            other.advanced()

    def took(self, seconds: float) -> None:
        self.seconds_per_turn += 0.3 * (seconds - self.seconds_per_turn)
