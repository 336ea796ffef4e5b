"""The tables of the history, and the steps from each older version to the next."""

from __future__ import annotations

import os
import sqlite3
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

from glmchat.chat.history.statements import PROBES
from glmchat.core import locations
from glmchat.core.errors import Failed
from glmchat.core.language import tr

# `user_version` counts the steps that a database has been through. A step is never changed once it was released.
STEPS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE conversation (
            id INTEGER PRIMARY KEY, title TEXT NOT NULL DEFAULT '', renamed INTEGER NOT NULL DEFAULT 0, model TEXT,
            created REAL NOT NULL, updated REAL NOT NULL, sequence INTEGER NOT NULL, pinned INTEGER NOT NULL DEFAULT 0,
            settings TEXT NOT NULL DEFAULT '{}', draft TEXT NOT NULL DEFAULT '', leaf INTEGER, deletion INTEGER)""",
        "CREATE INDEX conversation_order ON conversation (pinned DESC, sequence DESC)",
        """CREATE TABLE message (
            id INTEGER PRIMARY KEY, conversation INTEGER NOT NULL, parent INTEGER, role TEXT NOT NULL,
            text TEXT NOT NULL, state TEXT NOT NULL, created REAL NOT NULL, token_ids BLOB,
            details TEXT NOT NULL DEFAULT '{}', chosen INTEGER, deletion INTEGER, owner TEXT)""",
        "CREATE INDEX message_conversation ON message (conversation, id)",
        "CREATE INDEX message_streaming ON message (state) WHERE state = 'streaming'",
        # An answer while it streams: one row a flush, joined into the message when it ends. Rewriting a long answer
        # twice a second would write its length squared.
        """CREATE TABLE piece (
            message INTEGER NOT NULL, number INTEGER NOT NULL, text TEXT NOT NULL, token_ids BLOB,
            PRIMARY KEY (message, number)) WITHOUT ROWID""",
        """CREATE TABLE deletion (
            id INTEGER PRIMARY KEY, conversation INTEGER NOT NULL, created REAL NOT NULL, leaf INTEGER)""",
        # Ids and sequence numbers that are never given twice, whatever was purged.
        "CREATE TABLE counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
        "INSERT INTO counter VALUES ('conversation', 0), ('message', 0), ('deletion', 0), ('sequence', 0)",
        # rowid: a message's id, or minus a conversation's id for its title. The text has every CJK character set off.
        "CREATE VIRTUAL TABLE search USING fts5(text, prefix='2 3', tokenize='unicode61 remove_diacritics 2')",
    ),
)
VERSION = len(STEPS)


def prepare(connection: sqlite3.Connection) -> None:
    """Bring the database to this version, in one transaction a step. Raises Failed if a newer glmchat wrote it."""
    while (version := int(connection.execute("PRAGMA user_version").fetchone()[0])) < VERSION:
        connection.execute("BEGIN IMMEDIATE")
        try:
            # Another window may have done the step while this one waited for the lock.
            if int(connection.execute("PRAGMA user_version").fetchone()[0]) == version:
                for statement in STEPS[version]:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {version + 1}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:  # a full disk has made SQLite roll back already
                connection.execute("ROLLBACK")
            raise
    if version > VERSION:
        raise Failed(
            tr(
                "the history was written by a newer version of glmchat (schema {version}, this one reads {VERSION})",
                version=version,
                VERSION=VERSION,
            ),
            hint=tr("update glmchat, or run with --no-history"),
            code="history.newer",
        )


LOCK_SECONDS = 5.0  # how long one window waits for another's write
NETWORK = ("nfs", "cifs", "smb", "9p", "afs", "fuse.sshfs", "ceph", "lustre", "gpfs", "beegfs", "webdav", "davfs")
# What SQLite says of a file that is no sound database; everything else may pass (locks, a full disk).
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@dataclass(slots=True)
class Opened:
    """A database that is ready. `problem` says why nothing is saved; `note` is told once."""

    connection: sqlite3.Connection
    journal: str  # "wal" | "delete" | "memory"
    problem: str | None = None
    note: str | None = None


def is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and (code & 0xFF) in _DAMAGE


def filesystem(path: Path) -> str | None:
    """The type of the file system that holds `path` ("ext4", "nfs4"); None if it cannot be told."""
    resolved = str(path.resolve())
    best: tuple[int, str | None] = (-1, None)
    try:
        partitions = psutil.disk_partitions(all=True)
    except (OSError, psutil.Error):
        return None
    for part in partitions:
        mount = part.mountpoint.rstrip("/") + "/"
        if (resolved + "/").startswith(mount) and len(mount) >= best[0]:
            best = (len(mount), part.fstype)
    return best[1]


def is_network(path: Path) -> bool:
    """WAL needs shared memory between its users, which network file systems do not give."""
    return (filesystem(path) or "").lower().startswith(NETWORK)


def open_in_memory(problem: str | None = None) -> Opened:
    connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    prepare(connection)
    return Opened(connection, "memory", problem)


def open_database(path: Path) -> Opened:
    """Open or create the history. Never fails for a bad disk: what cannot be written to is read, or held in memory."""
    try:
        locations.private_dir(path.parent)
        create_private(path)
    except (Failed, OSError) as error:
        problem = error.message if isinstance(error, Failed) else f"{path}: {error.strerror}"
        return _open_read_only(path, problem)
    try:
        return _open_writable(path)
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            return _open_read_only(path, f"{path}: {error}")
    aside = set_aside(path)
    opened = _open_writable(path)
    _far_above(opened.connection)
    opened.note = tr("The history was damaged. It was moved to {path}, and a new one was started.", path=aside.name)
    return opened


def create_private(path: Path) -> None:
    """The file exists with mode 0600 before SQLite opens it; SQLite gives -wal and -shm the same mode."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    if path.stat().st_mode & 0o077 and path.stat().st_uid == os.getuid():
        path.chmod(0o600)


