"""Waits for what is true instead of for time. The one place of the tests that sleeps; tests/house holds them to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
SECONDS = 30.0  # far beyond what a busy machine needs: nobody waits so long unless the test fails


def wait_until(
    holds: Callable[[], T], seconds: float = SECONDS, *, else_: Callable[[], object] = lambda: "waited in vain"
) -> T:
    """The first value of `holds` that is true. When none comes in time the test fails with what `else_` says."""
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, else_()
        time.sleep(0.01)
    return value


async def eventually(
    holds: Callable[[], T], seconds: float = SECONDS, *, else_: Callable[[], object] = lambda: "waited in vain"
) -> T:
    """`wait_until` for a test that shares its thread with the window."""
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < end, else_()
        await asyncio.sleep(0.01)
    return value
