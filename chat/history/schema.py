"""The tables of the history, and the steps from each older version to the next."""

from __future__ import annotations

import sqlite3

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
                "the history was written by a newer glmchat (schema {version}, this one knows {VERSION})",
                version=version,
                VERSION=VERSION,
            ),
            hint=tr("update glmchat, or run with --no-history"),
            code="history.newer",
        )
