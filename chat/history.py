"""The history: every conversation in one SQLite file, written while it happens.

A `Tree` is one open conversation. Every change goes to the tree first and to the file at once; if the file cannot take
it (full disk, read-only home, damage) the tree goes on alone, `saved` turns False, and the next change tries again.
All methods may be called from any thread.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from glmchat.chat import database, search
from glmchat.chat.owners import is_alive, this_process
from glmchat.chat.records import (
    CLEAR,
    Conversation,
    ConversationSettings,
    State,
    StoredMessage,
    Tree,
    dump,
    load_object,
    pack_ids,
    unpack_ids,
)
from glmchat.core import locations
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line

KEPT_DELETED_DAYS = 7.0  # how long a deletion can be undone
FOREIGN_OWNER_SECONDS = 600.0  # a writer on another machine counts as alive this long
# Ids given while the file cannot be asked; far above all others, so they stay right when it can be written again.
_PROVISIONAL = 1 << 40
_HEAD = "id, title, renamed, model, created, updated, sequence, pinned, settings, draft, leaf"
_COUNT = f"(SELECT count(*) FROM message m WHERE m.conversation = c.id AND m.deletion IS NULL AND m.role <> '{CLEAR}')"
_MESSAGE = "id, conversation, parent, role, text, state, created, token_ids, details, chosen, deletion, owner"


class History:
    """Use `History.open()`, or `History.open(None)` for one that is forgotten (--no-history)."""

    def __init__(self, opened: database.Opened, path: Path | None) -> None:
        self.path = path
        self.journal = opened.journal
        self.note = opened.note  # one sentence to tell once ("the history was damaged …")
        self._problem = opened.problem
        self._db = opened.connection
        self._lock = threading.RLock()
        self._depth = 0
        self._provisional = _PROVISIONAL
        self._me = this_process()

    @staticmethod
    def open(path: Path | None) -> History:
        """Open or create the file; None keeps everything in memory. Raises Failed only for a newer schema."""
        if path is None:
            return History(database.open_in_memory(), None)
        history = History(database.open_database(path), path)
        history._mark_interrupted()
        history._purge_old()
        return history

    @staticmethod
    def default() -> History:
        return History.open(locations.history_file())

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def problem(self) -> str | None:
        """Why nothing is being saved, in one line; None while all is well."""
        return self._problem

    @property
    def saved(self) -> bool:
        """True if what is said now is on the disk. Always False for a history in memory."""
        return self.path is not None and self._problem is None

    # -- reading ----------------------------------------------------------------------------------------------------

    def conversations(self, *, limit: int = -1, offset: int = 0) -> list[Conversation]:
        """Pinned ones first, then the last changed first."""
        with self._lock:
            rows = self._db.execute(
                f"SELECT {_HEAD}, {_COUNT} FROM conversation c WHERE deletion IS NULL"
                " ORDER BY pinned DESC, sequence DESC LIMIT ? OFFSET ?",
                (limit, offset),
            ).fetchall()
        return [_conversation(row) for row in rows]

    def find(self, conversation: int) -> Conversation | None:
        with self._lock:
            row = self._db.execute(
                f"SELECT {_HEAD}, {_COUNT} FROM conversation c WHERE id = ? AND deletion IS NULL", (conversation,)
            ).fetchone()
        return _conversation(row) if row else None

    def last(self) -> Conversation | None:
        """The conversation changed last that holds a message; pins do not matter. What `run -c` continues."""
        with self._lock:
            row = self._db.execute(
                f"SELECT {_HEAD}, {_COUNT} FROM conversation c WHERE deletion IS NULL"
                " AND EXISTS (SELECT 1 FROM message m WHERE m.conversation = c.id AND m.deletion IS NULL)"
                " ORDER BY sequence DESC LIMIT 1"
            ).fetchone()
        return _conversation(row) if row else None

    def load(self, conversation: int) -> Tree:
        """The conversation with all its messages. Raises Usage if there is none of that number."""
        with self._lock:
            head = self.find(conversation)
            if head is None:
                raise Usage(
                    tr("there is no conversation {id}", id=conversation),
                    hint=tr("`glmchat history list` shows them"),
                    code="history.unknown",
                )
            rows = self._db.execute(
                f"SELECT {_MESSAGE} FROM message WHERE conversation = ? ORDER BY id", (conversation,)
            ).fetchall()
            messages = {m.id: m for m in (_message(row) for row in rows)}
            for message in messages.values():
                if message.state == "streaming":
                    messages[message.id] = self._with_pieces(message)
        return Tree(head, messages)

    def refresh(self, tree: Tree) -> bool:
        """Take over what another window wrote to this conversation; True if anything changed.

        Changes of ours that could not be saved stay.
        """
        with self._lock:
            head = self.find(tree.conversation.id)
            if head is None or (head.sequence == tree.conversation.sequence and not self._streams_elsewhere(tree)):
                return False
            if tree.unsaved or tree.head_unsaved:
                return False
            fresh = self.load(head.id)
            changed = fresh.messages != tree.messages or fresh.conversation != tree.conversation
            tree.conversation, tree.messages = fresh.conversation, fresh.messages
        return changed

    def writer_elsewhere(self, tree: Tree) -> str | None:
        """The other living process that streams an answer in this conversation now, as `host pid start`."""
        with self._lock:
            rows = self._db.execute(
                "SELECT owner FROM message WHERE conversation = ? AND state = 'streaming'", (tree.conversation.id,)
            ).fetchall()
        return next((o for (o,) in rows if o != self._me and is_alive(o) is not False), None)

    def _streams_elsewhere(self, tree: Tree) -> bool:
        return any(m.state == "streaming" and m.owner != self._me for m in tree.messages.values())

    def search(self, query: str, *, limit: int = 50, offset: int = 0) -> list[search.Hit]:
        """Messages and titles that hold every word of `query`, newest first."""
        with self._lock:
            rows = self._hits(query.strip(), limit, offset)
        hits = []
        for conversation, title, message, role, text, created in rows:
            spans = search.find_spans(text, query)
            around, inside = search.snippet(text, spans)
            hits.append(
                search.Hit(conversation, message, role, title, created, around, inside, spans[0][0] if spans else 0)
            )
        return hits

    def count_hits(self, query: str) -> int:
        expression = search.match_expression(query)
        with self._lock:
            if expression is None:
                return len(self._hits(query.strip(), -1, 0))
            count = self._db.execute("SELECT count(*) FROM search WHERE search MATCH ?", (expression,)).fetchone()[0]
        return int(count)

    def _hits(self, query: str, limit: int, offset: int) -> list[tuple[Any, ...]]:
        if not query:
            return []
        columns = "c.id, c.title, m.id, m.role, coalesce(m.text, c.title), coalesce(m.created, c.created)"
        living = "c.deletion IS NULL AND (m.id IS NULL OR m.deletion IS NULL)"
        if (expression := search.match_expression(query)) is not None:
            return self._db.execute(
                f"SELECT {columns} FROM search s LEFT JOIN message m ON m.id = s.rowid"
                " JOIN conversation c ON c.id = coalesce(m.conversation, -s.rowid)"
                f" WHERE search MATCH ? AND {living} ORDER BY s.rowid DESC LIMIT ? OFFSET ?",
                (expression, limit, offset),
            ).fetchall()
        # Nothing but signs (an emoji, "->"): not in the index, so every text is looked through.
        return self._db.execute(
            f"SELECT {columns} FROM message m JOIN conversation c ON c.id = m.conversation"
            f" WHERE instr(m.text, ?) AND {living} ORDER BY m.id DESC LIMIT ? OFFSET ?",
            (query, limit, offset),
        ).fetchall()

    # -- conversations ----------------------------------------------------------------------------------------------

    def new(self, model: str | None = None, settings: ConversationSettings | None = None) -> Tree:
        """A new conversation. It reaches the file with its first message or draft, so empty ones leave no trace."""
        now = time.time()
        head = Conversation(
            self._reserve("conversation"), "", model, now, now, settings=settings or ConversationSettings()
        )
        tree = Tree(head)
        tree.head_unsaved = True
        return tree

    def change(self, tree: Tree, **values: Any) -> None:
        """Set fields of the head: model, settings, pinned, draft."""
        with self._lock:
            tree.change_head(**values)
            if tree.messages or tree.conversation.draft:
                self._save(tree, touch=bool(values.keys() - {"draft", "pinned"}))

    def rename(self, tree: Tree, title: str) -> None:
        self.change(tree, title=one_line(title.strip(), 120), renamed=True)

    def pin(self, tree: Tree, pinned: bool) -> None:
        self.change(tree, pinned=pinned)

    def save_draft(self, tree: Tree, text: str) -> None:
        if text != tree.conversation.draft:
            self.change(tree, draft=text)

    # -- messages ---------------------------------------------------------------------------------------------------

    def append(
        self,
        tree: Tree,
        role: str,
        text: str = "",
        *,
        state: State = "complete",
        parent: int | None | Tree = None,
        details: Mapping[str, Any] | None = None,
        token_ids: Sequence[int] = (),
        created: float | None = None,
    ) -> StoredMessage:
        """Add a message below `parent` (default, or the tree itself: its open leaf) and open the branch there.

        parent: a message's id; None means the leaf as well, so a new root is `append_root`.
        """
        below = tree.leaf if parent is None or isinstance(parent, Tree) else parent
        return self._add(tree, below, role, text, state, details, token_ids, created)

    def append_root(self, tree: Tree, role: str, text: str) -> StoredMessage:
        """A message beside the first one: the first question, asked in other words."""
        return self._add(tree, None, role, text, "complete", None, (), None)

    def append_clear(self, tree: Tree) -> StoredMessage:
        """The rule that /clear draws: the model sees nothing above it."""
        return self.append(tree, CLEAR)

    def _add(
        self,
        tree: Tree,
        parent: int | None,
        role: str,
        text: str,
        state: State,
        details: Mapping[str, Any] | None,
        token_ids: Sequence[int],
        created: float | None,
    ) -> StoredMessage:
        with self._lock:
            message = StoredMessage(
                self._reserve("message"),
                tree.conversation.id,
                parent,
                role,
                text,
                state,
                time.time() if created is None else created,
                tuple(token_ids),
                dict(details or {}),
                owner=self._me if state == "streaming" else None,
            )
            tree.put(message)
            head = tree.conversation
            title = head.title if head.title or role != "user" else title_from(text)
            count = head.message_count + (role != CLEAR)
            tree.change_head(leaf=message.id, title=title, message_count=count, updated=message.created)
            self._save(tree)
        return message

    def begin_answer(
        self, tree: Tree, *, parent: int | None = None, details: Mapping[str, Any] | None = None
    ) -> StoredMessage:
        """An empty answer that this process is about to stream."""
        return self.append(tree, "assistant", state="streaming", parent=parent, details=details)

    def reopen_answer(self, tree: Tree, message: StoredMessage) -> StoredMessage:
        """Go on with an unfinished answer: new pieces follow its text."""
        with self._lock:
            changed = tree.put(replace(tree.messages[message.id], state="streaming", owner=self._me))
            self._save(tree)
        return changed

    def add_piece(self, tree: Tree, message: StoredMessage, text: str, token_ids: Sequence[int] = ()) -> StoredMessage:
        """Append to a streaming answer, in the tree and in the file. Call it once for several tokens (each 0.5 s)."""
        with self._lock:
            now = tree.messages[message.id]
            grown = replace(now, text=now.text + text, token_ids=now.token_ids + tuple(token_ids))
            tree.messages[message.id] = grown
            if tree.unsaved or tree.head_unsaved:
                # The message itself never reached the file; all of it goes there at once when that works again.
                tree.unsaved.add(message.id)
                self._save(tree)
                return grown

            def write() -> None:
                self._db.execute(
                    "INSERT INTO piece SELECT ?, coalesce(max(number), 0) + 1, ?, ? FROM piece WHERE message = ?",
                    (message.id, text, pack_ids(tuple(token_ids)), message.id),
                )

            if not self._try(write):
                tree.unsaved.add(message.id)
        return grown

    def finish_answer(
        self, tree: Tree, message: StoredMessage, state: State, details: Mapping[str, Any] | None = None
    ) -> StoredMessage:
        """The answer has ended: its pieces become its text, and it can be searched."""
        with self._lock:
            now = tree.messages[message.id]
            merged = {**now.details, **(details or {})}
            done = tree.put(replace(now, state=state, details=merged, owner=None))
            tree.change_head(updated=time.time())
            self._save(tree)
        return done

    def open_branch(self, tree: Tree, message: StoredMessage) -> None:
        """Make the branch through `message` the open one, down to where it was left."""
        with self._lock:
            at: StoredMessage | None = tree.messages[message.id]
            tip = tree.tip(tree.messages[message.id])
            while at is not None and at.parent in tree.messages:
                tree.choose(tree.messages[at.parent], at.id)
                at = tree.messages[at.parent]
            tree.change_head(leaf=tip.id)
            self._save(tree)

    # -- deleting ---------------------------------------------------------------------------------------------------

    def delete_messages(self, tree: Tree, messages: Sequence[StoredMessage], *, leaf: int | None) -> int:
        """Hide messages and open the branch that ends at `leaf`; the number is what `restore` takes."""
        with self._lock:
            deletion = self._new_deletion(tree.conversation.id, tree.leaf)
            for message in messages:
                tree.messages[message.id] = replace(tree.messages[message.id], deletion=deletion)
                tree.unsaved.add(message.id)
            tree.change_head(leaf=leaf, message_count=max(0, tree.conversation.message_count - len(messages)))
            self._save(tree)
        return deletion

    def delete_conversation(self, conversation: int) -> int:
        """Hide a conversation for a week, then it is gone; the number is what `restore` takes."""
        with self._lock:
            deletion = self._new_deletion(conversation, None)
            self._try(
                lambda: self._db.execute("UPDATE conversation SET deletion = ? WHERE id = ?", (deletion, conversation))
            )
        return deletion

    def restore(self, deletion: int, tree: Tree | None = None) -> None:
        """Undo a deletion; `tree`, if the conversation is open, is brought up to date."""
        with self._lock:
            row = self._db.execute("SELECT leaf FROM deletion WHERE id = ?", (deletion,)).fetchone()

            def write() -> None:
                self._db.execute("UPDATE conversation SET deletion = NULL WHERE deletion = ?", (deletion,))
                self._db.execute("UPDATE message SET deletion = NULL WHERE deletion = ?", (deletion,))
                self._db.execute("DELETE FROM deletion WHERE id = ?", (deletion,))

            self._try(write)
            if tree is not None:
                hidden = [m for m in tree.messages.values() if m.deletion == deletion]
                for message in hidden:
                    tree.put(replace(message, deletion=None))
                count = tree.conversation.message_count + sum(not m.is_clear for m in hidden)
                leaf = row[0] if row and row[0] in tree.messages else max((m.id for m in hidden), default=tree.leaf)
                tree.change_head(leaf=leaf, message_count=count)
                self._save(tree)

    def last_deletion(self) -> tuple[int, int] | None:
        """(deletion, conversation) of the newest one that can still be undone."""
        with self._lock:
            row = self._db.execute("SELECT id, conversation FROM deletion ORDER BY id DESC LIMIT 1").fetchone()
        return (int(row[0]), int(row[1])) if row else None

    def purge(self, deletions: Sequence[int] | None = None) -> int:
        """Remove deleted conversations and messages for good (all, or those given), overwritten in the file."""
        with self._lock:
            rows = self._db.execute("SELECT id FROM deletion").fetchall()
            wanted = [int(i) for (i,) in rows if deletions is None or i in deletions]
            if wanted:
                self._db.execute("PRAGMA secure_delete = ON")
                self._try(lambda: self._purge(wanted))
        return len(wanted)

    def _purge(self, deletions: Sequence[int]) -> None:
        for deletion in deletions:
            conversations = self._db.execute("SELECT id FROM conversation WHERE deletion = ?", (deletion,)).fetchall()
            for (conversation,) in conversations:
                self._db.execute("UPDATE message SET deletion = ? WHERE conversation = ?", (deletion, conversation))
                self._db.execute("DELETE FROM search WHERE rowid = ?", (-conversation,))
                self._db.execute("DELETE FROM conversation WHERE id = ?", (conversation,))
            doomed = self._db.execute("SELECT id, parent FROM message WHERE deletion = ?", (deletion,)).fetchall()
            for message, parent in doomed:
                # What stands below moves up one step, so the branch stays whole.
                self._db.execute("UPDATE message SET parent = ? WHERE parent = ?", (parent, message))
                self._db.execute("UPDATE conversation SET leaf = ? WHERE leaf = ?", (parent, message))
                for table, key in (("search", "rowid"), ("piece", "message"), ("message", "id")):
                    self._db.execute(f"DELETE FROM {table} WHERE {key} = ?", (message,))
            self._db.execute("DELETE FROM deletion WHERE id = ?", (deletion,))

    def _purge_old(self) -> None:
        limit = time.time() - KEPT_DELETED_DAYS * 86400
        old = [int(i) for (i,) in self._db.execute("SELECT id FROM deletion WHERE created < ?", (limit,)).fetchall()]
        if old and self._problem is None:
            self.purge(old)

    def _new_deletion(self, conversation: int, leaf: int | None) -> int:
        deletion = self._reserve("deletion")
        self._try(
            lambda: self._db.execute(
                "INSERT INTO deletion VALUES (?, ?, ?, ?)", (deletion, conversation, time.time(), leaf)
            )
        )
        return deletion

    # -- writing ----------------------------------------------------------------------------------------------------

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Many changes in one transaction (imports)."""
        with self._lock:
            with self._transaction():
                yield

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if self._depth == 0:
            self._db.execute("BEGIN IMMEDIATE")
        self._depth += 1
        try:
            yield
        except BaseException:
            self._depth -= 1
            if self._depth == 0 and self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise
        self._depth -= 1
        if self._depth == 0:
            try:
                self._db.execute("COMMIT")
            except sqlite3.Error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _try(self, write: Any) -> bool:
        """Do one write; False, with `problem` set, if the file does not take it."""
        try:
            with self._transaction():
                write()
        except sqlite3.DatabaseError as error:
            if self._depth:
                raise
            self._failed(error)
            return False
        self._problem = None
        return True

    def _failed(self, error: sqlite3.DatabaseError) -> None:
        if database.is_damage(error) and self.path is not None:
            self._db.close()
            opened = database.replace_damaged(self.path)
            self._db, self.journal, self.note, self._problem = (
                opened.connection,
                opened.journal,
                opened.note,
                opened.problem,
            )
            return
        self._problem = tr("the history cannot be written: {reason}", reason=str(error))

    def _reserve(self, name: str) -> int:
        """The next number of a counter; a provisional one if the file cannot be written."""
        with self._lock:
            number = 0

            def write() -> None:
                nonlocal number
                self._db.execute("UPDATE counter SET value = value + 1 WHERE name = ?", (name,))
                number = int(self._db.execute("SELECT value FROM counter WHERE name = ?", (name,)).fetchone()[0])

            if self._try(write):
                return number
            self._provisional += 1
            return self._provisional

    def _save(self, tree: Tree, *, touch: bool = True) -> bool:
        """Write everything of the tree that the file does not have yet."""

        def write() -> None:
            if touch:
                self._db.execute("UPDATE counter SET value = value + 1 WHERE name = 'sequence'")
                row = self._db.execute("SELECT value FROM counter WHERE name = 'sequence'").fetchone()
                tree.change_head(sequence=int(row[0]))
            if tree.head_unsaved:
                self._write_head(tree.conversation)
            for message in sorted(tree.unsaved):
                self._write_message(tree.messages[message])

        if self._try(write):
            tree.unsaved.clear()
            tree.head_unsaved = False
            return True
        if self._problem is None:  # the damaged file was replaced: everything goes to the new one
            tree.unsaved = set(tree.messages)
            tree.head_unsaved = True
            return self._save(tree, touch=touch)
        return False

    def _write_head(self, c: Conversation) -> None:
        self._db.execute(
            f"INSERT INTO conversation ({_HEAD}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET title = excluded.title, renamed = excluded.renamed, model = excluded.model,"
            " updated = excluded.updated, sequence = excluded.sequence, pinned = excluded.pinned,"
            " settings = excluded.settings, draft = excluded.draft, leaf = excluded.leaf",
            (
                c.id, c.title, c.renamed, c.model, c.created, c.updated, c.sequence, c.pinned, dump(c.settings.to_json()),
                c.draft, c.leaf,
            ),
        )  # fmt: skip
        self._index(-c.id, c.title)

    def _write_message(self, m: StoredMessage) -> None:
        self._db.execute(
            f"INSERT INTO message ({_MESSAGE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (id) DO UPDATE SET parent = excluded.parent, text = excluded.text, state = excluded.state,"
            " token_ids = excluded.token_ids, details = excluded.details, chosen = excluded.chosen,"
            " deletion = excluded.deletion, owner = excluded.owner",
            (
                m.id, m.conversation, m.parent, m.role, m.text, m.state, m.created, pack_ids(m.token_ids), dump(m.details),
                m.chosen, m.deletion, m.owner,
            ),
        )  # fmt: skip
        # The whole text stands in the message now.
        self._db.execute("DELETE FROM piece WHERE message = ?", (m.id,))
        if m.state != "streaming":
            self._index(m.id, m.text)

    def _index(self, rowid: int, text: str) -> None:
        spaced = search.spaced(text)
        row = self._db.execute("SELECT text FROM search WHERE rowid = ?", (rowid,)).fetchone()
        if row is None and text:
            self._db.execute("INSERT INTO search (rowid, text) VALUES (?, ?)", (rowid, spaced))
        elif row is not None and row[0] != spaced:
            self._db.execute("UPDATE search SET text = ? WHERE rowid = ?", (spaced, rowid))

    # -- after a crash ----------------------------------------------------------------------------------------------

    def _with_pieces(self, message: StoredMessage) -> StoredMessage:
        rows = self._db.execute(
            "SELECT text, token_ids FROM piece WHERE message = ? ORDER BY number", (message.id,)
        ).fetchall()
        text = message.text + "".join(row[0] for row in rows)
        ids = message.token_ids + tuple(i for row in rows for i in unpack_ids(row[1]))
        return replace(message, text=text, token_ids=ids)

    def _mark_interrupted(self) -> None:
        """Answers whose writer is gone keep what was said and are marked; those of living windows are left alone."""
        if self._problem is not None:
            return
        columns = ", ".join(f"m.{name}" for name in _MESSAGE.split(", "))
        rows = self._db.execute(
            f"SELECT {columns}, c.updated FROM message m JOIN conversation c ON c.id = m.conversation"
            " WHERE m.state = 'streaming'"
        ).fetchall()
        for row in rows:
            message = _message(row[:-1])
            alive = is_alive(message.owner)
            if alive is None:
                alive = abs(time.time() - float(row[-1])) < FOREIGN_OWNER_SECONDS
            if not alive:
                whole = replace(self._with_pieces(message), state="interrupted", owner=None)
                self._try(lambda whole=whole: self._write_message(whole))

    def interrupted(self) -> Conversation | None:
        """The last changed conversation, if its open branch ends in an answer that was interrupted: one to resume."""
        head = self.last()
        if head is None or head.leaf is None:
            return None
        with self._lock:
            row = self._db.execute("SELECT state FROM message WHERE id = ?", (head.leaf,)).fetchone()
        return head if row and row[0] == "interrupted" else None


def title_from(question: str) -> str:
    """The first line of the first question that says something."""
    line = next((line.strip() for line in question.splitlines() if line.strip()), "")
    return one_line(line, 60)


def _conversation(row: Sequence[Any]) -> Conversation:
    id_, title, renamed, model, created, updated, sequence, pinned, settings, draft, leaf, count = row
    return Conversation(
        id_, title, model, created, updated, sequence, bool(pinned),
        ConversationSettings.from_json(load_object(settings)), draft, leaf, count, bool(renamed),
    )  # fmt: skip


def _message(row: Sequence[Any]) -> StoredMessage:
    id_, conversation, parent, role, text, state, created, ids, details, chosen, deletion, owner = row
    return StoredMessage(
        id_, conversation, parent, role, text, state, created, unpack_ids(ids), load_object(details), chosen, deletion,
        owner,
    )  # fmt: skip
