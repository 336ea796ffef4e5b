"""The one mouth: data to stdout, talk to stderr. Nothing else in glmchat prints.

Off a terminal there are no colours, no spinners and no cursor movement. On one, every text from outside has its
control sequences shown, not obeyed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from typing import IO, Any, Protocol

from glmchat.core import typed_ahead
from glmchat.core.errors import FULL, DoesNotFit, Failed, GlmchatError, Usage
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line, show_controls


def is_terminal(stream: IO[str] | None) -> bool:
    """A stream that a person looks at. A closed or missing stream is none."""
    try:
        return stream is not None and not stream.closed and stream.isatty()
    except (ValueError, OSError):
        return False


def interactive() -> bool:
    """True if a question can be asked and answered: stdin and stderr are terminals."""
    return is_terminal(sys.stdin) and is_terminal(sys.stderr)


def _write(stream: IO[str] | None, text: str) -> None:
    """Raises BrokenPipeError where the reader has gone, DoesNotFit where the disk is full, Failed for the rest."""
    if stream is None or stream.closed:
        return
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        discard(stream)
        raise
    except OSError as error:
        discard(stream)
        kind = DoesNotFit if error.errno in FULL else Failed
        raise kind(
            tr("the output cannot be written: {reason}", reason=error.strerror or str(error)),
            hint=tr("free some space on that disk, or send the output elsewhere"),
            code="output.write",
        ) from None


def discard(stream: IO[str]) -> None:
    """Let what `stream` still holds, and all that follows, go nowhere: the interpreter's flush at exit would fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def data(text: str, end: str = "\n") -> None:
    """What was asked for, on stdout: verbatim into a pipe, control sequences shown on a terminal."""
    _write(sys.stdout, (show_controls(text) if is_terminal(sys.stdout) else text) + end)


def marked(prefix: str, text: str, spans: Sequence[tuple[int, int]]) -> None:
    """One line of data with parts of `text` set off: bold on a terminal, plain elsewhere and under NO_COLOR."""
    shines = is_terminal(sys.stdout) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    parts, at = [one_line(prefix)], 0
    for start, end in spans if shines else ():
        parts += [one_line(text[at:start], 4000), "\x1b[1m", one_line(text[start:end], 4000), "\x1b[22m"]
        at = end
    _write(sys.stdout, "".join([*parts, one_line(text[at:], 4000)]) + "\n")


def json_line(value: Any) -> None:
    """One JSON object or array on one line of stdout."""
    _write(sys.stdout, json.dumps(value, ensure_ascii=False, default=str) + "\n")


def say(text: str, end: str = "\n") -> None:
    """A sentence for the person, on stderr. A stderr that is gone (a closed pipe) is no reason to fail."""
    with suppress(GlmchatError, OSError, ValueError):
        _write(sys.stderr, show_controls(text) + end)


def prose(text: str, stream: IO[str] | None) -> list[str]:
    """The lines of what is read and not copied: on a terminal a sentence is broken between words. What is set in from
    the left is a picture or a row of tokens, and stays as it is.
    """
    if text.startswith(" ") or not is_terminal(stream):
        return [text]
    from rich.console import Console
    from rich.text import Text

    width = shutil.get_terminal_size().columns
    return [line.plain.rstrip() for line in Text(text).wrap(Console(width=width), width)] or [""]


def error(problem: GlmchatError, *, as_json: bool = False) -> None:
    """A failure in words: one line and a hint on stderr; with `--json` also the last line of stdout."""
    if as_json:
        with suppress(GlmchatError, BrokenPipeError):  # it may be stdout itself that failed
            json_line({"event": "error", **problem.to_json()})
    say(f"glmchat: {one_line(problem.message, 2000)}")
    if problem.hint:
        say(f"  {tr('hint')}: {one_line(problem.hint, 2000)}")


def _typed() -> str:
    """A line from a person, who sees what is typed."""
    typed_ahead.release()
    return sys.stdin.readline()


def confirm(question: str, *, assume_yes: bool = False) -> bool:
    """Ask on the terminal. Without one it is an error, not a hang. Raises Usage (exit 2)."""
    if assume_yes:
        return True
    if not interactive():
        raise Usage(
            tr("this question can only be answered in a terminal: {question}", question=question),
            hint=tr("add --yes to agree in advance"),
            code="question.no_terminal",
        )
    say(f"{question} [y/N] ", end="")
    return _typed().strip().lower() in ("y", "yes", "是", "好")


