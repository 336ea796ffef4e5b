"""The log of an engine, or of a chat that lost its terminal: one private file each, the newest few kept."""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from glmchat.core.errors import Failed
from glmchat.core.language import tr
from glmchat.core.locations import logs_dir, private_dir
from glmchat.core.text import one_line

KEPT = 10


def new_log(kind: str = "engine") -> tuple[Path, IO[bytes]]:
    """A new file of mode 0600 for a process's stderr, and its writing end. Old ones of the kind are removed."""
    try:
        folder = private_dir(logs_dir())
        writable = os.access(folder, os.W_OK)
    except Failed:
        writable = False
    if not writable:  # a home that takes no files must not stop the chat
        folder = Path(tempfile.mkdtemp(prefix="glmchat-log-"))
    for old in sorted(folder.glob(f"{kind}-*.log"))[: -KEPT + 1]:  # the names sort by time
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
    """The last line that says something, from the log's last 8 kB; safe to show."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((one_line(line.strip(), 300) for line in reversed(lines) if line.strip()), "")
