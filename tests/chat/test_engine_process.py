"""The engine as a child: started, watched, stopped; never an orphan, and never a riddle when it dies."""

from __future__ import annotations

import itertools
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_server import fake_command
from polling import wait_until

from glmchat.chat import engine_process
from glmchat.chat.engine_process import (
    RunningEngine,
    engine_environment,
    last_words,
    process_memory,
    total_memory,
)
from glmchat.chat.shared_engine import start_engine
from glmchat.core import locations
from glmchat.core.engine_options import EngineOptions
from glmchat.core.errors import Damaged, DoesNotFit, EngineDied, Interrupted
from glmchat.core.messages import Finished, Message, Piece, Sampling

TESTS = Path(__file__).resolve().parent.parent
HELLO = [Message("user", "hi")]
Start = Callable[..., RunningEngine]

HOLD = "block = b'x' * 50_000_000; print('here', flush=True); input()"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[RunningEngine] = []

    def begin(*, wait: bool = True, **behaviour: Any) -> RunningEngine:
        process = start_engine(EngineOptions(tmp_path, "fake"), command=fake_command(**behaviour))
        started.append(process)
        if wait:
            process.wait_ready()
        return process

    yield begin
    for process in started:
        process.stop()
        assert not process.alive


def wait_gone(pid: int) -> None:
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def said(process: RunningEngine) -> str:
    return "".join(e.text for e in process.endpoint.stream(HELLO, Sampling()) if isinstance(e, Piece))


