"""The SQL of the history. Every name in it is fixed here; values always go in as parameters."""
# ruff: noqa: S608

from __future__ import annotations

from collections.abc import Collection

from glmchat.chat.history.rows import CLEAR

_HEAD = "id, title, renamed, model, created, updated, sequence, pinned, settings, draft, leaf"
_HEADS = (
    f"SELECT {_HEAD}, (SELECT count(*) FROM message m WHERE m.conversation = c.id AND m.deletion IS NULL"
    f" AND m.role <> '{CLEAR}') FROM conversation c WHERE deletion IS NULL"
)
LIST_HEADS = f"{_HEADS} ORDER BY pinned DESC, sequence DESC LIMIT ? OFFSET ?"
ONE_HEAD = f"{_HEADS} AND id = ?"
LAST_HEAD = (
    f"{_HEADS} AND EXISTS (SELECT 1 FROM message m WHERE m.conversation = c.id AND m.deletion IS NULL)"
    " ORDER BY sequence DESC LIMIT 1"
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
STREAM_OWNERS = "SELECT owner FROM message WHERE conversation = ? AND state = 'streaming'"
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
FORGET_PIECES = "DELETE FROM piece WHERE message = ?"

_HIT = "c.id, c.title, m.id, m.role, coalesce(m.text, c.title), coalesce(m.created, c.created)"
_LIVING = "c.deletion IS NULL AND (m.id IS NULL OR m.deletion IS NULL)"
_FOUND = (
    "FROM search s LEFT JOIN message m ON m.id = s.rowid"
    " JOIN conversation c ON c.id = coalesce(m.conversation, -s.rowid)"
    f" WHERE search MATCH ? AND {_LIVING}"
)
HITS = f"SELECT {_HIT} {_FOUND} ORDER BY s.rowid DESC LIMIT ? OFFSET ?"
COUNT_HITS = f"SELECT count(*) {_FOUND}"
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
