"""The engine as a child process: started, watched, its log and its memory, and told from the outside why it died.

One of our own dies with this process, however this process dies: its stdin is a pipe whose writing end only we hold.
One that several programs share is in `shared_engine`.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

from glmchat.chat.client.endpoint import Endpoint
from glmchat.checkpoints.fit import smaller_hint
from glmchat.core.cards import look
from glmchat.core.engine_options import EngineOptions
from glmchat.core.errors import Damaged, DoesNotFit, EngineDied, Failed, GlmchatError, Interrupted
from glmchat.core.files import open_file
from glmchat.core.job_control import rests_with_us
from glmchat.core.language import language, tr
from glmchat.core.locations import cache_dir, expanded, logs_dir, private_dir
from glmchat.core.machine import oom_kills, physical_cores
from glmchat.core.sockets import new_socket_path
from glmchat.core.text import one_line

LOGS = 10


def new_log(kind: str = "engine") -> tuple[Path, IO[bytes]]:
    """A new file of mode 0600 for a process's stderr, and its writing end. Old ones of the kind are removed."""
    try:
        folder = private_dir(logs_dir())
        writable = os.access(folder, os.W_OK)
    except Failed:
        writable = False
    if not writable:  # a home that takes no files must not stop the chat
        folder = Path(tempfile.mkdtemp(prefix="glmchat-log-"))
    for old in sorted(folder.glob(f"{kind}-*.log"))[: -LOGS + 1]:  # the names sort by time
        with suppress(FileNotFoundError, PermissionError):
            old.unlink()
    path = folder / f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{secrets.token_hex(2)}.log"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
    except OSError as error:
        raise Failed(
            tr("cannot write {path}: {strerror}", path=one_line(str(path)), strerror=error.strerror),
            hint=tr("set GLMCHAT_HOME to a folder that you can write to"),
            code="home.unwritable",
        ) from None
    return path, os.fdopen(descriptor, "wb", buffering=0)


def last_words(path: Path) -> str:
    """The last line that says something, from the log's last 8 kB; safe to show. A log that ends with what went well
    tells no cause: whoever wrote it was killed.
    """
    try:
        with open_file(path) as file:
            file.seek(max(0, path.stat().st_size - 8192))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    last = next((one_line(line.strip(), 300) for line in reversed(lines) if line.strip()), "")
    return "" if re.match(r"[\d-]{10} [\d:,]{12} (INFO|DEBUG) ", last) else last


def process_memory(pid: int) -> int | None:
    """Bytes that a process and its children hold in memory; None if it is gone.

    Weights are mapped from their file; what the kernel has read of them is counted, as `top` counts it. So is a
    beginning that several caches share, once for each.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        return int(sum(p.memory_info().rss for p in [process, *process.children(recursive=True)]))
    except psutil.Error:
        return None


def gpu_memory(device: str | None = None) -> tuple[int, int] | None:
    """(used, total) bytes of the cards that an engine computes on; None without a card. device: None for the first."""
    if device is not None and not device.startswith("cuda"):
        return None
    cards = look()
    chosen = [cards.at(name) for name in (device or "cuda").split(",")]
    there = [card for card in chosen if card is not None]
    return (sum(card.total - card.free for card in there), sum(card.total for card in there)) if there else None


def total_memory() -> int:
    """Bytes of memory in this machine."""
    import psutil

    return int(psutil.virtual_memory().total)


STOP_SECONDS = 1.5  # the child ends at once when its lifeline does; after this it is killed
DYING_SECONDS = 1.0
POLL_SECONDS = 0.03
_PLACES = ("GLMCHAT_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "GLMCHAT_API_KEY")


def engine_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The child's environment: waiting threads sleep instead of spinning, one thread a core, no way to a hub.

    Cards are counted as nvidia-smi counts them, their memory is taken in pieces that grow, and what Triton compiles is
    kept in our cache and not in a home on a network. What the user has set for OpenMP, CUDA, torch and Triton wins; the
    child speaks the language that was chosen here.
    """
    environment = dict(os.environ if environ is None else environ)
    for name in _PLACES:  # the child is started elsewhere: what is relative here would be another folder there
        if environment.get(name):
            environment[name] = str(expanded(environment[name]).absolute())
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("OMP_NUM_THREADS", str(physical_cores()))
    environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    if "PYTORCH_CUDA_ALLOC_CONF" not in environment:  # the older name of the same
        environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    environment.setdefault("TRITON_CACHE_DIR", str((cache_dir() / "triton").absolute()))
    environment["HF_HUB_OFFLINE"] = "1"
    environment["TRANSFORMERS_OFFLINE"] = "1"
    environment["TOKENIZERS_PARALLELISM"] = "false"  # its threads would outnumber the cores
    environment["PYTHONUNBUFFERED"] = "1"
    environment["GLMCHAT_LANG"] = language()  # what it refuses is read in the window
    for name in list(environment):
        if name.lower().endswith("_proxy") or name in _SECRETS:
            del environment[name]  # the engine speaks to nobody but us, and needs no secret
    return environment