def test_it_loads_visibly_answers_and_leaves_nothing_behind(start: Start) -> None:
    seen: list[tuple[str, float]] = []
    process = start(wait=False, seconds_to_load=0.6)
    process.wait_ready(lambda stage, done: seen.append((stage, done)))
    assert said(process) == "one two"
    stages = list(dict.fromkeys(stage for stage, _ in seen))
    assert stages[0] == "start" and "weights" in stages and seen == sorted(seen, key=lambda s: stages.index(s[0]))
    assert stat.S_IMODE(process.socket_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(process.log_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(process.log_file.parent.stat().st_mode) == 0o700
    process.stop()
    assert not process.alive and not process.socket_path.exists()
    assert process.failure() is None, "what we stopped did not fail"


def test_it_is_out_of_reach_of_ctrl_c_on_the_terminal(start: Start) -> None:
    process = start()
    assert os.getsid(process.pid) == process.pid != os.getsid(0)


def test_an_engine_whose_file_was_cut_while_it_was_mapped_says_that_the_file_is_damaged(start: Start) -> None:
    process = start(pieces=["x"], repeat=100_000, seconds_per_token=0.01)
    answer = process.endpoint.stream(HELLO, Sampling())
    next(answer)
    os.kill(process.pid, signal.SIGBUS)
    with pytest.raises(EngineDied):
        list(answer)
    failure = process.failure()
    assert isinstance(failure, Damaged) and "cut or replaced" in failure.message and "verify" in failure.hint


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_engine_is_reported_with_its_cause_and_comes_back(start: Start, how: signal.Signals) -> None:
    process = start(pieces=["x"], repeat=100_000, seconds_per_token=0.01)
    answer = process.endpoint.stream(HELLO, Sampling())
    next(answer)
    os.kill(process.pid, how)
    with pytest.raises(EngineDied):
        list(answer)
    failure = process.failure()
    assert isinstance(failure, EngineDied) and failure.hint
    assert failure.code == {signal.SIGKILL: "engine.killed", signal.SIGSEGV: "engine.signal"}[how]
    assert f"signal {int(how)}" in failure.message
    again = start(pieces=["x", "y", "z"])
    try:
        again.wait_ready()
        events = again.endpoint.stream(HELLO, Sampling(max_tokens=2))
        assert sum(isinstance(e, Piece) for e in events) == 2
    finally:
        again.stop()


def test_a_kill_for_memory_is_told_as_such_where_the_cgroup_counts_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([3, 4])
    monkeypatch.setattr(engine_process, "oom_kills", lambda: next(counts))
    process = start()
    os.kill(process.pid, signal.SIGKILL)
    wait_gone(process.pid)
    failure = wait_until(process.failure)  # a thread of it may be ending still: then nobody can wait for it yet
    assert isinstance(failure, DoesNotFit) and "out of memory" in failure.message


def test_a_kill_while_loading_ends_the_waiting(start: Start) -> None:
    process = start(wait=False, seconds_to_load=60)
    with pytest.raises(EngineDied, match="signal 9"):
        process.wait_ready(lambda stage, done: os.kill(process.pid, signal.SIGKILL) if stage == "import" else None)


def test_what_the_load_raised_arrives_as_it_was(start: Start) -> None:
    error = Damaged("weights are cut", hint="pull again", code="gguf.cut")
    process = start(wait=False, load_failure=error.to_json())
    with pytest.raises(Damaged, match="weights are cut") as raised:
        process.wait_ready()
    assert (raised.value.code, raised.value.hint, raised.value.exit) == ("gguf.cut", "pull again", 3)
    assert not process.alive


def test_an_engine_that_ends_at_once_is_quoted(start: Start) -> None:
    process = start(wait=False, exit_at_start=3)
    with pytest.raises(EngineDied, match="code 3: the fake was told to exit at once") as raised:
        process.wait_ready()
    assert str(process.log_file) in raised.value.hint


def test_waiting_can_be_given_up(start: Start) -> None:
    process = start(wait=False, seconds_to_load=60)
    looks = itertools.count()
    with pytest.raises(Interrupted):
        process.wait_ready(cancelled=lambda: next(looks) > 3)
    assert not process.alive


def test_an_engine_that_hangs_is_stopped_all_the_same(start: Start) -> None:
    process = start()
    os.kill(process.pid, signal.SIGSTOP)
    process.stop()
    assert not process.alive


def test_an_engine_started_by_a_thread_outlives_the_thread(start: Start) -> None:
    found: list[RunningEngine] = []
    thread = threading.Thread(target=lambda: found.append(start()))
    thread.start()
    thread.join()
    wait_until(lambda: thread.native_id not in {one.id for one in psutil.Process().threads()})
    assert found[0].alive and said(found[0]) == "one two"


def test_two_engines_live_side_by_side(start: Start) -> None:
    first, second = start(pieces=["first"]), start(pieces=["second"])
    assert (said(first), said(second)) == ("first", "second")
    first.stop()
    assert said(second) == "second"


PARENT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from fake_server import fake_command
from glmchat.chat.shared_engine import start_engine
from glmchat.core import locations
from glmchat.core.engine_options import EngineOptions
process = start_engine(EngineOptions(Path("/"), "fake"), command=fake_command(**{behaviour!r}))
if {ready}:
    process.wait_ready()
print(process.pid, process.socket_path, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("ready", [True, False])
def test_a_killed_face_takes_its_engine_with_it(ready: bool) -> None:
    behaviour = {"seconds_to_load": 0 if ready else 60}
    script = PARENT.format(tests=str(TESTS), behaviour=behaviour, ready=ready)
    command = [sys.executable, "-P", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, path = parent.stdout.readline().split()
        assert psutil.pid_exists(int(pid))
        parent.kill()
    wait_gone(int(pid))
    from glmchat.core.sockets import new_socket_path

    def swept() -> bool:
        new_socket_path()  # the next start sweeps up what the dead could not
        return not Path(path).exists()

    wait_until(swept)  # the last thread of the dead may still hold it for a moment


def test_its_surroundings_are_quiet_offline_and_without_secrets() -> None:
    given = {"OMP_NUM_THREADS": "7", "HF_TOKEN": "secret", "HTTPS_PROXY": "socks://x", "no_proxy": "y", "PATH": "/bin"}
    given |= {"GLMCHAT_API_KEY": "secret", "OPENAI_API_KEY": "secret"}
    found = engine_environment(given)
    assert found["OMP_NUM_THREADS"] == "7" and found["OMP_WAIT_POLICY"] == "PASSIVE"
    assert found["HF_HUB_OFFLINE"] == "1" and found["PATH"] == "/bin"
    assert not {"HTTPS_PROXY", "no_proxy"} & set(found) and "secret" not in found.values()
    assert 1 <= int(engine_environment({})["OMP_NUM_THREADS"]) <= (os.cpu_count() or 1)
    assert engine_environment({"OMP_WAIT_POLICY": "ACTIVE"})["OMP_WAIT_POLICY"] == "ACTIVE"


def test_a_child_keeps_its_files_where_a_relative_path_means_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    found = engine_environment({"GLMCHAT_HOME": "home", "HF_HOME": "$SOMEWHERE/hf", "HF_HUB_CACHE": "/there"})
    assert found["GLMCHAT_HOME"] == str(tmp_path / "home")
    assert found["HF_HOME"] == str(tmp_path / "$SOMEWHERE/hf")
    assert found["HF_HUB_CACHE"] == "/there"


def test_the_child_counts_cards_as_nvidia_smi_does_and_keeps_what_triton_compiles_in_our_cache() -> None:
    made = engine_environment({"CUDA_VISIBLE_DEVICES": "1"})
    assert made["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID" and made["CUDA_VISIBLE_DEVICES"] == "1"
    assert made["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert Path(made["TRITON_CACHE_DIR"]).is_relative_to(locations.cache_dir())
    own = {
        "CUDA_DEVICE_ORDER": "FASTEST_FIRST", "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64",
        "TRITON_CACHE_DIR": "/scratch/triton",
    }  # fmt: skip
    made = engine_environment(own)
    assert own.items() <= made.items() and "PYTORCH_ALLOC_CONF" not in made


def test_old_logs_do_not_pile_up() -> None:
    from glmchat.chat.engine_process import LOGS, new_log

    for _ in range(LOGS + 5):
        path, file = new_log()
        file.close()
    assert len(list(path.parent.glob("engine-*.log"))) == LOGS and path.exists()


def test_the_finished_event_says_how_long_the_load_took(start: Start) -> None:
    last = list(start(seconds_to_load=0.2).endpoint.stream(HELLO, Sampling()))[-1]
    assert isinstance(last, Finished) and (last.load_seconds or 0) >= 0.2


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


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("2026-11-30 23:10:00,123 INFO serve: loading\n\nMemoryError\n\n", "MemoryError"),
        (
            "2026-11-30 23:10:00,123 ERROR serve: the file is cut\n",
            "2026-11-30 23:10:00,123 ERROR serve: the file is cut",
        ),
        ("Traceback\n2026-11-30 23:10:00,123 INFO serve: ready after 9 ms\n", ""),
        ("", ""),
    ],
)
def test_the_last_words_of_a_log_are_no_success(log: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(log)
    assert last_words(tmp_path / "log") == said
