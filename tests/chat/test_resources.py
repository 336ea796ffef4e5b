"""What the status line says of memory: of a process with its children, and nothing of one that is gone."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil

from glmchat.chat.resources import process_memory, total_memory

HOLD = "block = b'x' * 50_000_000; print('here', flush=True); input()"


def test_the_memory_of_a_child_is_counted_with_its_parents_and_a_process_that_is_gone_has_none() -> None:
    before = process_memory(os.getpid())
    command = [sys.executable, "-P", "-c", HOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "here\n"
        alone, together = process_memory(child.pid), process_memory(os.getpid())
        child.communicate("\n")
    assert before is not None and alone is not None and together is not None
    assert alone > 50_000_000
    assert together - before > 0.9 * alone
    assert process_memory(child.pid) is None


def test_the_machine_has_the_memory_that_the_system_says() -> None:
    assert total_memory() == psutil.virtual_memory().total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
