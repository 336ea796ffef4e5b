"""The tables of the history, the steps from each older version to the next, and its statements.

Every name in them is fixed here; values always go in as parameters.
"""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import stat
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from glmchat.chat.history.rows import CLEAR
from glmchat.core import files, locations
from glmchat.core.errors import FULL, Failed
from glmchat.core.files import read_text
from glmchat.core.language import tr

# rowid: a message's id, or minus a conversation's id for its title. The text has every CJK character set off.
SEARCH = "CREATE VIRTUAL TABLE search USING fts5(text, prefix='2 3', tokenize='unicode61 remove_diacritics 2')"
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
        SEARCH,
    ),
)
VERSION = len(STEPS)
_LOGS = (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83")  # how a -wal begins (SQLite, "Database File Format", 4.1)


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
# On a full disk it cannot make the file of its shared memory either, and calls that an I/O error.
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE)


@dataclass(slots=True)
class Opened:
    """A database that is ready. `problem` says why nothing is saved, full that it is for lack of room; `note` is told
    once."""

    connection: sqlite3.Connection
    journal: str  # "wal" | "delete" | "read-only" | "memory"
    problem: str | None = None
    full: bool = False
    note: str | None = None


def is_damage(error: sqlite3.Error | UnicodeDecodeError) -> bool:
    if isinstance(error, UnicodeDecodeError):  # SQLite quotes what is no text in the tables' definitions
        return True
    code = getattr(error, "sqlite_errorcode", None)
    return code is not None and (code & 0xFF) in _DAMAGE


def is_full(error: sqlite3.Error | OSError) -> bool:
    """The disk has no room."""
    if isinstance(error, OSError):
        return error.errno in FULL
    return getattr(error, "sqlite_errorcode", None) in _FULL


def reason(error: sqlite3.Error) -> str:
    """SQLite's own words, but where they lead astray."""
    no_room = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_IOERR_SHMSIZE
    return os.strerror(errno.ENOSPC) if no_room else str(error)


def filesystem(path: Path) -> str | None:
    """The type of the file system that holds `path` ("ext4", "nfs4"); None if it cannot be told."""
    resolved = str(path.resolve())
    best: tuple[int, str | None] = (-1, None)
    for where, kind in _mounts():
        mount = where.rstrip("/") + "/"
        if (resolved + "/").startswith(mount) and len(mount) >= best[0]:
            best = (len(mount), kind)
    return best[1]


def _mounts() -> list[tuple[str, str]]:
    """Where file systems are mounted, and their types. Each start looks here; importing psutil takes 10 ms."""
    try:
        lines = read_text(Path("/proc/self/mounts"), errors="surrogateescape").splitlines()
    except OSError:
        import psutil

        try:
            return [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]
        except (OSError, psutil.Error):
            return []
    fields = [line.split(" ") for line in lines]
    # Blanks in a path are written as octal numbers.
    return [(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), row[1]), row[2]) for row in fields if len(row) > 2]


def is_network(path: Path) -> bool:
    """WAL needs shared memory between its users, which network file systems do not give."""
    return (filesystem(path) or "").lower().startswith(NETWORK)


def open_in_memory(problem: str | None = None, *, full: bool = False) -> Opened:
    connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    prepare(connection)
    return Opened(connection, "memory", problem, full)


def open_database(path: Path) -> Opened:
    """Open or create the history. Never fails for a bad disk: what cannot be written to is read, or held in memory."""
    try:
        locations.private_dir(path.parent)
        create_private(path)
    except (Failed, OSError) as error:
        problem = error.message if isinstance(error, Failed) else f"{path}: {error.strerror}"
        return _open_read_only(path, problem, isinstance(error, OSError) and is_full(error))
    lost = _damaged_log(path)
    try:
        opened = _open_writable(path)
        if lost is not None:
            opened.note = tr("What the history took last was damaged. It was moved to {path}.", path=lost.name)
        return opened
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        if isinstance(error, sqlite3.Error) and not is_damage(error):
            return _open_read_only(path, f"{path}: {reason(error)}", is_full(error))
    aside = set_aside(path)
    opened = _open_writable(path)
    _far_above(opened.connection)
    opened.note = tr("The history was damaged. It was moved to {path}, and a new one was started.", path=aside.name)
    return opened


