"""One warm engine for several programs: joined, kept for a while, ended; never two of the same, never one unknown.

Covers chat/shared_engine.py, serve/leases.py, core/engine_records.py.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_server import fake_command
from polling import wait_until

from glmchat.chat import shared_engine
from glmchat.chat.shared_engine import SharedEngine, end_engine, end_one_idle, key_of, making_room, runs, users_of
from glmchat.core import engine_records
from glmchat.core.engine_options import EngineOptions
from glmchat.core.errors import Damaged, DoesNotFit, EngineDied, ServerFailed
from glmchat.core.messages import Message, Piece, Sampling

TESTS = Path(__file__).resolve().parent.parent
HELLO = [Message("user", "hi")]
Use = Callable[..., SharedEngine]


@pytest.fixture(autouse=True)
def own_sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of sockets that no other test looks into, under a path that is short enough for one."""
    folder = Path(tempfile.mkdtemp(prefix="g", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    yield folder / "glmchat"
    for record in engine_records.running():
        end_engine(record)
    shutil.rmtree(folder)


@pytest.fixture
def use(tmp_path: Path) -> Iterator[Use]:
    used: list[SharedEngine] = []

    def begin(*, wait: bool = True, keep_alive: float = 60.0, options: Any = None, **behaviour: Any) -> SharedEngine:
        told = EngineOptions(tmp_path, "fake", keep_alive=keep_alive, **(options or {}))
        used.append(SharedEngine(told, fake_command(**behaviour)))
        if wait:
            used[-1].wait_ready()
        return used[-1]

    yield begin
    for engine in used:
        engine.stop()


def said(engine: SharedEngine) -> str:
    return "".join(e.text for e in engine.endpoint.stream(HELLO, Sampling()) if isinstance(e, Piece))


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_second_joins_the_first_and_either_may_leave(use: Use) -> None:
    first, second = use(), use()
    assert (first.pid, first.joined, second.joined) == (second.pid, False, True)
    assert users_of(first.socket_path).pids == (os.getpid(), os.getpid())
    first.stop()
    assert said(second) == "one two" and second.failure() is None


def test_it_stays_for_whoever_comes_next_and_then_ends_by_itself(use: Use, own_sockets: Path) -> None:
    first = use(keep_alive=1.0)
    first.stop()
    second = use(keep_alive=1.0)
    assert second.joined and said(second) == "one two"
    second.stop()
    wait_until(lambda: not lives(second.pid))
    assert not engine_records.running() and [p.name for p in own_sockets.iterdir()] == ["start.lock"]
    assert second.failure() is None, "what we left did not fail"


def test_programs_that_start_together_share_one(use: Use) -> None:
    engines: list[SharedEngine] = []
    threads = [threading.Thread(target=lambda: engines.append(use(seconds_to_load=0.5))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({engine.pid for engine in engines}) == 1 == len(engine_records.running())


@pytest.mark.parametrize("other", [{"context": 64}, {"device": "cpu"}, {"threads": 1}, {"model": "another"}])
def test_what_is_loaded_in_another_way_is_another_engine(tmp_path: Path, other: dict[str, Any]) -> None:
    options = EngineOptions(tmp_path, "fake", keep_alive=60)
    assert key_of(replace(options, **other)) != key_of(options)
    assert key_of(replace(options, keep_alive=5.0, adapters=(("a", tmp_path),))) == key_of(options)


def test_another_glmchat_other_files_or_another_environment_do_not_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"one")
    options = EngineOptions(tmp_path, "fake", keep_alive=60)
    keys = [key_of(options)]
    with monkeypatch.context() as patch:
        patch.setattr(shared_engine, "__version__", "9.9.9")
        keys.append(key_of(options))
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "1")
        keys.append(key_of(options))
    (tmp_path / "model.gguf").write_bytes(b"other")
    keys.append(key_of(options))
    assert len(set(keys)) == 4


USER = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from fake_server import fake_command
from glmchat.chat.shared_engine import SharedEngine
from glmchat.core.engine_options import EngineOptions
engine = SharedEngine(EngineOptions(Path({folder!r}), "fake", keep_alive={keep_alive}), fake_command(**{behaviour!r}))
print(engine.pid, flush=True)
engine.wait_ready()
print("ready", flush=True)
sys.stdin.read()
"""


def program(folder: Path, keep_alive: float = 60.0, **behaviour: Any) -> subprocess.Popen[str]:
    code = USER.format(tests=str(TESTS), folder=str(folder), keep_alive=keep_alive, behaviour=behaviour)
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_program_that_is_killed_leaves_nothing_but_an_engine_that_is_known(use: Use, tmp_path: Path) -> None:
    with program(tmp_path) as starter:
        pid = int(line_of(starter))
        assert line_of(starter) == "ready"
        starter.kill()
    engine = use()
    assert engine.joined and engine.pid == pid and said(engine) == "one two"
    wait_until(lambda: users_of(engine.socket_path).pids == (os.getpid(),))
    assert [record.pid for record in engine_records.running()] == [pid]


def test_one_whose_only_program_is_killed_while_it_loads_ends(tmp_path: Path) -> None:
    with program(tmp_path, seconds_to_load=60) as starter:
        pid = int(line_of(starter))
        wait_until(lambda: users_of(Path(engine_records.running()[0].socket)).pids == (starter.pid,))
        starter.kill()
    wait_until(lambda: not lives(pid))
    assert not engine_records.running()


def test_who_frees_memory_ends_it_only_where_nobody_else_uses_it(use: Use, tmp_path: Path) -> None:
    mine = use()
    with program(tmp_path) as other:
        assert [line_of(other), line_of(other)] == [str(mine.pid), "ready"]
        assert not mine.end() and lives(mine.pid)
        other.kill()
    again = use()
    wait_until(lambda: users_of(again.socket_path).pids == (os.getpid(),))
    assert again.end() and not lives(again.pid)


def test_a_user_of_an_engine_that_was_stopped_is_told_that_nothing_broke(use: Use) -> None:
    first, second = use(), use()
    end_engine(engine_records.running()[0])
    for engine in (first, second):
        wait_until(lambda one=engine: not one.alive)  # type: ignore[misc]
        failure = engine.failure()
        assert isinstance(failure, EngineDied) and failure.code == "engine.stopped"


def test_a_user_of_an_engine_that_was_killed_is_told_that_it_is_gone_and_the_next_one_starts_another(use: Use) -> None:
    first, second = use(), use()
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: not first.alive and not second.alive)
    codes = {type(failure := engine.failure()).__name__ + getattr(failure, "code", "") for engine in (first, second)}
    assert codes == {"EngineDiedengine.killed", "EngineDiedengine.gone"}
    third = use()
    assert not third.joined and said(third) == "one two"


def test_a_load_that_fails_tells_why_and_leaves_no_engine(use: Use) -> None:
    problem = Damaged("the file is cut", hint="pull again", code="weights.cut").to_json()
    with pytest.raises(Damaged, match="the file is cut"):
        use(load_failure=problem)
    wait_until(lambda: not engine_records.running())


def test_one_that_ends_before_it_listens_tells_so(use: Use) -> None:
    with pytest.raises(EngineDied, match="exited with code 3"):
        use(exit_at_start=3)


def test_an_answer_rests_while_every_user_does(use: Use) -> None:
    mine, theirs = use(pieces=["x"], repeat=100_000, seconds_per_token=0.005), use()
    answer = mine.endpoint.stream(HELLO, Sampling())
    count, last = 0, 0.0

    def read() -> None:
        nonlocal count, last
        with suppress(ServerFailed, EngineDied):  # the engine is ended under it
            for _ in answer:
                count, last = count + 1, time.monotonic()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    wait_until(lambda: count > 3)
    leases = [engine._lease for engine in (mine, theirs)]
    assert leases[0] is not None and leases[1] is not None and leases[0].granted()
    leases[0].rest()
    at = count
    wait_until(lambda: count > at + 20)  # the other one is awake, and it may wait for its turn
    leases[1].rest()

    wait_until(lambda: time.monotonic() - last > 0.5)
    leases[0].wake()
    at = count
    wait_until(lambda: count > at)
    mine.stop()
    end_engine(engine_records.running()[0])
    reader.join(10)


def test_each_user_is_answered_in_its_own_language(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, words = use(), []
    for language in ("zh", "en"):
        monkeypatch.setenv("GLMCHAT_LANG", language)
        with pytest.raises(DoesNotFit) as refused:
            list(engine.endpoint.stream([Message("user", "x" * 5000)], Sampling()))
        words.append(refused.value.message)
    assert "上下文" in words[0] and "context" in words[1]


def test_room_is_made_by_ending_those_that_nobody_uses(use: Use, tmp_path: Path) -> None:
    used = use()
    idle = use(options={"context": 64})
    idle.stop()
    checks = iter([DoesNotFit("too large", hint="-", code="memory"), None])

    def check() -> None:
        if (problem := next(checks)) is not None:
            raise problem

    wait_until(lambda: users_of(idle.socket_path).seconds_left is not None)
    making_room(check)
    assert not lives(idle.pid) and lives(used.pid) and end_one_idle() is None
    with pytest.raises(DoesNotFit):
        making_room(lambda: (_ for _ in ()).throw(DoesNotFit("too large", hint="-", code="memory")))
    assert runs(EngineOptions(tmp_path, "fake", keep_alive=60))


def test_what_is_no_record_and_what_a_dead_engine_left_stand_in_nobody_s_way(use: Use, own_sockets: Path) -> None:
    first = use()
    own_sockets.joinpath("77-abc.json").write_text("{nonsense")
    own_sockets.joinpath("78-abc.json").write_text('{"pid": "many", "socket": "/etc/passwd"}')
    os.kill(first.pid, signal.SIGKILL)
    wait_until(lambda: not first.alive)
    assert not engine_records.running()
    assert not first.socket_path.exists()
    assert said(use()) == "one two"