def cause_of_death(code: int, log_file: Path, oom_before: int | None, smaller: str | None = None) -> GlmchatError:
    """Why a child that computes is gone. code: as Popen tells it. oom_before: kills counted when it was started.

    smaller: the hint where memory was the cause.
    """
    smaller = smaller or tr("close other programs, or use a smaller model")
    if code == -9:
        after = oom_kills()
        if after is not None and oom_before is not None and after > oom_before:
            return DoesNotFit(
                tr("the system ran out of memory and killed the engine"), hint=smaller, code="engine.out_of_memory"
            )
        return EngineDied(
            tr("the engine was killed (signal 9): usually the system was out of memory"),
            hint=smaller,
            code="engine.killed",
        )
    if -code == signal.SIGBUS:
        return bus_error()
    if code < 0:
        causes = {-4: "illegal instruction", -6: "aborted", -11: "segmentation fault"}
        return EngineDied(
            tr("the engine was terminated by signal {signal} ({cause})", signal=-code, cause=causes.get(code, "-")),
            hint=log_hint(log_file),
            code="engine.signal",
        )
    return EngineDied(
        tr("the engine exited with code {code}: {said}", code=code, said=last_words(log_file) or tr("it left no word")),
        hint=log_hint(log_file),
        code="engine.exit",
    )


def bus_error() -> Damaged:
    """Weights are mapped: where the bytes behind a map are gone, the system ends who reads it."""
    return Damaged(
        tr("a file of the model was cut or replaced while it was being read, or its disk failed (bus error)"),
        hint=tr("`glmchat verify` says which file; pull the model again"),
        code="engine.file_cut",
    )


def log_hint(log_file: Path) -> str:
    return tr("the engine's log: {path}", path=str(log_file))


class RunningEngine(ABC):
    """An engine in a process of its own, whoever started it. `endpoint` may be used once `wait_ready` has returned.

    Stop it, or use it in a `with` block.
    """

    options: EngineOptions
    socket_path: Path
    log_file: Path
    endpoint: Endpoint
    _load_error: GlmchatError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    @abstractmethod
    def pid(self) -> int: ...

    @property
    @abstractmethod
    def alive(self) -> bool: ...

    @abstractmethod
    def failure(self) -> GlmchatError | None:
        """Why the engine is not there, or None while it is (or was stopped by us)."""

    @abstractmethod
    def stop(self) -> None:
        """We need it no more. May be called twice, and from any thread."""

    def end(self) -> bool:
        """Stop it now, so that its memory is free; False where others use it, then only we leave."""
        self.stop()
        return True

    def wait_ready(
        self,
        on_progress: Callable[[str, float], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        """Return when the engine answers. `on_progress(stage, done)`: start, import, tokenizer, weights, warmup.

        Raises what the load raised (Damaged, DoesNotFit, …), EngineDied with the cause, or Interrupted if `cancelled`
        says so; the process is stopped in each of these cases.
        """
        reported: tuple[str, float] | None = None
        while True:
            if cancelled is not None and cancelled():
                self.stop()
                raise Interrupted(
                    tr("loading was cancelled"), hint=tr("you can start it again at any time"), code="engine.cancelled"
                )
            stage, done = self._look()
            if stage == "ok":
                return
            if on_progress is not None and (stage, done) != reported:
                on_progress(stage, done)
                reported = (stage, done)
            time.sleep(POLL_SECONDS)

    def _look(self) -> tuple[str, float]:
        """Where the load is. Raises if it failed or the process is gone."""
        if (failure := self.failure()) is not None:
            self.stop()
            raise failure
        if not self.socket_path.exists():
            return "start", 0.0
        try:
            health = self.endpoint.health()
        except EngineDied:  # dying: the next look at the process tells
            self.endpoint.broke = False
            return "start", 0.0
        if health.status == "failed":
            self._load_error = health.error or EngineDied(
                tr("the engine could not load the model"), hint=log_hint(self.log_file)
            )
            self.stop()
            raise self._load_error
        return ("ok", 1.0) if health.status == "ok" else (health.stage or "start", health.done or 0.0)


def spawn(
    command: Sequence[str], socket_path: Path, log_file: Path, log: IO[bytes], options: EngineOptions, *more: str
) -> subprocess.Popen[bytes]:
    """The engine's program. Its stdin is a pipe to us with `--lifeline` among `more`, else nothing."""
    with log:
        return subprocess.Popen(
            [*command, f"--uds={socket_path}", f"--log={log_file}", *more, *options.to_arguments()],
            cwd="/",
            env=engine_environment(),
            stdin=subprocess.PIPE if "--lifeline" in more else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,  # Ctrl-C on the terminal is for us, and only we decide what it stops
        )


class EngineProcess(RunningEngine):
    """An engine of our own, which dies with us."""

    def __init__(self, options: EngineOptions, command: Sequence[str]) -> None:
        self.options = options
        self.socket_path = new_socket_path()
        self.log_file, log = new_log()
        self.endpoint = Endpoint(uds=str(self.socket_path), model=options.model)
        self._oom_before = oom_kills()
        self._stopped = False
        self._lock = threading.Lock()
        self._process = spawn(command, self.socket_path, self.log_file, log, options, "--lifeline")
        rests_with_us(self._process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def failure(self) -> GlmchatError | None:
        if self._load_error is not None:
            return self._load_error
        code = self._process.poll()
        if code is None and self.endpoint.broke:
            # A dying process loses its connections a moment before it can be waited for.
            self.endpoint.broke = False
            with suppress(subprocess.TimeoutExpired):
                code = self._process.wait(DYING_SECONDS)
        if code is None or self._stopped:
            return None
        smaller = smaller_hint(self.options.require_folder(), self.options.quant, self.options.context)
        return cause_of_death(code, self.log_file, self._oom_before, smaller)

    def stop(self) -> None:
        """End the engine, within two seconds."""
        with self._lock:
            if self._process.poll() is None:
                self._stopped = True
            if self._process.stdin is not None:
                with suppress(OSError):  # it died with the pipe
                    self._process.stdin.close()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                with suppress(subprocess.TimeoutExpired):  # in uninterruptible sleep: the kernel ends it later
                    self._process.wait(0.5)
            for path in (self.socket_path, self.socket_path.with_suffix(".json")):
                path.unlink(missing_ok=True)
