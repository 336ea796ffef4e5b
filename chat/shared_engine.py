"""One warm engine for all programs of a user that want the same: the first starts it, others join, it stays a while.

What must agree: the model's files, how they are loaded, this glmchat, and what of the environment an engine reads.
Each user holds a lease (serve/leases.py), a connection that ends however its holder ends; `keep_alive` seconds after
the last one the engine ends by itself. It listens at the private socket and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from glmchat import __version__
from glmchat.chat.client.endpoint import Endpoint
from glmchat.chat.engine_process import (
    DYING_SECONDS,
    POLL_SECONDS,
    STOP_SECONDS,
    EngineProcess,
    RunningEngine,
    cause_of_death,
    engine_environment,
    last_words,
    log_hint,
    new_log,
    spawn,
)
from glmchat.checkpoints.fit import smaller_hint
from glmchat.core import engine_records
from glmchat.core.engine_options import EngineOptions
from glmchat.core.engine_records import EngineRecord
from glmchat.core.errors import DoesNotFit, EngineDied, GlmchatError
from glmchat.core.files import read_text
from glmchat.core.fingerprints import program_state
from glmchat.core.http import make_client
from glmchat.core.job_control import Rests, rests_with_us
from glmchat.core.language import tr
from glmchat.core.machine import oom_kills
from glmchat.core.sockets import new_socket_path
from glmchat.core.text import one_line

_ANSWER_SECONDS = 20.0  # an engine that imports torch may take its time to say that we may stay
_BIND_SECONDS = 60.0  # from a program's start to its socket, on a machine that is busy
_READ = (  # what an engine reads of its environment
    "CUDA_", "KMP_", "MKL_", "NCCL_", "OMP_", "PYTORCH_", "TORCH", "TRITON_", "GLMCHAT_HOME", "GLMCHAT_KERNEL",
    "PYTHONPATH", "LD_",
)  # fmt: skip


def key_of(options: EngineOptions) -> str:
    """What must agree before a program joins an engine, as a hash. "" where the model's files cannot be looked at."""
    folder = options.require_folder()
    try:
        paths = [folder] if folder.is_file() else sorted(p for p in folder.iterdir() if p.name != "glmchat.json")
        states = [(path.name, path.stat()) for path in paths]
    except OSError:
        return ""
    files = [(name, state.st_size, state.st_mtime_ns, state.st_ino) for name, state in states]
    told = asdict(replace(options, adapters=(), keep_alive=0.0, copy=None))  # adapters are asked for by name, later
    environment = {name: value for name, value in engine_environment().items() if name.startswith(_READ)}
    what = [__version__, sys.executable, sys.version, program_state(), str(folder), files, told, environment]
    return hashlib.sha256(json.dumps(what, default=str, sort_keys=True).encode()).hexdigest()


class Lease(Rests):
    """The connection that says that we use an engine."""

    def __init__(self, socket_path: Path) -> None:
        """Raises OSError where nobody listens."""
        self._path = socket_path
        self._number: int | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(_ANSWER_SECONDS)
            self._socket.connect(str(socket_path))
            self._socket.sendall(_request("GET", f"/lease?pid={os.getpid()}"))
        except OSError:
            self._socket.close()
            raise

    def granted(self) -> bool:
        """Wait for the engine's word; False where it ends just now."""
        said = b""
        with suppress(OSError, ValueError):
            while b"\n" not in said.partition(b"\r\n\r\n")[2]:
                if not (part := self._socket.recv(4096)):
                    return False
                said += part
            body = next(line for line in said.partition(b"\r\n\r\n")[2].splitlines() if line.startswith(b"{"))
            self._number = int(json.loads(body)["lease"])
            return True
        return False

    def rest(self) -> None:
        self._tell("rest")

    def wake(self) -> None:
        self._tell("wake")

    def _tell(self, state: str) -> None:
        """In a signal handler: a short word on a connection of its own, and no waiting for an answer."""
        if self._number is None:
            return
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(0.5)
            connection.connect(str(self._path))
            connection.sendall(_request("PUT", f"/lease/{self._number}/{state}"))
            connection.recv(1)

    def close(self) -> None:
        self._socket.close()


