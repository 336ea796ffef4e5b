"""Which process something belongs to, told apart from another one that later got its number."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path

from glmchat.core.files import read_text


@cache
def this_machine() -> str:
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
    """`host/boot pid start`: what an owner writes down."""
    return f"{this_machine()} {os.getpid()} {_start(os.getpid())}"


def pid_of(owner: str | None) -> int | None:
    """Its number, where it is a living process of this machine."""
    return int((owner or "").rpartition(" ")[0].rpartition(" ")[2]) if is_alive(owner) else None


def is_alive(owner: str | None) -> bool | None:
    """True or False for a process of this machine; None for one of another machine, which cannot be asked."""
    machine, _, rest = (owner or "").partition(" ")
    pid, _, start = rest.partition(" ")
    if not pid.isdecimal():
        return False
    if machine != this_machine():
        # The same host after a restart: all its processes are gone.
        return False if machine.partition("/")[0] == this_machine().partition("/")[0] else None
    return _start(int(pid)) == start


def machine_of(owner: str) -> str | None:
    """The name of another machine; None for this one."""
    machine = owner.partition(" ")[0]
    return None if machine == this_machine() else machine.partition("/")[0]
