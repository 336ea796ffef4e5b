"""What holds whatever happens meanwhile: kills, Ctrl-C, full disks, tokens, many files, honest progress.

Covers hub/download.py, hub/fetch.py, hub/partial.py, hub/download_state.py, hub/file_request.py, hub/transfer.py.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from loopback_hub import LoopbackHub, Synthetic
from polling import SECONDS, wait_until
from strange_files import put

from glmchat.core.errors import Damaged, DoesNotFit, Failed, Interrupted, NetworkFailed
from glmchat.hub.download import Candidate, FetchedFile, FileRequest, Progress, RetryPolicy, download
from glmchat.hub.fetch import retry_after
from glmchat.hub.partial import PartialFile
from glmchat.hub.store import disk_error

FAST = RetryPolicy(stall=0.5, first_pause=0.01, longest_pause=0.05, rounds=3)
BIG = 24_000_000

# One pull in a process of its own, to be killed.
PULL = """
import sys
from pathlib import Path
from glmchat.hub.download import Candidate, FileRequest, download
url, folder, size, sha = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
places = folder / "big.bin", folder / "big.glmchat.incomplete"
want = FileRequest("big.bin", *places, [Candidate(url)], size=size, sha256=sha)
download([want], on_progress=lambda _: None, cancelled=lambda: False)
"""

# ru_maxrss begins with what the parent had when it forked; VmHWM is the program's own (macOS has only the former).
PEAK = """
import resource
try:
    lines = open("/proc/self/status").read().splitlines()
    print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
except OSError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def one(hub: LoopbackHub, folder: Path, name: str = "big.bin", **more: object) -> FileRequest:
    file = hub.file("tiny/model", name)
    candidate = Candidate(f"{hub.url}/tiny/model/resolve/main/{name}", **more)  # type: ignore[arg-type]
    partial = folder / f"{name}.glmchat.incomplete"
    return FileRequest(name, folder / name, partial, [candidate], size=len(file.content), sha256=file.sha256)


def fetch(*files: FileRequest) -> list[FetchedFile]:
    return download(files, on_progress=lambda _: None, cancelled=lambda: False, retry=FAST)


def wait_sent(hub: LoopbackHub, path: str, count: int, child: subprocess.Popen[Any]) -> None:
    """Until so many bytes of a file went to the child, or it ended."""
    wait_until(lambda: hub.sent_for(path) >= count or child.poll() is not None)


