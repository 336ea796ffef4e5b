"""What a job or a download tells, on the terminal: sentences and bars for people, lines of JSON for programs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from typing import Any

from glmchat.cli import output

Printer = Callable[[Mapping[str, Any]], None]


@contextmanager
def printed_events(*, as_json: bool, quiet: bool, unit: str = "bytes") -> Iterator[Printer]:
    """A function that prints events. unit: of its bars, "bytes" or "steps"."""
    with nullcontext(None) if as_json or quiet else output.progress(unit) as meter:

        def show(event: Mapping[str, Any]) -> None:
            if event["event"] == "say":
                output.say(event["text"])
            elif event["event"] == "meter":
                if meter is not None:
                    meter.update(event["label"], event["done"], event["total"])
            elif as_json:
                output.json_line({name: value for name, value in event.items() if name != "words"})

        yield show


def follow_job(events: Generator[dict[str, Any], None, None], show: Printer) -> dict[str, Any]:
    """Show what a job tells until it has ended; returns its result, which is not shown."""
    with closing(events):
        for event in events:
            if event["event"] == "result":
                return {name: value for name, value in event.items() if name != "event"}
            show(event)
    raise AssertionError("a job ends with its result or an error")


@contextmanager
def on_interrupt(act: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls `act`, which must not wait; the second one ends everything. Only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        act()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def cancelled_by_interrupt() -> Iterator[Callable[[], bool]]:
    """What to ask whether Ctrl-C was pressed, for whatever takes a `cancelled`."""
    pressed = threading.Event()
    with on_interrupt(pressed.set):
        yield pressed.is_set
