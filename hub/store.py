"""The Hugging Face cache as files: where content lies by its hash, how it is locked and linked, the disk's room.

Content is named by sha256 (git-lfs and the hub's big files) or by git's blob id (its small ones).
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from glmchat.core import locations
from glmchat.core.errors import DoesNotFit, Failed, Interrupted
from glmchat.core.files import open_file, read_text
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line

BLOCK = 1 << 20  # bytes read at a time: large enough for disks, small enough for memory and for Ctrl-C


def sha256_of(
    path: Path, *, on_bytes: Callable[[int], None] | None = None, cancelled: Callable[[], bool] | None = None
) -> str:
    """sha256 of a file's content in hex. `on_bytes` hears the length of each block. Raises Interrupted, OSError."""
    return _feed(hashlib.sha256(), path, on_bytes, cancelled)


def git_blob_of(path: Path) -> str:
    """The id git gives the file: sha1 of "blob <size>" NUL content (gitformat-objects)."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    return _feed(digest, path, None, None)


def git_blob_of_bytes(content: bytes) -> str:
    """`git_blob_of` for content in memory."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _feed(
    digest: hashlib._Hash,
    path: Path,
    on_bytes: Callable[[int], None] | None,
    cancelled: Callable[[], bool] | None,
) -> str:
    with open_file(path) as file:
        block = bytearray(BLOCK)
        view = memoryview(block)
        while count := file.readinto(block):
            if cancelled is not None and cancelled():
                raise Interrupted(
                    tr("stopped while checking a file"), hint=tr("run the same command again"), code="pull.interrupted"
                )
            digest.update(view[:count])
            if on_bytes is not None:
                on_bytes(count)
    return digest.hexdigest()


PARTIAL = ".glmchat.incomplete"
# Kept free beside what a pull needs: file systems slow down and programs fail on the last megabytes.
SPARE = 64 * 1024 * 1024


def repo_folder(repo: str) -> Path:
    return locations.hf_cache() / f"models--{repo.replace('/', '--')}"


def snapshot(repo: str, commit: str) -> Path:
    return repo_folder(repo) / "snapshots" / commit


def blob(repo: str, etag: str) -> Path:
    return repo_folder(repo) / "blobs" / etag


def partial(repo: str, etag: str) -> Path:
    return repo_folder(repo) / "blobs" / f"{etag}{PARTIAL}"


def ref(repo: str, name: str) -> str | None:
    """The commit that `refs/<name>` holds, or None."""
    try:
        return read_text(repo_folder(repo) / "refs" / name, 4096).strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def write_ref(repo: str, name: str, commit: str) -> None:
    path = repo_folder(repo) / "refs" / name
    if ref(repo, name) == commit:  # nothing to write, also in a cache that only others may write
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, path) from None
    write_whole(path, commit.encode())


def write_whole(path: Path, content: bytes, *, mode: int | None = None) -> None:
    """A file is whole or absent: written beside its place, flushed to disk, renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a link that somebody put there would be followed
        with temporary.open("xb") as file:
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):  # on a read-only disk this fails too, also for a file that is not there
            temporary.unlink()
        raise disk_error(error, path) from None


def link(repo: str, commit: str, path: str, etag: str, *, last: bool = True) -> None:
    """Put `snapshots/<commit>/<path>` in place as a relative link to the blob, replacing what is there.

    On a disk without links (exFAT, some network shares) the blob itself takes that place, as huggingface_hub does it:
    a model is stored once. last: no other file of this pull has the same content.
    """
    place = snapshot(repo, commit) / path
    target = blob(repo, etag)
    if not target.exists() and place.is_file() and not place.is_symlink():
        return  # it has taken that place already, or the cache was copied without its links
    relative = os.path.relpath(target, place.parent)
    if place.is_symlink() and place.readlink() == Path(relative):
        return
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        try:
            _symlink(temporary, relative)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EACCES):
                raise
            if last and etag not in linked_blobs(repo_folder(repo)):
                target.replace(place)
                return
            shutil.copyfile(target, temporary)
        temporary.replace(place)
    except OSError as error:
        raise disk_error(error, place) from None


def _symlink(place: Path, target: str) -> None:
    """Raises OSError where there can be none, or where the user wants none."""
    if os.environ.get("HF_HUB_DISABLE_SYMLINKS", "").lower() in ("1", "true", "yes", "on"):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    place.symlink_to(target)


def linked_blobs(repo_folder: Path) -> set[str]:
    """Names of the blobs that some snapshot links to."""
    return {p.readlink().name for p in repo_folder.glob("snapshots/**/*") if p.is_symlink()}


def lock_path(repo: str, etag: str) -> Path:
    return locations.hf_cache() / ".locks" / f"models--{repo.replace('/', '--')}" / f"{etag}.lock"


@contextmanager
def locked(
    repo: str, etags: Sequence[str], *, cancelled: Callable[[], bool], waiting: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Hold the hub's own locks of these blobs. Waits for another process, and says so once through `waiting`.

    The locks are taken in sorted order, so that two pulls that share files cannot wait for each other for ever.
    """
    notices: list[bool] = []

    def say() -> None:
        if not notices:
            notices.append(True)
            waiting()

    with ExitStack() as held:
        for etag in sorted(set(etags)):
            path = lock_path(repo, etag)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise disk_error(error, path) from None
            held.enter_context(_held(path, cancelled, say))
        yield


