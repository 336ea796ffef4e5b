"""Job control: when this program is stopped (Ctrl+Z, SIGTSTP), its engine and its jobs rest too, and go on with it.

They are in sessions of their own, where no terminal reaches them, so a stopped window would leave an engine at full
speed. SIGSTOP cannot be caught: a program that is stopped by it leaves them running, as before.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any
from weakref import WeakSet

Handler = Callable[[int, FrameType | None], Any]


class Rests(ABC):
    """Something that works for us elsewhere and can be told to rest. Called in a signal handler."""

    @abstractmethod
    def rest(self) -> None: ...

    @abstractmethod
    def wake(self) -> None: ...


_children: WeakSet[subprocess.Popen[Any] | Rests] = WeakSet()
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def rests_with_us(child: subprocess.Popen[Any] | Rests) -> None:
    """Stop this child whenever we are stopped. It must have called `wake_when_orphaned`, or it could rest for ever."""
    _children.add(child)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
        signal.signal(signal.SIGTSTP, _stop)


def rest_around(handler: Handler) -> Handler:
    """The same handler of SIGTSTP, which stops this process before it returns, with the children at rest meanwhile."""

    def stop(number: int, frame: FrameType | None) -> None:
        _tell(signal.SIGSTOP)
        try:
            handler(number, frame)
        finally:
            _tell(signal.SIGCONT)

    return stop


def _default(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTSTP)  # returns when we go on
    signal.signal(signal.SIGTSTP, _stop)


_stop = rest_around(_default)


def _tell(what: signal.Signals) -> None:
    if sys.platform != "linux":  # elsewhere nothing would wake them after our death
        return
    for child in list(_children):
        if isinstance(child, Rests):
            child.rest() if what == signal.SIGSTOP else child.wake()
        elif child.returncode is None:  # not reaped, so the number is still this child's
            with suppress(ProcessLookupError):
                os.kill(child.pid, what)


def wake_when_orphaned() -> None:
    """In a child: go on when the parent dies, so that one that rests notices the end of its stdin and ends too."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGCONT)
