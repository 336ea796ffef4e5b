"""The history: every conversation in one SQLite file, written while it happens.

A `Tree` is one open conversation. Every change goes to the tree first and to the file at once; if the file cannot take
it (full disk, read-only home, damage) the tree goes on alone, `saved` turns False, and the next change tries again.
All methods may be called from any thread.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from glmchat.chat.history import database, store
from glmchat.chat.history import statements as sql
from glmchat.chat.history.reader import HistoryReader
from glmchat.chat.history.rows import CLEAR, Conversation, ConversationSettings, State, StoredMessage, TokenIds, Tree
from glmchat.core import locations
from glmchat.core.text import one_line

_HEAD_FIELDS = {f.name for f in fields(Conversation)}


class History(HistoryReader):
    """Use `History.default()`, or `History.open(None)` for one that is forgotten (--no-history)."""

    @staticmethod
    def open(path: Path | None) -> History:
        """Open or create the file; None keeps everything in memory. Raises Failed only for a newer schema."""
        if path is None:
            return History(database.open_in_memory(), None)
        history = History(database.open_database(path), path)
        if history.problem is None:
            store.mark_interrupted(history._store)
            store.purge_old(history._store)
        return history

    @staticmethod
    def default() -> History:
        return History.open(locations.history_file())

    def close(self) -> None:
        self._store.close()

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Conversations.

    def new(self, model: str | None = None, settings: ConversationSettings | None = None) -> Tree:
        """A new conversation. It reaches the file with its first message or draft, so empty ones leave no trace."""
        now = time.time()
        head = Conversation(
            id=self._store.reserve("conversation"),
            model=model,
            created=now,
            updated=now,
            settings=settings or ConversationSettings(),
        )
        return Tree(head, head_unsaved=_HEAD_FIELDS.copy(), generation=self._store.generation)

    def change(self, tree: Tree, **values: Any) -> None:
        """Set fields of the head: model, settings, pinned, draft, title."""
        with self._lock:
            tree.change_head(**values)
            if tree.messages or tree.conversation.draft:
                # A pin or a draft does not make a conversation the last one used.
                self._save(tree, touch=bool(values.keys() - {"draft", "pinned"}))

    def rename(self, tree: Tree, title: str) -> None:
        self.change(tree, title=one_line(title.strip(), 120), renamed=True)

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
    ) -> StoredMessage:
        """Add a message below `parent` (None: below the open leaf) and open the branch there."""
        below = tree.leaf if parent is None else parent
        return self._add(tree, below, role, text, state, details, token_ids, created)

    def append_root(self, tree: Tree, role: str, text: str, created: float | None = None) -> StoredMessage:
        """A message beside the first one: the first question, asked in other words."""
        return self._add(tree, None, role, text, "complete", None, (), created)

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
                id=self._store.reserve("message"),
                conversation=tree.conversation.id,
                parent=parent,
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
            now = tree.messages[message.id]
            details = {k: v for k, v in now.details.items() if k not in ("error", "finish_reason")}
            changed = tree.put(replace(now, state="streaming", owner=self._me, details=details))
            self._save(tree)
        return changed

    def add_piece(self, tree: Tree, message: StoredMessage, text: str, token_ids: Sequence[int] = ()) -> StoredMessage:
        """Append to a streaming answer, in the tree and in the file. Call it once for several tokens (each 0.5 s)."""
        with self._lock:
            now = tree.messages[message.id]
            grown = replace(now, text=now.text + text, token_ids=now.token_ids + token_ids)
            tree.messages[message.id] = grown
            whole = self._behind(tree)
            if whole or not self._store.attempt(lambda: self._store.write_piece(message.id, text, token_ids)):
                # The message is not in the file as it should be; all of it goes there as soon as that works.
                tree.unsaved.add(message.id)
                self._save(tree)
        return grown

    def describe_answer(self, tree: Tree, message: StoredMessage, details: Mapping[str, Any]) -> StoredMessage:
        """Write down what is known of a streaming answer already; a kill then leaves it with its record."""
        with self._lock:
            now = tree.messages[message.id]
            described = tree.put(replace(now, details={**now.details, **details}))
            self._save(tree, touch=False)
        return described

    def finish_answer(
        self, tree: Tree, message: StoredMessage, state: State, details: Mapping[str, Any] | None = None
    ) -> StoredMessage:
        """The answer has ended: its pieces become its text, and it can be searched."""
        with self._lock:
            now = tree.messages[message.id]
            done = tree.put(replace(now, state=state, details={**now.details, **(details or {})}, owner=None))
            tree.change_head(updated=time.time())
            self._save(tree)
        return done

    def open_branch(self, tree: Tree, message: StoredMessage) -> None:
        """Make the branch through `message` the open one, down to where it was left."""
        with self._lock:
            at = tree.messages[message.id]
            tree.change_head(leaf=tree.tip(at).id)
            while at.parent is not None and at.parent in tree.messages:
                tree.choose(tree.messages[at.parent], at.id)
                at = tree.messages[at.parent]
            self._save(tree)

    # Deleting.

    def delete_messages(self, tree: Tree, messages: Sequence[StoredMessage], *, leaf: int | None) -> int:
        """Hide messages and open the branch that ends at `leaf`; the number is what `restore` takes."""
        with self._lock:
            deletion = self._new_deletion(tree.conversation.id, tree.leaf)
            for message in messages:
                tree.put(replace(tree.messages[message.id], deletion=deletion))
            count = tree.conversation.message_count - sum(not m.is_clear for m in messages)
            tree.change_head(leaf=leaf, message_count=count)
            self._save(tree)
        return deletion

    def delete_conversation(self, conversation: int) -> int:
        """Hide a conversation; after a week it is gone. The number is what `restore` takes. Raises Usage if unknown."""
        with self._lock:
            self.load(conversation)
            deletion = self._new_deletion(conversation, None)
            statement = "UPDATE conversation SET deletion = ? WHERE id = ?"
            self._store.attempt(lambda: self._store.run(statement, (deletion, conversation)))
        return deletion

    def restore(self, deletion: int, tree: Tree | None = None) -> None:
        """Undo a deletion. `tree`: its conversation, if it is open."""
        with self._lock:
            row = self._store.row("SELECT leaf, conversation FROM deletion WHERE id = ?", (deletion,))
            self._store.attempt(lambda: self._store.run_all(sql.RESTORE, {"id": deletion}))
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
            self._save(tree)

    def deletions(self) -> list[tuple[int, int]]:
        """(deletion, conversation) of everything that can still be undone, the newest first."""
        rows = self._store.rows("SELECT id, conversation FROM deletion ORDER BY id DESC")
        return [(int(deletion), int(conversation)) for deletion, conversation in rows]

    def purge(self, deletions: Collection[int] | None = None) -> int:
        """Remove deleted conversations and messages for good: all, or those given. Returns how many deletions."""
        wanted = [d for d, _ in self.deletions() if deletions is None or d in deletions]
        store.purge(self._store, wanted)
        return len(wanted)

    def _new_deletion(self, conversation: int, leaf: int | None) -> int:
        deletion = self._store.reserve("deletion")
        values = (deletion, conversation, time.time(), leaf)
        self._store.attempt(lambda: self._store.run("INSERT INTO deletion VALUES (?, ?, ?, ?)", values))
        return deletion

    # Writing.

    def batch(self) -> AbstractContextManager[None]:
        """Many changes in one transaction (imports); a failure in it is raised."""
        return self._store.transaction()

    def _behind(self, tree: Tree) -> bool:
        """True if the file lacks something of the tree, or is a new one that has none of it."""
        if tree.generation != self._store.generation:
            tree.unsaved = set(tree.messages)
            tree.head_unsaved = _HEAD_FIELDS.copy()
            tree.generation = self._store.generation
        return bool(tree.head_unsaved or tree.unsaved)

    def _save(self, tree: Tree, *, touch: bool = True) -> None:
        """Write everything of the tree that the file does not have yet; what fails stays marked as unsaved."""

        def write() -> None:
            if touch:
                tree.change_head(sequence=self._store.count_up("sequence"))
            if tree.head_unsaved:
                self._store.write_head(tree.conversation, tree.head_unsaved)
            for message in sorted(tree.unsaved):
                self._store.write_message(tree.messages[message])

        # Twice at most: the first write may find the file damaged, the second then goes to the new one.
        while self._behind(tree) or touch:
            generation = self._store.generation
            if self._store.attempt(write):
                tree.unsaved.clear()
                tree.head_unsaved.clear()
                return
            if self._store.generation == generation:
                return


def title_from(question: str) -> str:
    """The first line of the first question that says something."""
    line = next((line.strip() for line in question.splitlines() if line.strip()), "")
    return one_line(line, 60)
