"""Full-text search that finds Chinese words of any length.

SQLite's `unicode61` takes a run of Han characters for one word, and `trigram` finds nothing shorter than three. So
every CJK character is set off by spaces before it is indexed, and a query becomes phrases of such characters: every
substring is found. Latin words match from their beginning.
"""

from __future__ import annotations

import re
import sqlite3
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from glmchat.chat.history import database

# Bopomofo, kana, Hangul, Han with its extensions: the scripts written without spaces, and Korean, whose endings stick.
_CJK = (
    "\u1100-\u11ff\u3005-\u3007\u3040-\u30ff\u3100-\u318f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
_SET_OFF = re.compile(f"([{_CJK}])")
_TOKEN = re.compile(f"[{_CJK}]|[^\\W_{_CJK}]+")
_INSIDE_WORD = re.compile(f"[^\\W{_CJK}]{{2}}")
CONTEXT = 60  # characters around a hit in its snippet
Rows = Callable[[str, Sequence[Any]], list[tuple[Any, ...]]]  # what a statement with these values selects


@dataclass(frozen=True, slots=True)
class Hit:
    """One message (or title, then `message` is None) that holds every word of the query."""

    conversation: int
    message: int | None
    role: str | None
    title: str
    created: float
    snippet: str
    spans: tuple[tuple[int, int], ...]  # [start, end) in the snippet, to highlight
    offset: int  # of the first word in the whole text


def grouped(hits: Iterable[Hit]) -> list[list[Hit]]:
    """The hits of each conversation together, conversations in the order of their first hits."""
    groups: dict[int, list[Hit]] = {}
    for hit in hits:
        groups.setdefault(hit.conversation, []).append(hit)
    return list(groups.values())


def spaced(text: str) -> str:
    """The text as it is indexed."""
    return _SET_OFF.sub(r" \1 ", text)


def _phrases(query: str) -> list[list[str]]:
    """ "量化 model" -> [["量", "化"], ["model"]]; words in double quotes are one phrase."""
    parts = [a or b for a, b in re.findall(r'"([^"]*)"|([^\s"]+)', query)]
    return [tokens for part in parts if (tokens := _TOKEN.findall(part))]


def match_expression(query: str) -> str | None:
    """The query in FTS5's language, every word of it quoted; None if it holds no letter or digit."""
    terms = []
    for tokens in _phrases(query):
        text = " ".join(tokens).replace('"', "")
        # The last Latin word matches as a beginning: people type less than the word.
        terms.append(f'"{text}"' + ("" if _SET_OFF.match(tokens[-1]) else "*"))
    return " AND ".join(terms) or None


def _folded(text: str) -> tuple[str, list[int]]:
    """Lower case without diacritics, as unicode61 sees it, and for each character its place in `text`."""
    if text.isascii():
        return text.lower(), list(range(len(text)))
    letters: list[str] = []
    places: list[int] = []
    for place, character in enumerate(text):
        for letter in unicodedata.normalize("NFD", character) if not _SET_OFF.match(character) else character:
            if not unicodedata.combining(letter):
                for low in letter.lower():
                    letters.append(low)
                    places.append(place)
    return "".join(letters), places


def find_spans(text: str, query: str) -> list[tuple[int, int]]:
    """Where the words of `query` stand in `text`: [start, end) of characters, in order, not overlapping."""
    folded, places = _folded(text)
    spans: list[tuple[int, int]] = []
    patterns = [r"[\W_]*".join(re.escape(_folded(token)[0]) for token in tokens) for tokens in _phrases(query)] or [
        re.escape(_folded(query.strip())[0])
    ]
    for pattern in patterns:
        if not pattern:
            continue
        # A Latin word is found only at its beginning, as the index does.
        bounded = pattern if _SET_OFF.match(pattern[0]) or not pattern[0].isalnum() else rf"(?<![^\W_{_CJK}]){pattern}"
        for match in re.finditer(bounded, folded):
            if match.end() > match.start():
                spans.append((places[match.start()], places[match.end() - 1] + 1))
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def snippet(text: str, spans: Sequence[tuple[int, int]]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """The text around the first span on one line, and the spans that lie in it."""
    first = spans[0][0] if spans else 0
    start, end = max(0, first - CONTEXT // 2), min(len(text), first + CONTEXT * 2)
    if start and _INSIDE_WORD.match(text, start - 1) and (blank := re.search(r"\s", text[start:first])):
        start += blank.end()  # rather less of the text than the rest of a word
    before, after = ("…" if start else ""), ("…" if end < len(text) else "")
    # One character for one character, so that the spans stay right.
    body = "".join(" " if c in "\n\r\t\v\f\u2028\u2029" else c for c in text[start:end])
    shift = len(before) - start
    inside = tuple((max(a, start) + shift, min(b, end) + shift) for a, b in spans if a < end and b > start)
    return before + body + after, inside


def find_hits(rows: Rows, query: str, limit: int, offset: int) -> list[Hit]:
    """Messages and given titles that hold every word of `query`, the newest first."""
    query = query.strip()
    if not query:
        return []
    expression = match_expression(query)
    # Nothing but signs (an emoji, "->") is not in the index: every text is looked through.
    statement = database.SCAN if expression is None else database.HITS
    hits = []
    for conversation, title, message, role, text, created in rows(statement, (expression or query, limit, offset)):
        spans = find_spans(text, query)
        around, inside = snippet(text, spans)
        first = spans[0][0] if spans else 0
        hits.append(Hit(conversation, message, role, title, created, around, inside, first))
    return hits


def count_hits(rows: Rows, query: str) -> int:
    query = query.strip()
    if not query:
        return 0
    expression = match_expression(query)
    statement = database.COUNT_SCAN if expression is None else database.COUNT_HITS
    return int(next(iter(rows(statement, (expression or query,))), (0,))[0])


# The index holds nothing that the conversations do not: damage to it alone is mended by making it anew.


class BrokenIndex(sqlite3.DatabaseError):
    """What SQLite says of a statement about the index, and of nothing else that is wrong."""


def is_broken(error: sqlite3.Error, statement: str = "") -> bool:
    """Whether SQLite says this of the index, not of a lock, a full disk or the conversations.

    statement: that which failed. The index writes down what it was given only at the end of a transaction.
    """
    code = getattr(error, "sqlite_errorcode", 0)
    if isinstance(error, BrokenIndex) or code == sqlite3.SQLITE_CORRUPT_VTAB:
        return True
    if statement == "COMMIT":
        return bool(code & 0xFF == sqlite3.SQLITE_ERROR)
    return is_about_index(statement) and code & 0xFF in (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT)


def is_about_index(statement: str) -> bool:
    """Whether it reads or writes the index; what a transaction wrote to it is written down at the transaction's end."""
    return " search " in statement or statement == "COMMIT"


def rebuild(connection: sqlite3.Connection) -> None:
    """Make the index anew of what the conversations say, in one transaction. Raises sqlite3.DatabaseError."""
    connection.create_function("spaced", 1, lambda text: spaced(text.decode("utf-8", "replace")))
    connection.execute("BEGIN IMMEDIATE")
    try:
        _drop(connection)
        for statement in (database.SEARCH, *database.INDEX_ALL):
            connection.execute(statement)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _drop(connection: sqlite3.Connection) -> None:
    try:
        connection.execute("DROP TABLE IF EXISTS search")
    except (sqlite3.DatabaseError, MemoryError):  # one that cannot even be opened
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("DELETE FROM sqlite_master WHERE name = 'search'")
        connection.execute("PRAGMA writable_schema = RESET")
    for part in ("data", "idx", "content", "docsize", "config"):
        connection.execute(f"DROP TABLE IF EXISTS search_{part}")
