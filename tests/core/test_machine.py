"""What the machine gives a process: the limits of its cgroup count, in both of the forms that kernels write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from glmchat.core import machine

if not sys.platform.startswith("linux"):
    pytest.skip("cgroups are Linux's", allow_module_level=True)

V2 = {
    "cpu.max": "150000 100000",
    "memory.max": "10000000",
    "memory.current": "4000000",
    "memory.stat": "anon 3\ninactive_file 700000\nactive_file 300000\n",
    "memory.events": "oom 5\noom_kill 3\n",
}
V1 = {
    "cpu.cfs_quota_us": "150000",
    "cpu.cfs_period_us": "100000",
    "memory.limit_in_bytes": "10000000",
    "memory.usage_in_bytes": "4000000",
    "memory.stat": "inactive_file 1\ntotal_inactive_file 700000\ntotal_active_file 300000\n",
    "memory.oom_control": "oom_kill_disable 0\noom_kill 3\n",
}
FREE = {"cpu.max": "max 100000", "memory.max": "max"}


def seen(root: Path, question: str, membership: str) -> str:
    """What a fresh process with the cgroups of that folder answers. membership: its line of /proc/self/cgroup."""
    code = (
        "from pathlib import Path\nfrom glmchat.core import machine\n"
        f"read = Path.read_text\nmachine.CGROUPS = Path({str(root)!r})\n"
        f"own = {membership!r}\n"
        "Path.read_text = lambda path, **how: own if str(path) == '/proc/self/cgroup' else read(path, **how)\n"
        f"print(machine.{question}())"
    )
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, check=True, timeout=300).stdout.strip()


@pytest.mark.parametrize("version", [2, 1])
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("cpu_quota", "1.5"),
        ("physical_cores", "1"),
        ("memory_limit", "10000000"),
        ("available_memory", "7000000"),  # page cache is given back
        ("oom_kills", "3"),
    ],
)
def test_a_limit_of_the_cgroup_or_of_one_above_it_counts(
    tmp_path: Path, version: int, question: str, answer: str
) -> None:
    controller = "cpu" if question in ("cpu_quota", "physical_cores") else "memory"
    above = tmp_path if version == 2 else tmp_path / controller
    own = above / "service"
    own.mkdir(parents=True)
    for name, text in (V2 if version == 2 else V1).items():
        (above / name).write_text(text)
    membership = "0::/service\n" if version == 2 else f"4:{controller}:/service\n"
    assert seen(tmp_path, question, membership) == answer


@pytest.mark.parametrize("question", ["cpu_quota", "memory_limit", "oom_kills"])
@pytest.mark.parametrize("files", [{}, FREE], ids=["no files", "no limits"])
def test_without_a_limit_there_is_none(tmp_path: Path, question: str, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert seen(tmp_path, question, "0::/\n") == "None"


def test_a_path_of_the_host_that_leads_outside_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "memory.max").write_text("5")
    root = tmp_path / "cgroup"
    root.mkdir()
    assert seen(root, "memory_limit", "0::/../secret\n") == "None"


def test_there_is_a_core_and_not_more_memory_than_the_machine_has() -> None:
    assert 1 <= machine.physical_cores() <= (psutil.cpu_count() or 1)
    available = machine.available_memory()
    assert available is not None and 0 < available <= psutil.virtual_memory().total