def test_eight_kills_cost_at_most_a_megabyte_each(tmp_path: Path) -> None:
    """A small form of benchmarks/kill_pull.py; slow enough that a busy test machine keeps up with the server."""
    chance, size = random.Random(8), 16_000_000
    with LoopbackHub(rate=8_000_000) as hub:
        hub.add("tiny/model", {"big.bin": Synthetic(size, seed=1)})
        file = hub.file("tiny/model", "big.bin")
        command = [sys.executable, "-P", "-c", PULL, f"{hub.url}/tiny/model/resolve/main/big.bin"]
        command += [str(tmp_path), str(size), file.sha256]
        for kill in range(8):
            child = subprocess.Popen(command, cwd="/")
            enough = hub.sent_for("big.bin") + chance.randrange(1, size // 9)
            wait_sent(hub, "big.bin", enough, child)
            child.kill()
            child.wait()
            assert not (tmp_path / "big.bin").exists(), f"whole after kill {kill}"
        assert subprocess.run(command, cwd="/", check=False).returncode == 0
        assert hashlib.sha256((tmp_path / "big.bin").read_bytes()).hexdigest() == file.sha256
        requests = hub.requests_for("big.bin")
        for before, after in pairwise(requests):
            start = (before.range or (0, None))[0]
            again = start + before.sent - (after.range or (0, None))[0]
            assert again <= 1_000_000, f"{again} bytes were asked for again after a kill"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["big.bin"]


@pytest.mark.parametrize("fault", [None, {"cut_after": 11_000_000}, {"stall_after": 10_000_000}])
def test_a_large_file_takes_one_connection_and_one_more_per_break(tmp_path: Path, fault: dict[str, int] | None) -> None:
    """Large bodies are read past the HTTP parser: the same breaks must look the same there."""
    with LoopbackHub() as hub:
        hub.add("tiny/model", {"big.bin": Synthetic(BIG, seed=4)})
        if fault:
            hub.fault("big.bin", **fault)
        (got,) = fetch(one(hub, tmp_path))
        assert got.sha256 == hub.file("tiny/model", "big.bin").sha256
        starts = [request.range for request in hub.requests_for("big.bin")]
        assert starts == [None, *([(next(iter(fault.values())), None)] if fault else [])]


def test_ctrl_c_ends_within_a_second_and_keeps_what_came(tmp_path: Path) -> None:
    with LoopbackHub(rate=2_000_000) as hub:
        hub.add("tiny/model", {"big.bin": Synthetic(BIG), "stalled.bin": Synthetic(BIG, seed=2)})
        hub.fault("stalled.bin", stall_after=100_000, stall_seconds=60)
        asked = [0.0]

        def cancelled() -> bool:
            if not asked[0] and hub.sent_for("big.bin") > 500_000 and hub.sent_for("stalled.bin") >= 100_000:
                asked[0] = time.monotonic()
            return bool(asked[0])

        with pytest.raises(Interrupted) as caught:
            download(
                [one(hub, tmp_path), one(hub, tmp_path, "stalled.bin")],
                on_progress=lambda _: None,
                cancelled=cancelled,
                retry=RetryPolicy(stall=60),
            )
        assert time.monotonic() - asked[0] < 1.0
        assert caught.value.exit == 130
        assert (tmp_path / "big.bin.glmchat.incomplete").stat().st_size > 400_000
        assert (tmp_path / "stalled.bin.glmchat.incomplete").stat().st_size == 100_000


def test_sigint_on_the_command_line_exits_130_in_time(tmp_path: Path) -> None:
    with LoopbackHub(rate=1_000_000) as hub:
        hub.add("tiny/model", {"config.json": b"{}", "model.safetensors": Synthetic(BIG)})
        command = [sys.executable, "-P", "-m", "glmchat", "pull", "tiny/model", "--endpoint", hub.url]
        child = subprocess.Popen(command, cwd="/", stderr=subprocess.PIPE, text=True)
        wait_sent(hub, "model.safetensors", 300_000, child)
        child.send_signal(signal.SIGINT)
        at = time.monotonic()
        _, said = child.communicate(timeout=60)
        assert child.returncode == 130, said
        assert time.monotonic() - at < 20, "far over a second even for a busy machine, and far under a stalled file"
        assert "Traceback" not in said


def test_a_token_reaches_its_own_host_and_no_other(tmp_path: Path) -> None:
    with LoopbackHub(redirect_lfs=True) as hub:
        hub.add("tiny/model", {"big.bin": Synthetic(300_000)})
        fetch(one(hub, tmp_path, headers={"Authorization": "Bearer hf_secret", "Cookie": "a=b"}))
        first, second = hub.requests
        assert first.headers["authorization"] == "Bearer hf_secret"
        assert "authorization" not in second.headers and "cookie" not in second.headers
        assert second.path.startswith("/" + hub.file("tiny/model", "big.bin").sha256)


def test_a_redirect_within_the_host_keeps_the_token(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        hub.add("new/model", {"big.bin": Synthetic(300_000)})
        hub.repos["new/model"].gated_by = "hf_secret"
        hub.moved["tiny/model"] = "new/model"
        file = hub.file("new/model", "big.bin")
        headers = {"Authorization": "Bearer hf_secret"}
        candidate = Candidate(f"{hub.url}/tiny/model/resolve/main/big.bin", headers)
        want = FileRequest("big.bin", tmp_path / "b", tmp_path / "p", [candidate], sha256=file.sha256)
        fetch(want)
        assert (tmp_path / "b").stat().st_size == 300_000


def test_no_error_shows_a_token_a_password_or_a_signature(tmp_path: Path) -> None:
    with LoopbackHub(redirect_lfs=True) as hub:
        hub.add("tiny/model", {"big.bin": Synthetic(300_000)})
        hub.fault("big.bin", status=500, times=None)
        want = one(hub, tmp_path, headers={"Authorization": "Bearer hf_secret"})
        with_password = Candidate(want.candidates[0].url.replace("http://", "http://me:pa55@"))
        for candidates in (want.candidates, [with_password]):
            again = FileRequest("big.bin", want.destination, want.partial, candidates, sha256=want.sha256)
            with pytest.raises(NetworkFailed) as caught:
                fetch(again)
            said = f"{caught.value.message} {caught.value.hint}"
            assert not any(word in said for word in ("hf_secret", "pa55", "signature"))


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "javascript:alert(1)"])
def test_a_redirect_away_from_the_web_is_refused(tmp_path: Path, target: str) -> None:
    with LoopbackHub() as hub:
        hub.add("tiny/model", {"big.bin": Synthetic(1000)})
        hub.fault("big.bin", redirect=target, times=None)
        with pytest.raises((Damaged, Failed)):
            fetch(one(hub, tmp_path))
        assert not (tmp_path / "big.bin").exists()


