"""What the history does for itself: mark what a crash left, and forget for good what was deleted."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace

from glmchat.chat.history import statements as sql
from glmchat.chat.history.owners import is_alive
from glmchat.chat.history.store import Store, to_message

KEPT_DELETED_DAYS = 7.0  # how long a deletion can be undone
FOREIGN_OWNER_SECONDS = 600.0  # a writer on another machine cannot be asked; it counts as alive this long


def mark_interrupted(store: Store) -> int:
    """Answers whose writer is gone keep what was said and are marked; those of living windows are left alone."""
    marked = 0
    for *columns, updated in store.rows(sql.STREAMING):
        message = to_message(columns)
        alive = is_alive(message.owner)
        if alive is None:
            alive = abs(time.time() - float(updated or 0.0)) < FOREIGN_OWNER_SECONDS
        if not alive:
            whole = replace(store.with_pieces(message), state="interrupted", owner=None)
            marked += store.attempt(lambda whole=whole: store.write_message(whole))  # type: ignore[misc]
    return marked


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
