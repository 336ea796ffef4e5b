"""The history's file from below: transactions, numbers, rows. A write that fails is a fact to report, not an end.

What was deleted can be brought back for a week, then it is removed from the file.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from glmchat.chat.history import database, search
from glmchat.chat.history.rows import Conversation, StoredMessage, TokenIds, Tree, dump, ids_of, title_from
from glmchat.core.language import tr

# Ids given while the file cannot be asked; far above all others, so they stay right when it can be written again.
_PROVISIONAL = 1 << 40
HEAD_FIELDS = frozenset(f.name for f in fields(Conversation))


class Store:
    """One SQLite connection, used from any thread under one lock."""

    def __init__(self, opened: database.Opened, path: Path | None) -> None:
        self.path = path
        self.lock = threading.RLock()
        self.generation = 0  # grows when a damaged file is replaced by a new one
        self._provisional = _PROVISIONAL
        self._depth = 0
        self._handed: list[bytes | None] = []
        self._take(opened)

    def _take(self, opened: database.Opened) -> None:
        self._db = opened.connection
        self._db.create_function("handed", 1, lambda number: self._handed[number])
        self.journal = opened.journal
        self.problem = opened.problem
        self.full = opened.full
        self.note = opened.note
        if self.path is not None and self.problem is None:
            for statement in database.TOUCH_SEARCH:
                self.rows(statement)

    def close(self) -> None:
        with self.lock:
            self._db.close()

    # -- reading

    def rows(self, statement: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> list[tuple[Any, ...]]:
        """All rows. Damage that shows here sets the file aside; then there is nothing to read.

        Where only the index of the search is damaged, it is made anew; where that fails, nothing is found.
        """
        with self.lock:
            try:
                return self._execute(statement, parameters).fetchall()
            except OverflowError:  # a number of more than 64 bits, typed by somebody: no row has it
                return []
            except sqlite3.DatabaseError as error:
                if self._depth:
                    raise
                if search.is_broken(error, statement):
                    return self._db.execute(statement, parameters).fetchall() if self._mend_search() else []
                if not self._replace_if_damaged(error):
                    raise
                return []

    def _execute(self, statement: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, parameters)
        except sqlite3.DatabaseError as error:
            if search.is_broken(error, statement):
                raise search.BrokenIndex(str(error)) from error
            raise
        except MemoryError:  # of lengths that noise in the index claims
            if search.is_about_index(statement):
                raise search.BrokenIndex("out of memory") from None
            raise
        except UnicodeDecodeError as error:  # SQLite quotes what is no text in the tables' definitions
            damage = sqlite3.DatabaseError(str(error))
            damage.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise damage from None

    def row(self, statement: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> tuple[Any, ...] | None:
        return next(iter(self.rows(statement, parameters)), None)

    # -- writing

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; one inside another belongs to the outer one."""
        with self.lock:
            if self._depth == 0:
                self._db.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield
                if self._depth == 1:
                    self._execute("COMMIT")
            except BaseException:
                if self._depth == 1 and self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            finally:
                self._depth -= 1

    def run(self, statement: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> None:
        """One statement inside a transaction."""
        self._execute(statement, parameters)

    def _run_long(self, statement: str, *values: Any) -> None:
        """One statement inside a transaction, whose long values, as bytes, `handed(?)` takes.

        A parameter would stay in the prepared statement, hence in memory, until that is used again.
        """
        self._handed = [value for value in values if isinstance(value, bytes)]
        numbers = iter(range(len(self._handed)))
        try:
            self.run(statement, [next(numbers) if isinstance(value, bytes) else value for value in values])
        finally:
            self._handed = []

    def run_all(self, statements: Iterable[str], parameters: dict[str, Any]) -> None:
        for statement in statements:
            self._execute(statement, {k: v for k, v in parameters.items() if f":{k}" in statement})

    def attempt(self, write: Callable[[], None], *, mended: bool = False) -> bool:
        """Do a write; False, with `problem` saying why, if the file does not take it.

        mended: the index of the search was made anew for it, which is done once.
        """
        with self.lock:
            try:
                with self.transaction():
                    write()
            except sqlite3.DatabaseError as error:
                if self._depth:
                    raise
                if search.is_broken(error) and not mended and self._mend_search():
                    return self.attempt(write, mended=True)
                if not self._replace_if_damaged(error):
                    self.fail(error)
                return False
            if self.path is not None and self.journal != "memory":  # memory in a file's place keeps its problem
                self.problem, self.full = None, False
            return True

    def fail(self, error: sqlite3.DatabaseError) -> None:
        """The file did not take a write; the next one tries again."""
        self.problem = tr("the history cannot be written: {reason}", reason=database.reason(error))
        self.full = database.is_full(error)

    def _replace_if_damaged(self, error: sqlite3.DatabaseError) -> bool:
        if self.path is None or not database.is_damage(error):
            return False
        self._db.close()
        self._take(database.replace_damaged(self.path))
        self.generation += 1
        return True

    def _mend_search(self) -> bool:
        """Make the index of the search anew; False, with `note` saying why, if that fails."""
        try:
            search.rebuild(self._db)
        except sqlite3.DatabaseError as error:
            if not self._replace_if_damaged(error):
                words = tr("The index of the search is damaged and cannot be built anew: {reason}", reason=str(error))
                self.note = words
            return False
        self.note = tr("The index of the search was damaged and was built anew. No conversation is lost.")
        return True

    def reserve(self, name: str) -> int:
        """The next number of a counter; a provisional one if the file cannot be written."""
        with self.lock:
            number = 0

            def write() -> None:
                nonlocal number
                number = self.count_up(name)

            if self.attempt(write):
                return number
            self._provisional += 1
            return self._provisional

    def count_up(self, name: str) -> int:
        """The next number of a counter, inside a transaction."""
        self._db.execute("UPDATE counter SET value = value + 1 WHERE name = ?", (name,))
        return int(self._db.execute("SELECT value FROM counter WHERE name = ?", (name,)).fetchone()[0])

    def secure_delete(self) -> None:
        """What is deleted from now on is overwritten in the file."""
        self.rows("PRAGMA secure_delete = ON")

    # -- a whole conversation

    def is_behind(self, tree: Tree) -> bool:
        """True if the file lacks something of the tree, or is a new one that has none of it."""
        if tree.generation != self.generation:
            tree.unsaved = set(tree.messages)
            tree.head_unsaved = set(HEAD_FIELDS)
            tree.generation = self.generation
        return bool(tree.head_unsaved or tree.unsaved)

    def save(self, tree: Tree, *, touch: bool = True) -> None:
        """Write everything of the tree that the file does not have yet; what fails stays marked as unsaved.

        touch: the conversation becomes the last one used.
        """

        def write() -> None:
            if touch:
                tree.change_head(sequence=self.count_up("sequence"))
            if tree.head_unsaved:
                self.write_head(tree.conversation, tree.head_unsaved)
            if "title" in tree.head_unsaved:
                self.index_title(tree)
            for message in sorted(tree.unsaved):
                self.write_message(tree.messages[message])

        # Twice at most: the first write may find the file damaged, the second then goes to the new one.
        while self.is_behind(tree) or touch:
            generation = self.generation
            if self.attempt(write):
                tree.unsaved.clear()
                tree.head_unsaved.clear()
                return
            if self.generation == generation:
                return

    # -- rows of the two tables

    def write_head(self, c: Conversation, changed: Collection[str]) -> None:
        settings = dump({**c.settings.to_json(), **({"one_shot": True} if c.settings.one_shot else {})})
        self.run(
            database.write_head(changed),
            (c.id, c.title, c.renamed, c.model, c.created, c.updated, c.sequence, c.pinned, settings, c.draft, c.leaf),
        )

    def index_title(self, tree: Tree) -> None:
        """Inside a transaction. A title that is the first question is not in the index: that is found itself."""
        head = tree.conversation
        first = next((m.text for m in tree.messages.values() if m.role == "user"), "")
        is_own = head.renamed or head.title != title_from(first)
        self._index(-head.id, head.title if is_own else "")

    def write_message(self, m: StoredMessage) -> None:
        self._run_long(
            database.WRITE_MESSAGE,
            m.id,
            m.conversation,
            m.parent,
            m.role,
            m.text.encode(),
            m.state,
            m.created,
            m.token_ids.packed,
            dump(m.details),
            m.chosen,
            m.deletion,
            m.owner,
        )
        self.run(database.FORGET_PIECES, (m.id,))  # the whole text stands in the message now
        if m.state != "streaming":
            self._index(m.id, m.text)

    def write_piece(self, message: int, text: str, token_ids: Sequence[int]) -> None:
        self.run(database.WRITE_PIECE, (message, text, TokenIds(token_ids).packed or None, message))

    def _index(self, rowid: int, text: str) -> None:
        spaced = search.spaced(text)
        row = self._execute("SELECT text FROM search WHERE rowid = ?", (rowid,)).fetchone()
        if row is None and text:
            self._run_long(database.INDEX, rowid, spaced.encode())
        elif row is not None and row[0] != spaced:
            self._run_long(database.INDEX_AGAIN, spaced.encode(), rowid)

    def with_pieces(self, message: StoredMessage) -> StoredMessage:
        """A streaming answer with what came since it was begun."""
        rows = self.rows(database.PIECES, (message.id,))
        ids = message.token_ids + (i for row in rows for i in ids_of(row[1]))
        return replace(message, text=message.text + "".join(row[0] for row in rows), token_ids=ids)


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
                store.run_all(database.PURGE_CONVERSATION, {"id": conversation})
            # The newest first: each one's children are gone or moved before it goes itself.
            doomed = store.rows("SELECT id, parent FROM message WHERE deletion = ? ORDER BY id DESC", (deletion,))
            for message, parent in doomed:
                store.run_all(database.PURGE_MESSAGE, {"id": message, "parent": parent})
            store.run("DELETE FROM deletion WHERE id = ?", (deletion,))
        # The index keeps the words of a deleted row until its segments are merged.
        store.run("INSERT INTO search (search) VALUES ('optimize')")

    if deletions and store.attempt(write) and store.journal == "wal":
        try:
            store.rows("PRAGMA wal_checkpoint(TRUNCATE)")  # the log holds the old pages
        except sqlite3.OperationalError as error:  # no room to move them
            store.fail(error)