def _request(method: str, path: str) -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode()


class SharedEngine(RunningEngine):
    """An engine that others may use too. `stop` leaves it; it goes on for others, and for whoever comes next."""

    def __init__(self, options: EngineOptions, command: Sequence[str]) -> None:
        self.options = options
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._left = False
        self._lease: Lease | None = None
        self._oom_before = oom_kills()
        key = key_of(options)
        while True:
            with engine_records.one_starts():
                record = _find(key)
                joined = record is not None
                if record is None:
                    self._start(command, key)
                else:
                    self.socket_path, self.log_file = Path(record.socket), Path(record.log)
            try:
                self._lease = Lease(self.socket_path)
            except OSError:
                if not joined:  # it died before it listened: `failure` says of what
                    break
                continue  # it ended between our look and our word
            if not joined or self._lease.granted():
                break
            self._lease.close()
        self.joined = joined
        self.endpoint = Endpoint(uds=str(self.socket_path), model=options.model)
        self._pid = self._process.pid if self._process else (record.pid if record else 0)
        if self._lease is not None:
            rests_with_us(self._lease)

    def _start(self, command: Sequence[str], key: str) -> None:
        """Returns when it listens, or is gone: until then nobody else looks for one."""
        self.socket_path = new_socket_path()
        self.log_file, log = new_log()
        self._process = spawn(command, self.socket_path, self.log_file, log, self.options, f"--shared={key or '-'}")
        _started.append(self._process)
        deadline = time.monotonic() + _BIND_SECONDS
        record = self.socket_path.with_suffix(".json")
        while not record.exists() and self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def alive(self) -> bool:
        if self._process is not None:
            return self._process.poll() is None
        return _lives(self._pid)

    def failure(self) -> GlmchatError | None:
        if self._load_error is not None:
            return self._load_error
        if self.endpoint.broke:
            # A dying process loses its connections a moment before it is seen to be gone.
            self.endpoint.broke = False
            deadline = time.monotonic() + DYING_SECONDS
            while self.alive and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        if self._left or self.alive:
            return None
        code = self._process.poll() if self._process is not None else None
        if code == 0 or (code is None and not self.socket_path.exists()):
            return EngineDied(
                tr("the engine was stopped"),
                hint=tr("`glmchat stop` does that; F5 or the next command starts it again"),
                code="engine.stopped",
            )
        if code is not None:
            smaller = smaller_hint(self.options.require_folder(), self.options.quant, self.options.context)
            return cause_of_death(code, self.log_file, self._oom_before, smaller)
        return EngineDied(
            tr(
                "the engine that this program shared is gone: {said}",
                said=last_words(self.log_file) or tr("it left no word"),
            ),
            hint=log_hint(self.log_file),
            code="engine.gone",
        )

    def stop(self) -> None:
        with self._lock:
            self._left = True
            if self._lease is not None:
                self._lease.close()

    def end(self) -> bool:
        with suppress(GlmchatError):
            if any(pid != os.getpid() for pid in users_of(self.socket_path).pids):
                self.stop()
                return False
        self.stop()
        _end_process(self._pid)
        if self._process is not None:
            self._process.poll()
        return True


def start_engine(options: EngineOptions, *, command: Sequence[str] | None = None) -> RunningEngine:
    """Start the engine, or join one that runs where `options.keep_alive` lets others in, and return at once.

    Call `wait_ready`, and `stop` in the end.
    command: what is run instead of `[sys.executable, "-P", "-m", "glmchat.serve"]` (tests put a fake engine there).
    Raises Hostile or Failed where the socket's folder or the log cannot be used.
    """
    command = command or (sys.executable, "-P", "-m", "glmchat.serve")
    return SharedEngine(options, command) if options.keep_alive > 0 else EngineProcess(options, command)


_started: list[subprocess.Popen[bytes]] = []  # engines that outlive their handles: kept, so that none becomes a zombie


def _find(key: str) -> EngineRecord | None:
    return next((record for record in engine_records.running() if key and record.key == key), None)


