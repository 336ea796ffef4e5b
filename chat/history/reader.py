"""What the history tells: conversations, their messages, who is writing them now, and where words stand."""

from __future__ import annotations

from pathlib import Path

from glmchat.chat.history import database, search
from glmchat.chat.history import statements as sql
from glmchat.chat.history.owners import is_alive, this_process
from glmchat.chat.history.rows import Conversation, Tree
from glmchat.chat.history.store import Store, to_conversation, to_message
from glmchat.core.errors import Usage
from glmchat.core.language import tr


class HistoryReader:
    """The reading half of `History`. All methods may be called from any thread."""

    def __init__(self, opened: database.Opened, path: Path | None) -> None:
        self.path = path
        self._store = Store(opened, path)
        self._lock = self._store.lock
        self._me = this_process()

    @property
    def problem(self) -> str | None:
        """Why nothing is being saved, in one line; None while all is well."""
        return self._store.problem

    @property
    def saved(self) -> bool:
        """True if what is said now is on the disk. Always False for a history in memory."""
        return self.path is not None and self.problem is None

    @property
    def note(self) -> str | None:
        """One sentence to tell once ("the history was damaged …"); it may appear later too."""
        return self._store.note

    @property
    def journal(self) -> str:
        """ "wal", "delete" (network file systems), "read-only" or "memory"."""
        return self._store.journal

    def conversations(self, *, limit: int = -1, offset: int = 0) -> list[Conversation]:
        """Pinned ones first, then the last changed first. Deleted ones are left out."""
        return [to_conversation(row) for row in self._store.rows(sql.LIST_HEADS, (limit, offset))]

    def find(self, conversation: int) -> Conversation | None:
        row = self._store.row(sql.ONE_HEAD, (conversation,))
        return to_conversation(row) if row else None

    def conversation_of(self, message: int) -> int | None:
        """The conversation that holds this message; None if there is no such message."""
        row = self._store.row("SELECT conversation FROM message WHERE id = ? AND deletion IS NULL", (message,))
        return int(row[0]) if row and self.find(int(row[0])) is not None else None

    def last(self) -> Conversation | None:
        """The conversation changed last that holds a message; pins do not matter. What `run -c` continues."""
        row = self._store.row(sql.LAST_HEAD)
        return to_conversation(row) if row else None

    def interrupted(self) -> Conversation | None:
        """The last conversation, if its open branch ends in an answer that was interrupted: one to offer."""
        head = self.last()
        row = self._store.row("SELECT state FROM message WHERE id = ?", (head.leaf,)) if head else None
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
            messages = {m.id: m for m in map(to_message, self._store.rows(sql.MESSAGES, (conversation,)))}
            for message in list(messages.values()):
                if message.state == "streaming":
                    messages[message.id] = self._store.with_pieces(message)
        return Tree(head, messages, generation=self._store.generation)

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

    def writer_elsewhere(self, tree: Tree) -> str | None:
        """The other living process that streams an answer in this conversation now, as `host pid start`."""
        owners = [owner for (owner,) in self._store.rows(sql.STREAM_OWNERS, (tree.conversation.id,))]
        return next((o for o in owners if o != self._me and is_alive(o) is not False), None)

    def answered_elsewhere(self) -> list[int]:
        """Conversations that other living processes answer now, the last asked first."""
        rows = self._store.rows(sql.ALL_STREAMS)
        return list(dict.fromkeys(int(c) for c, o in rows if o != self._me and is_alive(o) is not False))

    def search(self, query: str, *, limit: int = 50, offset: int = 0) -> list[search.Hit]:
        """Messages and given titles that hold every word of `query`, the newest first."""
        query = query.strip()
        if not query:
            return []
        expression = search.match_expression(query)
        # Nothing but signs (an emoji, "->") is not in the index: every text is looked through.
        statement = sql.SCAN if expression is None else sql.HITS
        hits = []
        for conversation, title, message, role, text, created in self._store.rows(
            statement, (expression or query, limit, offset)
        ):
            spans = search.find_spans(text, query)
            around, inside = search.snippet(text, spans)
            first = spans[0][0] if spans else 0
            hits.append(search.Hit(conversation, message, role, title, created, around, inside, first))
        return hits

    def count_hits(self, query: str) -> int:
        query = query.strip()
        if not query:
            return 0
        expression = search.match_expression(query)
        statement = sql.COUNT_SCAN if expression is None else sql.COUNT_HITS
        row = self._store.row(statement, (expression or query,))
        return int(row[0]) if row else 0