def test_a_redirect_in_a_circle_ends(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        hub.add("tiny/model", {"big.bin": Synthetic(1000)})
        hub.fault("big.bin", redirect=f"{hub.url}/tiny/model/resolve/main/big.bin?again", times=None)
        with pytest.raises(Damaged, match=r"circle|redirects"):
            fetch(one(hub, tmp_path))


def test_a_full_disk_does_not_fit_and_the_half_file_stays(tmp_path: Path) -> None:
    """A child with a file size limit: the kernel itself refuses the write, as on a FAT disk."""
    with LoopbackHub() as hub:
        hub.add("tiny/model", {"big.bin": Synthetic(3_000_000)})
        want = one(hub, tmp_path)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
        try:
            with pytest.raises(DoesNotFit) as caught:
                fetch(want)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert caught.value.exit == 4
        assert want.partial.stat().st_size == 1_000_000
        (got,) = fetch(want)
        assert got.resumed_from == 1_000_000


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, DoesNotFit), (errno.EDQUOT, DoesNotFit), (errno.EIO, Failed)]
)
def test_what_the_disk_says_becomes_the_right_exit_code(tmp_path: Path, number: int, kind: type) -> None:
    error = disk_error(OSError(number, os.strerror(number)), tmp_path / "x")
    assert type(error) is kind and str(tmp_path) in error.message and error.hint


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("a file where a folder should be")
    with LoopbackHub() as hub:
        hub.add("tiny/model", {"big.bin": Synthetic(1000)})
        with pytest.raises(Failed) as caught:
            fetch(one(hub, tmp_path / "blobs"))
    assert "\n" not in caught.value.message


def test_progress_counts_what_was_here_as_done_and_not_as_speed(tmp_path: Path) -> None:
    with LoopbackHub(rate=4_000_000) as hub:
        hub.add("tiny/model", {"big.bin": Synthetic(8_000_000)})
        want = one(hub, tmp_path)
        content = hub.file("tiny/model", "big.bin").content
        want.partial.write_bytes(b"".join(content.read(at, 1 << 20) for at in range(0, 5 << 20, 1 << 20)))
        seen: list[Progress] = []
        (got,) = download([want], on_progress=seen.append, cancelled=lambda: False)
    assert got.resumed_from == 5 << 20
    done = [look.done for look in seen]
    assert done == sorted(done) and done[-1] == seen[-1].total == 8_000_000
    speeds = [look.bytes_per_second for look in seen if look.bytes_per_second]
    assert speeds and max(speeds) < 5_000_000, "bytes of an earlier run looked like speed"
    assert seen[-1].files[0].state == "done"