def runs(options: EngineOptions) -> bool:
    """An engine for these options is there to be joined, so that no memory is asked for."""
    return options.keep_alive > 0 and _find(key_of(options)) is not None


@dataclass(frozen=True, slots=True)
class Users:
    """pids: who holds a lease. seconds_left: None while the engine is used. state: loading, ready or failed.

    device: where it computes, once it does.
    """

    pids: tuple[int, ...]
    seconds_left: float | None
    answers: int
    state: str
    device: str | None = None


def users_of(socket_path: Path) -> Users:
    """Asks a shared engine. Raises EngineDied where it does not answer."""
    import httpx2

    try:
        with make_client(uds=str(socket_path), timeout=5.0) as client:
            data: dict[str, Any] = client.get("http://localhost/users").json()
        pids = tuple(int(user["pid"]) for user in data["users"])
        left, device = data["seconds_left"], data.get("device")
        seconds = None if left is None else float(left)
        return Users(pids, seconds, int(data["answers"]), str(data["state"]), device and str(device))
    except (httpx2.HTTPError, OSError, ValueError, KeyError, TypeError):
        raise EngineDied(tr("the engine does not answer"), hint="glmchat stop", code="engine.silent") from None


def is_free(process: RunningEngine | None, own: int) -> bool:
    """No request but so many of ours is at the engine, as far as one that is shared tells."""
    if not isinstance(process, SharedEngine):
        return True
    try:
        return users_of(process.socket_path).answers <= own
    except GlmchatError:
        return False


def program_of(pid: int) -> str:
    """`run smollm2 (4711)`: what was typed in that process, as far as the system tells."""
    import psutil

    words: Sequence[str] = ()
    with suppress(psutil.Error):
        line = psutil.Process(pid).cmdline()
        start = next((i + 1 for i, word in enumerate(line) if Path(word).name == "glmchat"), len(line))
        start += 2 if line[start : start + 1] == ["--lang"] else 0
        words = line[start : start + 2]
    return f"{one_line(' '.join(words) or 'glmchat', 40)} ({pid})"


def _lives(pid: int) -> bool:
    with suppress(OSError):  # field 3 of /proc/PID/stat; the name before it may hold brackets
        return read_text(Path(f"/proc/{pid}/stat"), errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _end_process(pid: int) -> None:
    """SIGTERM, and after a while SIGKILL; returns when it is gone, with its memory."""
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS + 2), (signal.SIGKILL, 2.0)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)  # one that rests hears nothing
            os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not _lives(pid):
                return
            time.sleep(POLL_SECONDS)


def end_engine(record: EngineRecord) -> None:
    """End an engine, whoever uses it."""
    pid = engine_records.listener_pid(record)
    if pid is not None:
        _end_process(pid)
    record.forget()


def _idle() -> list[tuple[float, EngineRecord]]:
    """Shared engines that only wait for somebody, each with the seconds that it has waited."""
    idle = []
    for record in engine_records.running():
        if record.shared:
            with suppress(EngineDied):
                users = users_of(Path(record.socket))
                if users.seconds_left is not None and not users.answers:
                    idle.append((record.keep_alive - users.seconds_left, record))
    return idle


def end_one_idle() -> str | None:
    """End the shared engine that nobody has used for the longest; its model's name, or None where all are used."""
    idle = _idle()
    if not idle:
        return None
    record = max(idle, key=lambda pair: pair[0])[1]
    end_engine(record)
    return record.model


def end_idle_of(removed: Sequence[Path]) -> None:
    """Models were removed: engines that wait with them for nobody give memory and the files' space back.

    removed: folders, or files.
    """
    for _, record in _idle():
        if Path(record.folder) in removed or any(path in Path(record.folder).parents for path in removed):
            end_engine(record)


def making_room(check: Callable[[], object]) -> None:
    """`check` raises DoesNotFit: engines that only wait for somebody are ended, one by one, until it does not."""
    while True:
        try:
            check()
            return
        except DoesNotFit:
            if end_one_idle() is None:
                raise
