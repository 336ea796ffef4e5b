"""Who is writing an answer: the process that owns it, told apart from another one that later got its number."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from pathlib import Path

from glmchat.chat.history import database
from glmchat.chat.history.rows import to_message
from glmchat.chat.history.store import Store
from glmchat.core.files import read_text

FOREIGN_OWNER_SECONDS = 600.0  # a writer on another machine cannot be asked; it counts as alive this long
BEAT_SECONDS = 10.0  # a writer adds something to its answer at least so often, be it an empty piece
SILENT_SECONDS = 60.0  # one on another machine that was seen to add nothing for so long is gone
Heard = dict[
    int, tuple[int, float]
]  # answer of such a writer -> its pieces, and since when (monotonic) there are so many


@cache
def _machine() -> str:
    """This machine since its last start; a home on a network is shared by several."""
    try:
        boot = read_text(Path("/proc/sys/kernel/random/boot_id")).strip()
    except OSError:
        boot = "-"
    return f"{socket.gethostname()}/{boot}"


def _start(pid: int) -> str | None:
    """When a process started, in a form that a change of the clock does not alter; None if there is none."""
    try:
        # Field 22 of /proc/PID/stat: clock ticks since boot. The name in field 2 may hold spaces and brackets.
        fields = read_text(Path(f"/proc/{pid}/stat"), errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        pass
    import psutil

    try:
        return f"{psutil.Process(pid).create_time():.2f}"
    except psutil.Error:
        return None


def this_process() -> str:
    return f"{_machine()} {os.getpid()} {_start(os.getpid())}"


def pid_of(owner: str | None) -> int | None:
    """Its number, where it is a living process of this machine."""
    return int((owner or "").rpartition(" ")[0].rpartition(" ")[2]) if is_alive(owner) else None


def is_alive(owner: str | None) -> bool | None:
    """True or False for a process of this machine; None for one of another machine, which cannot be asked."""
    machine, _, rest = (owner or "").partition(" ")
    pid, _, start = rest.partition(" ")
    if not pid.isdecimal():
        return False
    if machine != _machine():
        # The same host after a restart: all its processes are gone.
        return False if machine.partition("/")[0] == _machine().partition("/")[0] else None
    return _start(int(pid)) == start


def machine_of(owner: str) -> str | None:
    """The name of another machine; None for this one."""
    machine = owner.partition(" ")[0]
    return None if machine == _machine() else machine.partition("/")[0]


def writer_elsewhere(store: Store, conversation: int, heard: Heard) -> str | None:
    """The other living process that streams an answer in this conversation now, as `host pid start`.

    heard: what earlier looks saw of writers on other machines. One that fell silent is gone: its answer is marked.
    """
    living = None
    for message, owner, pieces in store.rows(database.STREAM_OWNERS, (conversation,)):
        alive = owner != this_process() and is_alive(owner)
        if alive is None:
            before, since = heard.get(message, (-1, 0.0))
            heard[message] = (pieces, since if pieces == before else time.monotonic())
            alive = time.monotonic() - heard[message][1] < SILENT_SECONDS
            if not alive:
                mark_interrupted(store, gone=(message,))
        living = living or (owner if alive else None)
    return living


def answered_elsewhere(store: Store) -> list[int]:
    """Conversations that other living processes answer now, the last asked first."""
    rows = store.rows(database.ALL_STREAMS)
    return list(dict.fromkeys(int(c) for c, o in rows if o != this_process() and is_alive(o) is not False))


def mark_interrupted(store: Store, gone: Collection[int] = ()) -> int:
    """Answers whose writer is gone keep what was said and are marked; those of living windows are left alone.

    gone: answers whose writers are known to be.
    """
    marked = 0
    for *columns, updated in store.rows(database.STREAMING):
        message = to_message(columns)
        alive = message.id not in gone and is_alive(message.owner)
        if alive is None:
            alive = abs(time.time() - float(updated or 0.0)) < FOREIGN_OWNER_SECONDS
        if not alive:
            whole = replace(store.with_pieces(message), state="interrupted", owner=None)
            marked += store.attempt(lambda whole=whole: store.write_message(whole))  # type: ignore[misc]
    return marked