def test_many_files_come_at_once_and_in_order(tmp_path: Path) -> None:
    names = [f"part-{number:02d}.bin" for number in range(12)]
    busy, most, calls = [0], [0], itertools.count()
    together = threading.Barrier(4)  # the first bytes of four files wait for each other
    lock = threading.Lock()
    with LoopbackHub() as hub:
        hub.add("tiny/model", {name: Synthetic(200_000, seed=i) for i, name in enumerate(names)})
        pace = hub.pace

        def counted(count: int) -> None:
            with lock:
                first = next(calls) < 4
                busy[0] += 1
                most[0] = max(most[0], busy[0])
            if first:
                together.wait(SECONDS)
            pace(count)
            with lock:
                busy[0] -= 1

        hub.pace = counted  # type: ignore[method-assign]
        got = download(
            [one(hub, tmp_path, name) for name in names],
            on_progress=lambda _: None,
            cancelled=lambda: False,
            concurrency=4,
        )
    assert [file.path for file in got] == names
    assert most[0] == 4


def test_two_names_of_one_blob_are_fetched_once(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        hub.add("tiny/model", {"a.bin": b"same" * 1000, "b.bin": b"same" * 1000})
        a = one(hub, tmp_path, "a.bin")
        b = FileRequest("b.bin", a.destination, a.partial, one(hub, tmp_path, "b.bin").candidates, sha256=a.sha256)
        got = fetch(a, b)
        assert [file.path for file in got] == ["a.bin", "b.bin"]
        assert len(hub.requests) == 1


def test_a_file_that_is_whole_is_hashed_and_not_asked_for(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        hub.add("tiny/model", {"big.bin": Synthetic(300_000)})
        want = one(hub, tmp_path)
        fetch(want)
        (got,) = fetch(want)
        assert len(hub.requests) == 1 and got.host == "" and got.sha256 == want.sha256
        want.destination.write_bytes(b"\0" * 300_000)
        fetch(want)
        assert hashlib.sha256(want.destination.read_bytes()).hexdigest() == want.sha256


def test_one_file_that_fails_stops_the_others(tmp_path: Path) -> None:
    with LoopbackHub(rate=2_000_000) as hub:
        hub.add("tiny/model", {"big.bin": Synthetic(BIG), "gone.bin": b"x"})
        gone = one(hub, tmp_path, "gone.bin")
        del hub.repos["tiny/model"].commits[hub.repos["tiny/model"].refs["main"]]["gone.bin"]
        with pytest.raises(Failed, match="gone"):
            fetch(one(hub, tmp_path), gone)
        assert hub.sent_for("big.bin") < BIG


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Peak of a whole pull in a process of its own; the program itself takes most of it."""
    peaks = []
    for size in (1_000_000, 120_000_000):
        with LoopbackHub() as hub:
            hub.add("tiny/model", {"big.bin": Synthetic(size)})
            sha = hub.file("tiny/model", "big.bin").sha256
            folder = tmp_path / str(size)
            folder.mkdir()
            code = PULL + PEAK
            url = f"{hub.url}/tiny/model/resolve/main/big.bin"
            command = [sys.executable, "-P", "-c", code, url, str(folder), str(size), sha]
            told = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True)
            peaks.append(int(told.stdout))
            (folder / "big.bin").unlink()
    assert peaks[1] < 150_000_000
    assert peaks[1] - peaks[0] < 15_000_000


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120.0),
        ("Thu, 01 Jan 1970 00:02:00 GMT", 20.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("soon", None),
        (None, None),
    ],
)
def test_retry_after_is_read_in_both_forms(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, now=lambda: 100.0) == seconds


@pytest.mark.parametrize("kind", ["pipe", "socket", "endless device", "folder"])
def test_what_is_no_file_where_a_half_one_lies_is_told_in_one_line(tmp_path: Path, kind: str) -> None:
    put(kind, tmp_path / "x.glmchat.incomplete")
    with pytest.raises(Failed) as caught:
        PartialFile(tmp_path / "x.glmchat.incomplete")
    assert str(tmp_path) in caught.value.message and caught.value.hint