@contextmanager
def alone(folder: Path, cancelled: Callable[[], bool], waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """One pull at a time into this folder of ours; a second one waits, says so, and then finds the files."""
    with _held(folder / ".pull.lock", cancelled, waiting):
        yield


@contextmanager
def _held(path: Path, cancelled: Callable[[], bool], waiting: Callable[[], None]) -> Iterator[None]:
    from filelock import FileLock, Timeout

    is_announced = False
    with ExitStack() as held:
        while True:
            if cancelled():
                raise stopped()
            try:
                held.enter_context(FileLock(path).acquire(timeout=0.2))
                break
            except Timeout:
                if not is_announced:
                    waiting()
                    is_announced = True
            except NotImplementedError:  # a file system without flock: the rename at the end is atomic anyway
                break
            except OSError as error:
                raise disk_error(error, path) from None
        yield


def in_use(repo: str, etag: str) -> bool:
    """True if some process writes this blob now."""
    from filelock import FileLock, Timeout

    path = lock_path(repo, etag)
    if not path.exists():
        return False
    try:
        with FileLock(path).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):
        return False


def free_bytes(path: Path) -> int:
    """What a person without root may still write where `path` is or will be."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def require_space(needed: int, where: Path) -> None:
    """Raises DoesNotFit (exit 4) with the numbers if `needed` bytes and a small reserve do not fit."""
    if needed <= 0:
        return
    free = free_bytes(where)
    if needed + SPARE > free:
        raise DoesNotFit(
            tr(
                "{where} needs {needed} of free space and has {free}",
                needed=human_bytes(needed + SPARE),
                where=where,
                free=human_bytes(free),
            ),
            hint=tr(
                "run glmchat prune or glmchat rm MODEL, or set HF_HUB_CACHE (GLMCHAT_HOME) to a folder on a larger disk"
            ),
            code="pull.disk",
        )


def fits(needed: int, free: int) -> bool:
    return needed == 0 or needed + SPARE <= free


def space_lines(needed: int, free: int) -> list[str]:
    """What a plan says of the disk, for people."""
    lines = [tr("needs {needed}, {free} free on the disk", needed=human_bytes(needed), free=human_bytes(free))]
    return lines if fits(needed, free) else [*lines, tr("it does not fit on the disk")]


def disk_error(error: OSError, path: Path) -> Failed | DoesNotFit:
    """An OSError while writing `path`, in words: a full disk does not fit (exit 4), anything else failed (exit 1)."""
    where = one_line(str(path.parent))
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return DoesNotFit(
                tr("the disk is full: no room left in {path}", path=where) + _free_words(path.parent),
                hint=tr("free some space and run the same command again: the files downloaded so far are kept"),
                code="disk.full",
            )
        case errno.EFBIG:
            return DoesNotFit(
                tr("the disk at {path} cannot hold a file this large", path=where),
                hint=tr("FAT32 is limited to 4.3 GB per file: format the disk as exFAT, or use another one"),
                code="disk.file_size",
            )
    return Failed(
        tr("cannot write in {path}: {reason}", path=where, reason=error.strerror or error),
        hint=tr("check the folder's owner and permissions, and that the disk is mounted"),
        code="disk.write",
    )


def _free_words(folder: Path) -> str:
    try:
        return tr(" ({size} free)", size=human_bytes(free_bytes(folder)))
    except OSError:
        return ""


def stopped() -> Interrupted:
    return Interrupted(
        tr("stopped; the files downloaded so far are kept"),
        hint=tr("run the same command to resume"),
        code="pull.interrupted",
    )


def now() -> str:
    """The time as manifests write it, UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
