"""What was deleted: it can be brought back for a week, then it is removed from the file."""

from __future__ import annotations

import time
from collections.abc import Collection

from glmchat.chat.history import statements as sql
from glmchat.chat.history.store import Store

KEPT_DELETED_DAYS = 7.0  # how long a deletion can be undone


def add_deletion(store: Store, conversation: int, leaf: int | None) -> int:
    """The number of a new deletion. leaf: the branch that was open before."""
    deletion = store.reserve("deletion")
    values = (deletion, conversation, time.time(), leaf)
    store.attempt(lambda: store.run("INSERT INTO deletion VALUES (?, ?, ?, ?)", values))
    return deletion


def purge_old(store: Store) -> None:
    limit = time.time() - KEPT_DELETED_DAYS * 86400
    old = [int(i) for (i,) in store.rows("SELECT id FROM deletion WHERE created < ?", (limit,))]
    if old:
        purge(store, old)


def purge(store: Store, deletions: Collection[int]) -> None:
    """Remove what these deletions hide, in one transaction, overwritten in the file."""
    store.secure_delete()

    def write() -> None:
        for deletion in deletions:
            for (conversation,) in store.rows("SELECT id FROM conversation WHERE deletion = ?", (deletion,)):
                store.run_all(sql.PURGE_CONVERSATION, {"id": conversation})
            # The newest first: each one's children are gone or moved before it goes itself.
            doomed = store.rows("SELECT id, parent FROM message WHERE deletion = ? ORDER BY id DESC", (deletion,))
            for message, parent in doomed:
                store.run_all(sql.PURGE_MESSAGE, {"id": message, "parent": parent})
            store.run("DELETE FROM deletion WHERE id = ?", (deletion,))
        # The index keeps the words of a deleted row until its segments are merged.
        store.run("INSERT INTO search (search) VALUES ('optimize')")

    if deletions and store.attempt(write) and store.journal == "wal":
        store.rows("PRAGMA wal_checkpoint(TRUNCATE)")  # the log holds the old pages