def agree(question: str) -> bool:
    """Ask on the terminal something that is usually meant: Enter is a yes. The end of the input is none."""
    say(f"{question} [Y/n] ", end="")
    typed = _typed()
    return bool(typed) and typed.strip().lower() in ("", "y", "yes", "是", "好")


def choose(question: str, options: Sequence[str]) -> int:
    """A numbered list on the terminal; returns the index chosen. Raises Usage without a terminal or a valid number."""
    if not interactive():
        raise Usage(
            tr("this question can only be answered in a terminal: {question}", question=question),
            hint=tr("name it on the command line"),
            code="question.no_terminal",
        )
    for number, option in enumerate(options, 1):
        say(f"  {number}  {one_line(option)}")
    say(f"{question} ", end="")
    answer = _typed().strip()
    if answer.isdecimal() and 1 <= int(answer) <= len(options):
        return int(answer) - 1
    raise Usage(tr("nothing was selected"), hint=tr("give a number from the list"), code="question.unanswered")


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, right: Iterable[int] = ()) -> None:
    """Columns for people on stdout; a Chinese character is two wide. `right`: indexes of right-aligned columns."""
    from rich.cells import cell_len

    lines = [list(columns), *([one_line("" if cell is None else str(cell)) for cell in row] for row in rows)]
    widths = [max(cell_len(line[i]) for line in lines) for i in range(len(columns))]
    aligned_right = frozenset(right)
    for line in lines:
        cells = []
        for index, cell in enumerate(line):
            space = " " * (widths[index] - cell_len(cell))
            cells.append(space + cell if index in aligned_right else cell + space)
        data("  ".join(cells).rstrip())


class Meter(Protocol):
    """A progress display: absolute numbers, so that nothing is counted twice."""

    def update(self, label: str, done: int, total: int | None) -> None: ...


class _PlainMeter:
    """Off a terminal: a line every five seconds and one at the end of each label."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._last: dict[str, float] = {}

    def update(self, label: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        finished = total is not None and done >= total
        if (now - self._last.get(label, -10.0) < 5 and not finished) or self._last.get(label) == float("inf"):
            return
        self._last[label] = float("inf") if finished else now
        amount = human_bytes(done) if self._unit == "bytes" else str(done)
        of = "" if total is None else f" / {human_bytes(total) if self._unit == 'bytes' else total}"
        percent = f" {100 * done / total:.0f}%" if total else ""
        say(f"{one_line(label)}: {amount}{of}{percent}")


class _RichMeter:
    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def update(self, label: str, done: int, total: int | None) -> None:
        from rich.markup import escape

        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(escape(one_line(label, 44)), total=total, completed=done)
        self._progress.update(self._tasks[label], completed=done, total=total)


def wait(why: str, seconds: float) -> None:
    """Sit out the time that a hub asks to be left alone for, and say so."""
    say(tr("{why}: waiting for {n} seconds", why=why, n=round(seconds)) if seconds else why)
    time.sleep(seconds)


@contextmanager
def progress(unit: str = "bytes", *, passing: bool = False) -> Iterator[Meter]:
    """A progress display on stderr: bars on a terminal, plain lines elsewhere. `unit` is "bytes" or "steps".

    passing: the bars go when it is over.
    """
    if not is_terminal(sys.stderr) or os.environ.get("TERM") == "dumb":
        yield _PlainMeter(unit)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amounts: list[ProgressColumn] = (
        [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn()]
    )
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *amounts,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=passing,
    ) as bars:
        yield _RichMeter(bars)


Printer = Callable[[Mapping[str, Any]], None]


@contextmanager
def printed_events(*, as_json: bool, quiet: bool, unit: str = "bytes") -> Iterator[Printer]:
    """A function that prints events: for people their words and bars, for programs the rest. unit: of the bars, "bytes"
    or "steps"."""
    with nullcontext(None) if as_json or quiet else progress(unit) as meter:

        def show(event: Mapping[str, Any]) -> None:
            if event["event"] == "say":
                say(event["text"])
            elif event["event"] == "meter":
                if meter is not None:
                    meter.update(event["label"], event["done"], event["total"])
            elif as_json:
                json_line({name: value for name, value in event.items() if name != "words"})
            else:
                for line in event.get("words", ()):
                    say(line)

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
