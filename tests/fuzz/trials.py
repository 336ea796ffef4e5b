"""Runs a target on many inputs, in children that may hang, grow or die without taking the run along.

What counts as found: an exception that is no error of the tree, a signal, over `SECONDS` of the processor, over `STALL`
asleep, or over `GROWTH`. A process that stands in the queue for the processor or the disk waits for the machine, and
so does one whose watcher did not run either: neither is held against the reader. A hang is told with its seconds of
both kinds and the stack of each thread, so that it need not come again to be understood.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import resource
import select
import shutil
import signal
import struct
import tempfile
import time
import traceback
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from random import Random

from mutation import mutate

from glmchat.core.errors import GlmchatError

SECONDS = 10.0
STALL = 60.0  # seconds in which every thread of it slept
GROWTH = 300 * 2**20  # bytes of resident memory above the start
_LARGEST = 16 * 2**20  # bytes of an input: what a server takes, and most of what a file may hold
_BATCH = 2000  # inputs of one child
_ADDRESSES = 4 * 2**30  # bytes a child may ask for beyond what it has: more is refused before the machine suffers
_TICK = 0.25  # seconds between two looks at it
_STATE = struct.Struct("<qdqq")  # number of the input under way, when it began, how many are done, were accepted


@dataclass(frozen=True, slots=True)
class Target:
    """seeds: makes the good inputs. check: reads one in an empty folder; may raise errors of the tree and no others.

    mend: puts right after a mutation what would be refused at once, a length that frames the rest. modules: what the
    reader imports, which is no memory that an input takes.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    check: Callable[[bytes, Path], None]
    tokens: Sequence[bytes] = ()
    mend: Callable[[bytes], bytes] | None = None
    modules: Sequence[str] = ()

    def load(self) -> None:
        for module in self.modules:
            import_module(module)


@dataclass(frozen=True, slots=True)
class Finding:
    kind: str  # "traceback" | "crash" | "hang" | "memory"
    number: int
    words: str
    data: bytes = field(repr=False)

    @property
    def place(self) -> str:
        """What two findings of one fault share: where it was raised, and as what."""
        lines = self.words.strip().splitlines() or [""]
        frames = [line.strip() for line in lines if line.lstrip().startswith("File ")]
        return f"{self.kind} {frames[-1] if frames else ''} {lines[-1].partition(':')[0]}"


@dataclass
class Report:
    target: str
    inputs: int = 0
    accepted: int = 0  # inputs that were read, not refused
    seconds: float = 0.0
    peak: int = 0  # bytes above the start
    findings: list[Finding] = field(default_factory=list)

    def count(self, kind: str) -> int:
        return sum(finding.kind == kind for finding in self.findings)


def input_of(target: Target, seeds: Sequence[bytes], seed: int, number: int) -> bytes:
    """The same bytes each time; the first numbers are the seeds themselves."""
    if number < len(seeds):
        return seeds[number]
    data = mutate(Random(f"{target.name} {seed} {number}"), seeds, target.tokens)[:_LARGEST]
    return target.mend(data) if target.mend else data


def search(target: Target, *, seed: int = 1, inputs: int | None = None, seconds: float | None = None) -> Report:
    """Try `inputs` inputs, or as many as fit into `seconds`."""
    target.load()
    report, seeds, began = Report(target.name), target.seeds(), time.monotonic()
    end = began + seconds if seconds is not None else float("inf")
    known: set[str] = set()
    number = 0
    while time.monotonic() < end and (inputs is None or number < inputs):
        last = number + _BATCH if inputs is None else min(number + _BATCH, inputs)
        number, accepted, findings, peak = _batch(target, seeds, seed, number, last, end)
        report.accepted += accepted
        report.peak = max(report.peak, peak)
        for finding in findings:
            if finding.place not in known:
                known.add(finding.place)
                report.findings.append(finding)
    report.inputs, report.seconds = number, time.monotonic() - began
    return report


def try_one(check: Callable[[bytes, Path], None], data: bytes) -> Finding | None:
    """The same bounds for one input."""
    _, _, findings, _ = _batch(Target("one", lambda: [data], check), [data], 0, 0, 1, float("inf"))
    return findings[0] if findings else None