def _damaged_log(path: Path) -> Path | None:
    """Where the log beside the database lies now, if it was none: SQLite takes such a one for an empty one, and writes
    over it without a word."""
    log = path.with_name(path.name + "-wal")
    with suppress(OSError):
        with files.open_file(log) as file:
            begin = file.read(4)
        return files.set_aside(log) if begin and begin not in _LOGS else None
    return None


def create_private(path: Path) -> None:
    """The file exists with mode 0600 before SQLite opens it; SQLite gives -wal and -shm the same mode. Raises OSError,
    also for a pipe, a device or a folder in its place, which nothing is done to."""
    if path.exists():
        files.open_file(path).close()
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600))
    status = path.stat()
    ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid() and not path.is_symlink()
    if ours and status.st_mode & 0o077:  # what a link leads to may be another program's
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


def _open_read_only(path: Path, problem: str, full: bool) -> Opened:
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
            return Opened(connection, "read-only", problem, full)
    return open_in_memory(problem, full=full)


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
    aside = files.set_aside(path)
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
        return open_in_memory(f"{path}: {error.strerror}", full=is_full(error))
    opened.note = tr("The history was damaged. It was moved to {path}, and a new one was started.", path=aside.name)
    return opened


# ruff: noqa: S608


_HEAD = "id, title, renamed, model, created, updated, sequence, pinned, settings, draft, leaf"
_HEADS = (
    f"SELECT {_HEAD}, (SELECT count(*) FROM message m WHERE m.conversation = c.id AND m.deletion IS NULL"
    f" AND m.role <> '{CLEAR}') FROM conversation c WHERE deletion IS NULL"
)
_LATEST_FIRST = "sequence DESC, updated DESC, id DESC"  # imports share the number of what they came after
LIST_HEADS = f"{_HEADS} ORDER BY pinned DESC, {_LATEST_FIRST} LIMIT ? OFFSET ?"
ONE_HEAD = f"{_HEADS} AND id = ?"
LAST_HEAD = (
    f"{_HEADS} AND EXISTS (SELECT 1 FROM message m WHERE m.conversation = c.id AND m.deletion IS NULL)"
    f" ORDER BY {_LATEST_FIRST} LIMIT 1"
)
USED_BEFORE = "SELECT max(sequence) FROM conversation WHERE updated <= ? AND id < ? AND sequence <> 0"
LAST_DRAFT = (
    f"SELECT * FROM ({_HEADS} ORDER BY {_LATEST_FIRST} LIMIT 1) AS newest WHERE draft <> ''"
    " AND NOT EXISTS (SELECT 1 FROM message m WHERE m.conversation = newest.id AND m.deletion IS NULL)"
)
LAST_QUESTIONS = (
    "SELECT m.text FROM message m JOIN conversation c ON c.id = m.conversation"
    " WHERE m.role = 'user' AND m.deletion IS NULL AND c.deletion IS NULL ORDER BY m.id DESC LIMIT ?"
)
_INSERT_HEAD = f"INSERT INTO conversation ({_HEAD}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO "


def write_head(changed: Collection[str]) -> str:
    """Insert a conversation, or set those of its columns that changed here."""
    columns = [f"{name} = excluded.{name}" for name in _HEAD.split(", ") if name in changed and name != "id"]
    return _INSERT_HEAD + (f"UPDATE SET {', '.join(columns)}" if columns else "NOTHING")


