"""The history: every conversation in one SQLite file, written while it happens.

A `Tree` is one open conversation. Every change goes to the tree first and to the file at once; if the file cannot take
it (full disk, read-only home, damage) the tree goes on alone, `saved` turns False, and the next change tries again.
All methods may be called from any thread.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from glmchat.chat.history import database, owners
from glmchat.chat.history.rows import (
    CLEAR,
    Conversation,
    ConversationSettings,
    State,
    StoredMessage,
    TokenIds,
    Tree,
    title_from,
    to_conversation,
    to_message,
)
from glmchat.chat.history.search import Hit, count_hits, find_hits
from glmchat.chat.history.store import HEAD_FIELDS, Store, add_deletion, purge, purge_old
from glmchat.core import locations
from glmchat.core.errors import DoesNotFit, Failed, Usage
from glmchat.core.kv_files import conversation_name, forget
from glmchat.core.language import tr
from glmchat.core.processes import this_process
from glmchat.core.text import one_line, whole_text

T = TypeVar("T")


class History:
    """Use `History.default()`, or `History.open(None)` for one that is forgotten (--no-history)."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.path = store.path
        self._lock = store.lock
        self._me = this_process()
        self._heard: owners.Heard = {}

    @staticmethod
    def open(path: Path | None) -> History:
        """Open or create the file; None keeps everything in memory. Raises Failed only for a newer schema."""
        if path is None:
            return History(Store(database.open_in_memory(), None))
        history = History(Store(database.open_database(path), path))
        if history.problem is None:
            owners.mark_interrupted(history.store)
            purge_old(history.store)
        return history

    @staticmethod
    def default() -> History:
        return History.open(locations.history_file())

    def close(self) -> None:
        self.store.close()

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def problem(self) -> str | None:
        """Why nothing is being saved, in one line; None while all is well."""
        return self.store.problem

    @property
    def saved(self) -> bool:
        """True if what is said now is on the disk. Always False for a history in memory."""
        return self.path is not None and self.problem is None

    def require_saved(self) -> None:
        """Raise DoesNotFit or Failed if what was changed here is not on the disk."""
        if not self.saved:
            kind = DoesNotFit if self.store.full else Failed
            hint = tr("free some space, or make the folder writable")
            raise kind(one_line(self.problem or ""), hint=hint, code="history.unsaved")

    def require_written(self) -> None:
        """As `require_saved` of a history with a file; one in memory keeps what it is given, and says elsewhere that it
        is one."""
        if self.problem is not None and self.journal != "memory":
            self.require_saved()

    @property
    def note(self) -> str | None:
        """One sentence to tell once ("the history was damaged …"); it may appear later too."""
        return self.store.note

    @property
    def journal(self) -> str:
        """ "wal", "delete" (network file systems), "read-only" or "memory"."""
        return self.store.journal

    def cache_name(self, tree: Tree) -> str | None:
        """What the conversation's caches on the disk are called; None where none of it may lie there, since it is not
        saved. One answer to one question is not gone on with as a rule, and has none.
        """
        if self.path is None or not self.saved or tree.conversation.settings.one_shot:
            return None
        return conversation_name(self.path, tree.conversation.id)

    def _forget_caches(self, conversation: int) -> None:
        if self.path is not None:
            forget(conversation_name(self.path, conversation))

    # Conversations.

    def conversations(self, *, limit: int = -1, offset: int = 0) -> list[Conversation]:
        """Pinned ones first, then the last changed first. Deleted ones are left out."""
        return [to_conversation(row) for row in self.store.rows(database.LIST_HEADS, (limit, offset))]

    def find(self, conversation: int) -> Conversation | None:
        row = self.store.row(database.ONE_HEAD, (conversation,))
        return to_conversation(row) if row else None

    def is_deleted(self, conversation: int) -> bool:
        """It is hidden, and can still be restored."""
        row = self.store.row("SELECT deletion FROM conversation WHERE id = ?", (conversation,))
        return row is not None and row[0] is not None

    def conversation_of(self, message: int) -> int | None:
        """The conversation that holds this message; None if there is no such message."""
        row = self.store.row("SELECT conversation FROM message WHERE id = ? AND deletion IS NULL", (message,))
        return int(row[0]) if row and self.find(int(row[0])) is not None else None

    def last(self) -> Conversation | None:
        """The conversation changed last that holds a message; pins do not matter. What `run -c` continues."""
        row = self.store.row(database.LAST_HEAD)
        return to_conversation(row) if row else None

    def last_draft(self) -> Conversation | None:
        """A conversation that was only begun in the prompt, after everything that was said: one to offer."""
        row = self.store.row(database.LAST_DRAFT)
        return to_conversation(row) if row else None

    def recent_questions(self, limit: int = 500) -> list[str]:
        """What was asked last in all conversations, the newest first."""
        rows = self.store.rows(database.LAST_QUESTIONS, (limit,))
        return [row[0] for row in rows if isinstance(row[0], str)]

    def interrupted(self) -> Conversation | None:
        """The last conversation, if its open branch ends in an answer that was interrupted: one to offer."""
        head = self.last()
        row = self.store.row("SELECT state FROM message WHERE id = ?", (head.leaf,)) if head else None
        return head if row and row[0] == "interrupted" else None

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
            messages = {m.id: m for m in map(to_message, self.store.rows(database.MESSAGES, (conversation,)))}
            for message in list(messages.values()):
                if message.state == "streaming":
                    messages[message.id] = self.store.with_pieces(message)
        return Tree(head, messages, generation=self.store.generation)

    def refresh(self, tree: Tree) -> bool:
        """Take over what another window wrote to this conversation; True if anything changed.

        While changes of ours could not be saved, the tree is left as it is.
        """
        with self._lock:
            head = self.find(tree.conversation.id)
            if head is None or tree.unsaved or tree.head_unsaved:
                return False
            streams = any(m.state == "streaming" and m.owner != self._me for m in tree.messages.values())
            if head == tree.conversation and not streams:
                return False
            fresh = self.load(head.id)
            changed = fresh.messages != tree.messages or fresh.conversation != tree.conversation
            tree.conversation, tree.messages = fresh.conversation, fresh.messages
        return changed

    def new(self, model: str | None = None, settings: ConversationSettings | None = None) -> Tree:
        """A new conversation. It reaches the file with its first message or draft, so empty ones leave no trace."""
        now = time.time()
        head = Conversation(
            id=self.store.reserve("conversation"),
            model=model,
            created=now,
            updated=now,
            settings=settings or ConversationSettings(),
        )
        return Tree(head, head_unsaved=set(HEAD_FIELDS), generation=self.store.generation)

    def change(self, tree: Tree, **values: Any) -> None:
        """Set fields of the head: model, settings, pinned, draft, title."""
        with self._lock:
            tree.change_head(**{k: whole_text(v) if isinstance(v, str) else v for k, v in values.items()})
            if tree.messages or "draft" in values:
                # What is said makes a conversation the last one used; a title, a pin, a setting or a draft does not.
                self.store.save(tree, touch=not tree.conversation.sequence)

    def place_by_time(self, tree: Tree, first: int) -> None:
        """An old conversation that came in goes where its time is. first: the lowest number of those beside it."""
        with self._lock:
            row = self.store.row(database.USED_BEFORE, (tree.conversation.updated, first))
            # Below all: any number that is not 0, which means that it has none yet.
            tree.change_head(sequence=int(row[0]) if row and row[0] is not None else -1)
            self.store.save(tree, touch=False)

    def rename(self, tree: Tree, title: str) -> None:
        self.change(tree, title=one_line(title.strip(), 120), renamed=True)

    def give_title(self, tree: Tree, title: str) -> bool:
        """A title that a model wrote, in place of the first words; False where a person has given one meanwhile."""
        with self._lock:
            values, is_given = (title, tree.conversation.id, tree.conversation.title), False

            def write() -> None:
                nonlocal is_given
                self.store.run(database.GIVE_TITLE, values)
                head = self.find(tree.conversation.id)
                is_given = head is not None and head.title == title and not head.renamed
                if is_given and head is not None:
                    self.store.index_title(replace(tree, conversation=head))

            is_given = self.store.attempt(write) and is_given
            if is_given:  # nothing to be saved: a later save must not bring it back over a person's
                tree.conversation = replace(tree.conversation, title=title)
        return is_given

    def pin(self, tree: Tree, pinned: bool) -> None:
        self.change(tree, pinned=pinned)

    def save_draft(self, tree: Tree, text: str) -> None:
        if text != tree.conversation.draft:
            self.change(tree, draft=text)

    # Messages.

    def append(
        self,
        tree: Tree,
        role: str,
        text: str = "",
        *,
        state: State = "complete",
        parent: int | None = None,
        details: Mapping[str, Any] | None = None,
        token_ids: Sequence[int] = (),
        created: float | None = None,
        root: bool = False,
    ) -> StoredMessage:
        """Add a message below `parent` (None: below the open leaf; root: below none) and open the branch there."""
        below = None if root else tree.leaf if parent is None else parent
        text = whole_text(text)
        with self._lock:
            message = StoredMessage(
                id=self.store.reserve("message"),
                conversation=tree.conversation.id,
                parent=below,
                role=role,
                text=text,
                state=state,
                created=time.time() if created is None else created,
                token_ids=TokenIds(token_ids),
                details=dict(details or {}),
                owner=self._me if state == "streaming" else None,
            )
            tree.put(message)
            head = tree.conversation
            title = head.title if head.title or role != "user" else title_from(text)
            count = head.message_count + (role != CLEAR)
            tree.change_head(leaf=message.id, title=title, message_count=count, updated=message.created)
            self.store.save(tree)
        return message

    def append_clear(self, tree: Tree) -> StoredMessage:
        """The rule that /clear draws: the model sees nothing above it."""
        return self.append(tree, CLEAR)

    def begin_answer(
        self, tree: Tree, *, parent: int | None = None, details: Mapping[str, Any] | None = None
    ) -> StoredMessage:
        """An empty answer that this process is about to stream."""
        return self.append(tree, "assistant", state="streaming", parent=parent, details=details)

    def reopen_answer(self, tree: Tree, message: StoredMessage) -> StoredMessage:
        """Go on with an unfinished answer: new pieces follow its text."""
        with self._lock:
            now = tree.messages[message.id]
            details = {k: v for k, v in now.details.items() if k not in ("error", "finish_reason")}
            changed = tree.put(replace(now, state="streaming", owner=self._me, details=details))
            self.store.save(tree)
        return changed

    def add_piece(self, tree: Tree, message: StoredMessage, text: str, token_ids: Sequence[int] = ()) -> StoredMessage:
        """Append to a streaming answer, in the tree and in the file. Call it once for several tokens (each 0.5 s)."""
        with self._lock:
            now = tree.messages[message.id]
            grown = replace(now, text=now.text + text, token_ids=now.token_ids + token_ids)
            tree.messages[message.id] = grown
            whole = self.store.is_behind(tree)
            if whole or not self.store.attempt(lambda: self.store.write_piece(message.id, text, token_ids)):
                # The message is not in the file as it should be; all of it goes there as soon as that works.
                tree.unsaved.add(message.id)
                self.store.save(tree)
        return grown

    def describe_answer(self, tree: Tree, message: StoredMessage, details: Mapping[str, Any]) -> StoredMessage:
        """Write down what is known of a streaming answer already; a kill then leaves it with its record."""
        with self._lock:
            now = tree.messages[message.id]
            described = tree.put(replace(now, details={**now.details, **details}))
            self.store.save(tree, touch=False)
        return described

    def finish_answer(
        self, tree: Tree, message: StoredMessage, state: State, details: Mapping[str, Any] | None = None
    ) -> StoredMessage:
        """The answer has ended: its pieces become its text, and it can be searched."""
        with self._lock:
            now = tree.messages[message.id]
            done = tree.put(replace(now, state=state, details={**now.details, **(details or {})}, owner=None))
            tree.change_head(updated=time.time())
            self.store.save(tree)
        return done

    def open_branch(self, tree: Tree, message: StoredMessage) -> None:
        """Make the branch through `message` the open one, down to where it was left."""
        with self._lock:
            at = tree.messages[message.id]
            tree.change_head(leaf=tree.tip(at).id)
            while at.parent is not None and at.parent in tree.messages:
                tree.choose(tree.messages[at.parent], at.id)
                at = tree.messages[at.parent]
            tree.change_head(updated=time.time())
            self.store.save(tree)

    # Other windows.

    def together(self, tree: Tree, act: Callable[[], T]) -> T:
        """What `act` reads and what it then writes is one transaction: no other window writes between.

        Where the file takes none it is done all the same, from the beginning: the tree goes on alone.
        """
        with self._lock:
            before = replace(
                tree, messages=dict(tree.messages), unsaved=set(tree.unsaved), head_unsaved=set(tree.head_unsaved)
            )
            try:
                with self.store.transaction():
                    return act()
            except sqlite3.DatabaseError:
                for field in fields(tree):
                    setattr(tree, field.name, getattr(before, field.name))
            return act()

    def writer_elsewhere(self, tree: Tree) -> str | None:
        """The other living process that streams an answer in this conversation now, as `host pid start`."""
        with self._lock:
            return owners.writer_elsewhere(self.store, tree.conversation.id, self._heard)

    def answered_elsewhere(self) -> list[int]:
        """Conversations that other living processes answer now, the last asked first."""
        return owners.answered_elsewhere(self.store)

    # Searching.

    def search(self, query: str, *, limit: int = 50, offset: int = 0) -> list[Hit]:
        """Messages and given titles that hold every word of `query`, the newest first."""
        return find_hits(self.store.rows, query, limit, offset)

    def count_hits(self, query: str) -> int:
        return count_hits(self.store.rows, query)

    # Deleting.

    def delete_messages(self, tree: Tree, messages: Sequence[StoredMessage], *, leaf: int | None) -> int:
        """Hide messages and open the branch that ends at `leaf`; the number is what `restore` takes."""
        with self._lock:
            deletion = add_deletion(self.store, tree.conversation.id, tree.leaf)
            for message in messages:
                tree.put(replace(tree.messages[message.id], deletion=deletion))
            count = tree.conversation.message_count - sum(not m.is_clear for m in messages)
            tree.change_head(leaf=leaf, message_count=count, updated=time.time())
            self.store.save(tree)
        self._forget_caches(tree.conversation.id)
        return deletion

    def delete_conversation(self, conversation: int) -> int:
        """Hide a conversation; after a week it is gone. The number is what `restore` takes. Raises Usage if unknown."""
        with self._lock:
            self.load(conversation)
            deletion = add_deletion(self.store, conversation, None)
            statement = "UPDATE conversation SET deletion = ? WHERE id = ?"
            self.store.attempt(lambda: self.store.run(statement, (deletion, conversation)))
        self._forget_caches(conversation)
        return deletion

    def restore(self, deletion: int, tree: Tree | None = None) -> None:
        """Undo a deletion. `tree`: its conversation, if it is open."""
        with self._lock:
            row = self.store.row("SELECT leaf, conversation FROM deletion WHERE id = ?", (deletion,))
            self.store.attempt(lambda: self.store.run_all(database.RESTORE, {"id": deletion}))
            if tree is None:
                if row is None or (head := self.find(int(row[1]))) is None or row[0] is None:
                    return
                tree = self.load(head.id)
            hidden = [m for m in tree.messages.values() if m.deletion == deletion]
            for message in hidden:
                tree.put(replace(message, deletion=None))
            leaf = row[0] if row and row[0] in tree.messages else max((m.id for m in hidden), default=tree.leaf)
            count = tree.conversation.message_count + sum(not m.is_clear for m in hidden)
            tree.change_head(leaf=leaf, message_count=count)
            self.store.save(tree)

    def deletions(self) -> list[tuple[int, int]]:
        """(deletion, conversation) of everything that can still be undone, the newest first."""
        rows = self.store.rows("SELECT id, conversation FROM deletion ORDER BY id DESC")
        return [(int(deletion), int(conversation)) for deletion, conversation in rows]

    def purge(self, only: Collection[int] | None = None) -> int:
        """Remove deleted conversations and messages for good: all, or those given. Returns how many deletions."""
        numbers = [d for d, _ in self.deletions() if only is None or d in only]
        purge(self.store, numbers)
        return len(numbers)

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Many changes in one transaction (imports): all or none. Raises DoesNotFit or Failed where the file does not
        take them."""
        try:
            with self.store.transaction():
                yield
        except sqlite3.OperationalError as error:
            self.store.fail(error)
            self.require_saved()