def _batch(
    target: Target, seeds: Sequence[bytes], seed: int, first: int, last: int, end: float
) -> tuple[int, int, list[Finding], int]:
    """Inputs first to last in one child -> (number to go on with, inputs read, findings, peak above the start)."""
    state = mmap.mmap(-1, 64)
    _STATE.pack_into(state, 0, first, time.monotonic(), first, 0)
    folder = tempfile.mkdtemp(prefix="glmchat-fuzz-")
    reader, writer = os.pipe()
    stacks = Path(folder) / "stacks"
    child = os.fork()
    if not child:
        os.close(reader)
        code = 1
        try:
            file = stacks.open("wb")
            for number in (signal.SIGPROF, signal.SIGUSR1):
                faulthandler.register(number, file, chain=True)  # where each thread is, and then its end
            _work(target, seeds, seed, (first, last, end), state, Path(folder), writer)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    try:
        told, hang = _listen(reader, child, state)
        _, status = os.waitpid(child, 0)
        stack = stacks.read_text(errors="replace") if stacks.exists() else ""
    finally:
        os.close(reader)
        shutil.rmtree(folder, ignore_errors=True)
    lines = [json.loads(line) for line in told.splitlines() if line.endswith(b"}")]
    peak = max((line["peak"] for line in lines if "peak" in line), default=0)
    findings = [
        Finding(line["kind"], line["number"], line["words"], b64decode(line["data"]))
        for line in lines
        if "kind" in line
    ]
    number, began, done, accepted = _STATE.unpack_from(state)
    if status and (hang or os.WIFSIGNALED(status) or not any(f.kind == "memory" for f in findings)):
        code = os.waitstatus_to_exitcode(status)
        if not hang and code == -signal.SIGPROF:
            hang = f"over {SECONDS:g} s of the processor, {time.monotonic() - began:.1f} s of the clock"
        words = f"{hang}\n{stack}" if hang else f"signal or exit {code}"
        findings.append(Finding("hang" if hang else "crash", number, words, input_of(target, seeds, seed, number)))
        done = number + 1
    return max(done, first + 1) if status else done, accepted, findings, peak


def _listen(reader: int, child: int, state: mmap.mmap) -> tuple[bytes, str]:
    """What the child tells until it ends, and why it was killed: "", or that one input slept too long."""
    told, hang, number, slept, before = bytearray(), "", -1, 0.0, time.monotonic()
    while True:
        if select.select([reader], [], [], _TICK)[0]:
            piece = os.read(reader, 1 << 16)
            if not piece:
                return bytes(told), hang
            told += piece
        now, (under_way, began, _, _) = time.monotonic(), _STATE.unpack_from(state)
        if under_way != number:
            number, slept = under_way, 0.0
        elif not _works(child):
            slept += min(now - before, 4 * _TICK)  # more is a machine that stood still
        before = now
        if slept > STALL and not hang:
            hang = f"over {STALL:g} s asleep, {now - began:.1f} s of the clock, {_processor(child)}"
            _end(child)


def _end(child: int) -> None:
    """Have it write where each of its threads is and end, or kill it where it does not even that."""
    os.kill(child, signal.SIGUSR1)
    end = time.monotonic() + 5
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(_TICK)


def _threads(child: int) -> list[list[str]]:
    """What /proc tells of each of its threads, from the state on (field 3 of proc(5)); none on a Mac."""
    told = []
    for file in Path(f"/proc/{child}/task").glob("*/stat"):
        with suppress(OSError):  # it ended meanwhile
            told.append(file.read_text().rpartition(") ")[2].split())
    return told


def _works(child: int) -> bool:
    """Whether a thread of it runs, stands in the queue for the processor, or waits for the disk."""
    return any(fields[0] in "RD" for fields in _threads(child))


def _processor(child: int) -> str:
    ticks = sum(int(fields[11]) + int(fields[12]) for fields in _threads(child))
    return f"{ticks / os.sysconf('SC_CLK_TCK'):.1f} s of the processor since its first input"


def _work(
    target: Target,
    seeds: Sequence[bytes],
    seed: int,
    span: tuple[int, int, float],
    state: mmap.mmap,
    folder: Path,
    writer: int,
) -> None:
    first, last, end = span
    _confine(folder)
    start, accepted = _resident(), 0
    for number in range(first, last):
        _STATE.pack_into(state, 0, number, time.monotonic(), number, accepted)
        if time.monotonic() > end:
            break
        data, place = input_of(target, seeds, seed, number), folder / str(number)
        _STATE.pack_into(state, 0, number, time.monotonic(), number, accepted)
        place.mkdir()
        kind, words = "", ""
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # SIGPROF ends the process, wherever it is
        try:
            target.check(data, place)
            accepted += 1
        except GlmchatError:
            pass
        except BaseException as error:  # a panic of a library in Rust is no Exception
            kind, words = "traceback", _words(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        shutil.rmtree(place, ignore_errors=True)
        peak = _resident() - start
        if peak > GROWTH and not kind:
            kind, words = "memory", f"{peak >> 20} MB above the start"
        _STATE.pack_into(state, 0, number, time.monotonic(), number + 1, accepted)
        if kind:
            told = {"kind": kind, "number": number, "words": words, "data": b64encode(data).decode()}
            os.write(writer, json.dumps(told).encode() + b"\n")
        if peak > GROWTH:
            os.write(writer, json.dumps({"peak": peak}).encode() + b"\n")
            os._exit(3)  # what it holds now would hide what the next input takes
    os.write(writer, json.dumps({"peak": _resident() - start}).encode() + b"\n")


def _words(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(line[:200] for line in lines)[-4000:]


def _confine(folder: Path) -> None:
    """A home of its own, no terminal, and less memory than would harm the machine."""
    os.environ.update(HOME=str(folder), GLMCHAT_HOME=str(folder / "home"), HF_HOME=str(folder / "hf"))
    os.environ.update(GLMCHAT_LANG="en", HF_HUB_DISABLE_TELEMETRY="1")
    os.chdir(folder)
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        most = pages * resource.getpagesize() + _ADDRESSES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))


def _resident() -> int:
    """Bytes, the most there was."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