_MESSAGE = "id, conversation, parent, role, text, state, created, token_ids, details, chosen, deletion, owner"
MESSAGES = f"SELECT {_MESSAGE} FROM message WHERE conversation = ? ORDER BY id"
STREAMING = (
    f"SELECT {_MESSAGE}, (SELECT updated FROM conversation c WHERE c.id = message.conversation)"
    " FROM message WHERE state = 'streaming'"
)
STREAM_OWNERS = (
    "SELECT id, owner, (SELECT count(*) FROM piece WHERE piece.message = message.id)"
    " FROM message WHERE conversation = ? AND state = 'streaming'"
)
ALL_STREAMS = (
    "SELECT m.conversation, m.owner FROM message m JOIN conversation c ON c.id = m.conversation"
    " WHERE m.state = 'streaming' AND m.deletion IS NULL AND c.deletion IS NULL ORDER BY m.id DESC"
)
WRITE_MESSAGE = (
    f"INSERT INTO message ({_MESSAGE}) VALUES (?, ?, ?, ?, CAST(handed(?) AS TEXT), ?, ?, handed(?), ?, ?, ?, ?)"
    " ON CONFLICT (id) DO UPDATE SET"
    " parent = excluded.parent, text = excluded.text, state = excluded.state, token_ids = excluded.token_ids,"
    " details = excluded.details, chosen = excluded.chosen, deletion = excluded.deletion, owner = excluded.owner"
)
PIECES = "SELECT text, token_ids FROM piece WHERE message = ? ORDER BY number"
WRITE_PIECE = "INSERT INTO piece SELECT ?, coalesce(max(number), 0) + 1, ?, ? FROM piece WHERE message = ?"
INDEX = "INSERT INTO search (rowid, text) VALUES (?, CAST(handed(?) AS TEXT))"
INDEX_AGAIN = "UPDATE search SET text = CAST(handed(?) AS TEXT) WHERE rowid = ?"
INDEX_ALL = (
    "INSERT OR REPLACE INTO search (rowid, text) SELECT id, spaced(CAST(text AS BLOB)) FROM message"
    " WHERE state <> 'streaming' AND text <> ''",
    "INSERT OR REPLACE INTO search (rowid, text) SELECT -id, spaced(CAST(title AS BLOB)) FROM conversation"
    " WHERE title <> '' AND (renamed OR NOT EXISTS (SELECT 1 FROM message WHERE conversation = conversation.id"
    " AND role = 'user' AND instr(text, rtrim(title, '…'))))",
)
TOUCH_SEARCH = (
    "SELECT text FROM search ORDER BY rowid DESC LIMIT 1",
    "SELECT rowid FROM search WHERE search MATCH 'a' LIMIT 1",
)
FORGET_PIECES = "DELETE FROM piece WHERE message = ?"

GIVE_TITLE = "UPDATE conversation SET title = ? WHERE id = ? AND title = ? AND NOT renamed"
_HIT = "c.id, c.title, m.id, m.role, coalesce(m.text, c.title), coalesce(m.created, c.created)"
_LIVING = "c.deletion IS NULL AND (m.id IS NULL OR m.deletion IS NULL)"
_HITS = (
    "FROM search s LEFT JOIN message m ON m.id = s.rowid"
    " JOIN conversation c ON c.id = coalesce(m.conversation, -s.rowid)"
    f" WHERE search MATCH ? AND {_LIVING}"
)
HITS = f"SELECT {_HIT} {_HITS} ORDER BY s.rowid DESC LIMIT ? OFFSET ?"
COUNT_HITS = f"SELECT count(*) {_HITS}"
_SCANNED = f"FROM message m JOIN conversation c ON c.id = m.conversation WHERE instr(m.text, ?) AND {_LIVING}"
SCAN = f"SELECT {_HIT} {_SCANNED} ORDER BY m.id DESC LIMIT ? OFFSET ?"
COUNT_SCAN = f"SELECT count(*) {_SCANNED}"

# A purged message's children move up one step, so the branch stays whole.
PURGE_MESSAGE = (
    "UPDATE message SET parent = :parent WHERE parent = :id",
    "UPDATE conversation SET leaf = :parent WHERE leaf = :id",
    "DELETE FROM search WHERE rowid = :id",
    "DELETE FROM piece WHERE message = :id",
    "DELETE FROM message WHERE id = :id",
)
PURGE_CONVERSATION = (
    "DELETE FROM search WHERE rowid = -:id",
    "DELETE FROM search WHERE rowid IN (SELECT id FROM message WHERE conversation = :id)",
    "DELETE FROM piece WHERE message IN (SELECT id FROM message WHERE conversation = :id)",
    "DELETE FROM message WHERE conversation = :id",
    "DELETE FROM conversation WHERE id = :id",
    "DELETE FROM deletion WHERE conversation = :id",
)
RESTORE = (
    "UPDATE conversation SET deletion = NULL WHERE deletion = :id",
    "UPDATE message SET deletion = NULL WHERE deletion = :id",
    "DELETE FROM deletion WHERE id = :id",
)
PROBES = (
    "SELECT * FROM conversation ORDER BY id DESC LIMIT 1",
    "SELECT * FROM message ORDER BY id DESC LIMIT 1",
    "SELECT * FROM deletion ORDER BY id DESC LIMIT 1",
    "SELECT value FROM counter",
)
