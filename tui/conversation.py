"""A stored conversation as turns of the transcript."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len

from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.tui.transcript.turns import State, Turn
from glmchat.tui.transcript.wrapping import rows

if TYPE_CHECKING:
    from glmchat.chat.history.rows import StoredMessage
    from glmchat.chat.session import ChatSession
    from glmchat.tui.transcript.transcript import Transcript


def turns_of(session: ChatSession) -> list[Turn]:
    """Every message of the open branch, clear marks as rules, and the line above which the model no longer sees."""
    unseen = set(session.unseen)
    versions: dict[tuple[int | None, str], list[int]] = {}
    for message in session.tree.messages.values():
        if message.deletion is None:
            versions.setdefault((message.parent, message.role), []).append(message.id)
    turns: list[Turn] = []
    was_unseen = False
    path = session.tree.path()
    rules = system_rules(session, path)
    for message in path:
        hidden = message.id in unseen
        if was_unseen and not hidden:
            turns.append(Turn("unseen", "rule", tr("the model no longer sees anything above this line")))
        was_unseen = hidden
        if message.id in rules:
            turns.append(rules[message.id])
        turns.append(turn_of(session, message, sorted(versions[message.parent, message.role]), hidden))
    return turns


def system_rules(session: ChatSession, path: Sequence[StoredMessage]) -> dict[int, Turn]:
    """Where answers have another system prompt than those before: the message to stand above, and a line that says it.

    The config's needs no word. Of answers of other programs it is not known.
    """
    from glmchat.chat.context import is_completion  # not before the first frame

    rules: dict[int, Turn] = {}
    before, question = session.default_system, None
    for message in path:
        if message.role == "user":
            question = None if is_completion(message) else message.id
        elif message.role == "assistant" and question is not None and "system" in message.details:
            now = message.details["system"] or None
            if now != before:
                words = (
                    tr("system prompt: {text}", text=one_line(now, 60)) if now else tr("no system prompt from here on")
                )
                rules[question] = Turn(f"system-{question}", "rule", words)
            before = now
    return rules


def turn_of(session: ChatSession, message: StoredMessage, versions: list[int], unseen: bool = False) -> Turn:
    """versions: the ids of all versions of this message, itself among them."""
    key = str(message.id)
    if message.is_clear:
        return Turn(key, "rule", tr("new context"))
    branch = (
        tr("version {i} of {n} · Ctrl+↑, then ‹ › show the others", i=versions.index(message.id) + 1, n=len(versions))
        if len(versions) > 1
        else ""
    )
    if message.role == "assistant":
        notes = " · ".join(note for note in (state_note(message), branch) if note)
        state: State = "streaming" if message.state == "streaming" else "done"
        return Turn(key, "assistant", message.text, speaker(session, message), notes, "", state, unseen)
    if message.role == "user":
        return Turn(key, "user", message.text, note=branch, unseen=unseen)
    return Turn(key, "notice", f"{message.role}: {message.text}")


def speaker(session: ChatSession, message: StoredMessage) -> str:
    """Who answered: the model, and its adapters."""
    from glmchat.chat.history.transcript import answered_by  # it brings the database

    return answered_by(message, session.identity.model or tr("model"))


def state_note(message: StoredMessage) -> str:
    """Why an answer ended, if the model did not end it, and that its system prompt became part of the question."""
    from glmchat.chat.answering import system_note

    notes = (_end_note(message), system_note(message.details.get("facts") or {}))
    return " · ".join(note for note in notes if note)


def _end_note(message: StoredMessage) -> str:
    from glmchat.chat.answering import cut_note

    match message.state:
        case "stopped":
            if not message.text:
                return tr("stopped before it began · /regen asks again")
            return tr("stopped · /continue resumes")
        case "interrupted":
            return tr("interrupted · /continue resumes")
        case "cut":
            return f"{cut_note(message.details.get('facts') or {})} · {tr('/continue resumes')}"
        case "failed":
            return (
                tr("the answer was cut off · /continue resumes")
                if message.text
                else tr("no answer · /regen asks again")
            )
        case _:
            return ""


def note_of(session: ChatSession, answer: StoredMessage) -> str:
    """What stands below an answer of the open branch."""
    turn = next((t for t in turns_of(session) if t.key == str(answer.id)), None)
    return turn.note if turn else state_note(answer)


def show_changes(transcript: Transcript, before: Sequence[str], turns: Sequence[Turn]) -> None:
    """Draw what another window made of the conversation, with a line above what is new. before: keys that were shown.

    An answer that it is still writing grows in its place.
    """
    shown = {turn.key: turn for turn in transcript.turns}
    if before == [turn.key for turn in turns] and all(_continues(shown.get(turn.key), turn) for turn in turns):
        for turn in turns:
            if more := turn.text[len(shown[turn.key].text) :]:
                transcript.feed(turn.key, more)
            if turn.state == "done" and shown[turn.key].state != "done":
                transcript.finish(turn.key, turn.note)
            elif (turn.note, turn.label) != (shown[turn.key].note, shown[turn.key].label):
                transcript.change(turn.key, note=turn.note, label=turn.label)
        return
    first = next((n for n, turn in enumerate(turns) if n >= len(before) or turn.key != before[n]), len(turns))
    line = Turn("elsewhere", "rule", tr("another window went on here"))
    transcript.show([*turns[:first], line, *turns[first:]], at_end=transcript.is_at_end)


def _continues(shown: Turn | None, turn: Turn) -> bool:
    return shown is not None and turn.text.startswith(shown.text)


def mark_unseen(transcript: Transcript, unseen: Iterable[int]) -> None:
    """Draw the line above which the model no longer sees."""
    keys = {str(i) for i in unseen}
    transcript.drop("unseen")
    last = -1
    for index, turn in enumerate(transcript.turns):
        hidden = turn.key in keys
        if hidden:
            last = index
        if hidden != turn.unseen:
            transcript.change(turn.key, unseen=hidden)
    if last >= 0:
        transcript.insert(last + 1, Turn("unseen", "rule", tr("the model no longer sees anything above this line")))


def columns(pairs: list[tuple[str, str]], width: int) -> str:
    """Titles and values below each other, aligned, long values wrapped in their column."""
    column = max((cell_len(title) for title, _ in pairs), default=0) + 2
    lines = []
    for title, value in pairs:
        wrapped = [value[row.start : row.end] for row in rows(value, max(12, width - column))]
        lines.append(title + " " * (column - cell_len(title)) + ("\n" + " " * column).join(wrapped))
    return "\n".join(lines)
