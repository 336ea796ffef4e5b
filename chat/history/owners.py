"""Who is writing an answer: the process that owns it, here or on another machine that shares the history."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace

from glmchat.chat.history import database
from glmchat.chat.history.rows import to_message
from glmchat.chat.history.store import Store
from glmchat.core.processes import is_alive, this_process

FOREIGN_OWNER_SECONDS = 600.0  # a writer on another machine cannot be asked; it counts as alive this long
BEAT_SECONDS = 10.0  # a writer adds something to its answer at least so often, be it an empty piece
SILENT_SECONDS = 60.0  # one on another machine that was seen to add nothing for so long is gone
Heard = dict[
    int, tuple[int, float]
]  # answer of such a writer -> its pieces, and since when (monotonic) there are so many


def writer_elsewhere(store: Store, conversation: int, heard: Heard) -> str | None:
    """The other living process that streams an answer in this conversation now, as `host pid start`.

    heard: what earlier looks saw of writers on other machines. One that fell silent is gone: its answer is marked.
    """
    living = None
    for message, owner, pieces in store.rows(database.STREAM_OWNERS, (conversation,)):
        alive = owner != this_process() and is_alive(owner)
        if alive is None:
            before, since = heard.get(message, (-1, 0.0))
            heard[message] = (pieces, since if pieces == before else time.monotonic())
            alive = time.monotonic() - heard[message][1] < SILENT_SECONDS
            if not alive:
                mark_interrupted(store, gone=(message,))
        living = living or (owner if alive else None)
    return living


def answered_elsewhere(store: Store) -> list[int]:
    """Conversations that other living processes answer now, the last asked first."""
    rows = store.rows(database.ALL_STREAMS)
    return list(dict.fromkeys(int(c) for c, o in rows if o != this_process() and is_alive(o) is not False))


def mark_interrupted(store: Store, gone: Collection[int] = ()) -> int:
    """Answers whose writer is gone keep what was said and are marked; those of living windows are left alone.

    gone: answers whose writers are known to be.
    """
    marked = 0
    for *columns, updated in store.rows(database.STREAMING):
        message = to_message(columns)
        alive = message.id not in gone and is_alive(message.owner)
        if alive is None:
            alive = abs(time.time() - float(updated or 0.0)) < FOREIGN_OWNER_SECONDS
        if not alive:
            whole = replace(store.with_pieces(message), state="interrupted", owner=None)
            marked += store.attempt(lambda whole=whole: store.write_message(whole))  # type: ignore[misc]
    return marked