def _open_writable(path: Path) -> Opened:
    connection = sqlite3.connect(path, timeout=LOCK_SECONDS, check_same_thread=False, isolation_level=None)
    try:
        journal = "delete" if is_network(path) else "wal"
        journal = str(connection.execute(f"PRAGMA journal_mode = {journal}").fetchone()[0]).lower()
        # WAL with NORMAL loses nothing to a killed process, only to a power cut; a rollback journal needs FULL.
        connection.execute(f"PRAGMA synchronous = {'NORMAL' if journal == 'wal' else 'FULL'}")
        prepare(connection)
        _probe(connection)
    except BaseException:
        connection.close()
        raise
    return Opened(connection, journal)


def _open_read_only(path: Path, problem: str) -> Opened:
    """What was saved before can still be read where the disk takes no more; else the history lives in memory."""
    if path.is_file():
        # immutable: on a read-only disk SQLite cannot make the files beside it that WAL needs.
        for mode in ("mode=ro", "mode=ro&immutable=1"):
            connection: sqlite3.Connection | None = None
            try:
                connection = sqlite3.connect(
                    f"{path.absolute().as_uri()}?{mode}", uri=True, check_same_thread=False, isolation_level=None
                )
                _probe(connection)
            except sqlite3.Error:
                if connection is not None:
                    connection.close()
                continue
            return Opened(connection, "read-only", problem)
    return open_in_memory(problem)


def _probe(connection: sqlite3.Connection) -> None:
    """Touch each table's end: cheap, and finds the files that were cut short or overwritten."""
    for statement in PROBES:
        connection.execute(statement).fetchall()


def _far_above(connection: sqlite3.Connection) -> None:
    """Numbers in a file that follows a damaged one: other windows still hold conversations with numbers from that."""
    with suppress(sqlite3.OperationalError):  # a disk that takes nothing gives no numbers either
        connection.execute("UPDATE counter SET value = max(value, 10000) WHERE name IN ('conversation', 'deletion')")
        connection.execute("UPDATE counter SET value = max(value, 1000000000) WHERE name = 'message'")


def set_aside(path: Path) -> Path:
    """Rename a damaged database and what lies beside it; nothing is deleted."""
    stamp = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    aside = path.with_name(f"{path.name}.corrupt-{stamp}")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.corrupt-{stamp}-{number}")
    path.rename(aside)
    for suffix in ("-wal", "-shm", "-journal"):
        beside = path.with_name(path.name + suffix)
        if beside.exists():
            beside.rename(aside.with_name(aside.name + suffix))
    return aside


def replace_damaged(path: Path) -> Opened:
    """Damage that showed only while the history was in use: set the file aside and begin a new one."""
    try:
        aside = set_aside(path)
        opened = open_database(path)
        _far_above(opened.connection)
    except OSError as error:
        return open_in_memory(f"{path}: {error.strerror}")
    opened.note = tr("The history was damaged. It was moved to {path}, and a new one was started.", path=aside.name)
    return opened
