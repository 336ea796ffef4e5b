"""A stopped program's children rest with it, go on with it, and never outlive it at rest."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from polling import wait_until

CHILD = """
import sys
from glmchat.core.job_control import wake_when_orphaned
wake_when_orphaned()
print("up", flush=True)
sys.stdin.read()
"""
PARENT = f"""
import subprocess, sys, threading
from glmchat.core.job_control import rests_with_us
child = subprocess.Popen([sys.executable, "-P", "-c", {CHILD!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                         start_new_session=True)
child.stdout.readline()
rests_with_us(child)
print(child.pid, flush=True)
threading.Event().wait()
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere an engine goes on")


@pytest.fixture
def family() -> Iterator[tuple[psutil.Process, psutil.Process]]:
    """A program and its child, both running."""
    # In a process group of its own: the kernel stops nobody in a group whose starter is gone, as ours may be.
    program = subprocess.Popen(
        [sys.executable, "-P", "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd="/", process_group=0
    )
    assert program.stdout is not None
    child = psutil.Process(int(program.stdout.readline()))
    yield psutil.Process(program.pid), child
    program.kill()
    program.wait()
    program.stdout.close()


def rests(process: psutil.Process) -> bool:
    return process.status() == psutil.STATUS_STOPPED


def test_a_child_is_stopped_and_goes_on_with_its_parent(family: tuple[psutil.Process, psutil.Process]) -> None:
    parent, child = family
    for _ in range(2):
        parent.send_signal(signal.SIGTSTP)
        wait_until(lambda: rests(parent) and rests(child))
        parent.send_signal(signal.SIGCONT)
        wait_until(lambda: not rests(parent) and not rests(child))


def test_a_child_at_rest_ends_when_its_parent_is_killed(family: tuple[psutil.Process, psutil.Process]) -> None:
    parent, child = family
    parent.send_signal(signal.SIGTSTP)
    wait_until(lambda: rests(parent) and rests(child))
    parent.kill()
    wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
