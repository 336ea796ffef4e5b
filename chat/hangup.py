"""When the terminal goes away (SIGHUP: a closed window, a broken SSH line): save and end, or finish the answer first.

With --finish-on-hangup the process carries on without a screen until its answer has ended. It stays the only writer of
its conversation and the engine stays its child; `glmchat attach` follows it through the database. No daemon.

SIGTERM (`kill`) ends an answer in any case, and the process with it, once every word that was shown is written down.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

from glmchat.core.errors import Failed

if TYPE_CHECKING:  # the window draws its first frame before it loads what talks to the engine and the database
    import asyncio

    from glmchat.chat.session import ChatSession

EXIT = 128 + signal.SIGHUP  # what a shell reports of a program that SIGHUP ended
KILLED = 128 + signal.SIGTERM
_POLL = 0.1
_LOOK = 1.0  # seconds between looks at the terminal, for those who hear no signal


class Terminal:
    """The descriptors that are the terminal now; once it is gone nothing could tell them from a file any more."""

    def __init__(self) -> None:
        self._descriptors = [fd for fd in (0, 1, 2) if _is_terminal(fd)]
        self.gone = False

    @property
    def is_hung_up(self) -> bool:
        """Whether the other side has closed it. A program whose controlling terminal it is not, hears no SIGHUP."""
        poll = select.poll()
        for descriptor in self._descriptors:
            poll.register(descriptor, 0)
        return bool(poll.poll(0))

    def let_go(self) -> None:
        """Standard input ends, what would go to the screen goes nowhere, and further SIGHUPs are not heard.

        A pipe or a file in place of the terminal stays. Called in a signal handler: only what cannot fail half-way.
        """
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self.gone = True
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in self._descriptors:
            os.dup2(null, descriptor)
        os.close(null)

    def to_log(self, sentence: str) -> None:
        """What is still said goes to a log of this process's own, after one sentence that says why."""
        from glmchat.chat.engine_process import new_log

        with suppress(Failed, OSError):  # without a log the answer is finished all the same
            _, log = new_log("chat")
            with log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}\n".encode())
                for descriptor in self._descriptors:
                    if descriptor:
                        os.dup2(log.fileno(), descriptor)


def _is_terminal(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor)
    except OSError:
        return False


def is_heard() -> bool:
    """False under nohup, which means that the terminal may go away without anything happening."""
    return signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


def watch(
    loop: asyncio.AbstractEventLoop, terminal: Terminal, hang_up: Callable[[], None], terminate: Callable[[], None]
) -> None:
    """Have these called in the loop's own thread: when the terminal goes away, and at SIGTERM.

    Outside the main thread: nothing.
    """

    def look() -> None:
        if terminal.is_hung_up:
            hang_up()
        else:
            loop.call_later(_LOOK, look)

    if threading.current_thread() is not threading.main_thread():
        return
    if is_heard():
        loop.add_signal_handler(signal.SIGHUP, hang_up)
    look()
    loop.add_signal_handler(signal.SIGTERM, terminate)


def goes_on(session: ChatSession | None, finish_answer: bool) -> bool:
    """True if there is an answer to finish without a screen. One that nobody could read later is not worth it."""
    return finish_answer and session is not None and session.streaming and session.history.path is not None


def finish(sessions: Sequence[ChatSession]) -> None:
    """Wait until the running answers have ended; their own threads write them down. Raises SystemExit after SIGTERM."""
    with ending_on_kill(sessions):
        while any(session.streaming for session in sessions):
            time.sleep(_POLL)


@contextmanager
def ending_on_kill(sessions: Sequence[ChatSession]) -> Iterator[None]:
    """SIGTERM stops the answers; when the body is through, and they are written down, SystemExit follows.

    A second one ends at once. Not for the time at a prompt: nothing is lost there, and `input` may not hear a signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    killed = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal killed
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        killed = True
        if not any(session.streaming for session in sessions):
            sys.exit(KILLED)  # before the first word or after the last
        for session in sessions:
            session.stop()

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if killed:
            sys.exit(KILLED)


@contextmanager
def listening(session: ChatSession, *, finish_answer: bool) -> Iterator[Terminal]:
    """For programs that talk in lines. The answer is stopped and kept, or finished; the next read finds the end.

    `gone` of the terminal that is yielded says afterwards whether it went away.
    """
    terminal = Terminal()
    if not is_heard() or threading.current_thread() is not threading.main_thread():
        yield terminal
        return

    def hang_up(number: int, frame: FrameType | None) -> None:
        terminal.let_go()
        if goes_on(session, finish_answer):
            terminal.to_log(f"the terminal is gone; conversation {session.tree.conversation.id} is answered to the end")
        else:
            session.stop()

    before = signal.signal(signal.SIGHUP, hang_up)
    try:
        yield terminal
    finally:
        if not terminal.gone:
            signal.signal(signal.SIGHUP, before)
