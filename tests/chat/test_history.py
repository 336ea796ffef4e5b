"""What was said is on the disk, in order, as a tree, and only for its owner.

Covers chat/history/rows.py, chat/history/store.py, chat/history/database.py.
"""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glmchat.chat.history.history import History
from glmchat.chat.history.rows import ConversationSettings, title_from
from glmchat.core.errors import Failed, Usage


def texts(history: History, conversation: int) -> list[str]:
    return [m.text for m in history.load(conversation).path()]


def test_a_conversation_comes_back_as_it_was(history: History, history_path: Path) -> None:
    settings = ConversationSettings("Be brief.", {"temperature": 0.5, "stop": ("\n",)}, (("poet", 0.5),), "refuse")
    tree = history.new("smollm2", settings)
    history.append(tree, "user", "什么是量化？\nsecond line")
    answer = history.begin_answer(tree, details={"model": "smollm2"})
    history.add_piece(tree, answer, "It is ", (1, 2))
    history.add_piece(tree, answer, "rounding.", (70000, 3))
    history.finish_answer(tree, answer, "complete", {"seed": 7})
    with History.open(history_path) as again:
        found = again.load(tree.conversation.id)
    assert found.conversation.settings == settings
    assert found.conversation.title == "什么是量化？"
    assert found.conversation.message_count == 2
    assert found.path()[1].text == "It is rounding."
    assert found.path()[1].token_ids == (1, 2, 70000, 3)
    assert found.path()[1].details == {"model": "smollm2", "seed": 7}
    assert found.messages == tree.messages and found.conversation == tree.conversation


def test_a_new_conversation_without_a_message_leaves_no_trace(history: History) -> None:
    history.new("smollm2")
    assert history.conversations() == []


def test_a_draft_survives(history: History, history_path: Path) -> None:
    tree = history.new()
    history.save_draft(tree, "half a thou")
    with History.open(history_path) as again:
        assert again.conversations()[0].draft == "half a thou"
        assert again.last() is None  # a draft alone is nothing to continue


def test_files_and_folder_are_for_the_owner_alone(history: History, history_path: Path) -> None:
    history.append(history.new(), "user", "secret")
    for path in history_path.parent.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(history_path.parent.stat().st_mode) == 0o700


def test_an_open_file_is_closed_to_others_on_the_next_start(history_path: Path) -> None:
    History.open(history_path).close()
    history_path.chmod(0o644)
    History.open(history_path).close()
    assert stat.S_IMODE(history_path.stat().st_mode) == 0o600


def test_the_order_is_that_of_use_even_if_the_clock_goes_backwards(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter(range(2_000_000_000, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    trees = [history.new() for _ in range(3)]
    for number, tree in enumerate(trees):
        history.append(tree, "user", f"question {number}")
    history.append(trees[0], "assistant", "answer")
    assert [c.title for c in history.conversations()] == ["question 0", "question 2", "question 1"]
    assert texts(history, trees[0].conversation.id) == ["question 0", "answer"]
    last = history.last()
    assert last is not None and last.title == "question 0"


def test_pinned_conversations_come_first_but_are_not_the_last_used(history: History) -> None:
    old, new = history.new(), history.new()
    history.append(old, "user", "old")
    history.append(new, "user", "new")
    history.pin(old, True)
    assert [c.title for c in history.conversations()] == ["old", "new"]
    last = history.last()
    assert last is not None and last.title == "new"


def test_an_edited_question_opens_a_branch_and_both_can_be_walked(history: History) -> None:
    tree = history.new()
    first = history.append(tree, "user", "Paris?")
    history.append(tree, "assistant", "France.")
    follow = history.append(tree, "user", "and Rome?")
    history.append(tree, "assistant", "Italy.")
    other = history.append(tree, "user", "and Bonn?", parent=follow.parent)
    history.append(tree, "assistant", "Germany.")
    assert [m.text for m in tree.path()] == ["Paris?", "France.", "and Bonn?", "Germany."]
    assert [m.id for m in tree.siblings(other)] == [follow.id, other.id]
    history.open_branch(tree, follow)
    assert [m.text for m in tree.path()][-2:] == ["and Rome?", "Italy."]
    root = history.append(tree, "user", "Lyon?", root=True)
    assert [m.text for m in tree.path()] == ["Lyon?"]
    assert [m.id for m in tree.siblings(root)] == [first.id, root.id]
    history.open_branch(tree, tree.messages[first.id])  # as deep as it was left
    assert [m.text for m in tree.path()][-1] == "Italy."
    assert texts(history, tree.conversation.id)[-1] == "Italy."


def test_clear_marks_cut_the_context_and_delete_nothing(history: History) -> None:
    tree = history.new()
    history.append(tree, "user", "a")
    history.append(tree, "assistant", "b")
    history.append_clear(tree)
    history.append(tree, "user", "c")
    assert [m.text for m in tree.context()] == ["c"]
    assert [m.text for m in tree.path() if not m.is_clear] == ["a", "b", "c"]
    assert history.load(tree.conversation.id).conversation.message_count == 3


def test_a_deleted_message_is_passed_over_and_comes_back(history: History) -> None:
    tree = history.new()
    for number in range(4):
        history.append(tree, "user" if number % 2 == 0 else "assistant", str(number))
    path = tree.path()
    deletion = history.delete_messages(tree, path[:2], leaf=tree.leaf)
    assert texts(history, tree.conversation.id) == ["2", "3"]
    assert history.load(tree.conversation.id).conversation.message_count == 2
    history.restore(deletion, tree)
    assert texts(history, tree.conversation.id) == ["0", "1", "2", "3"]
    assert [m.text for m in tree.path()] == ["0", "1", "2", "3"]


def test_a_deleted_conversation_comes_back_or_is_purged_for_good(history: History, history_path: Path) -> None:
    tree = history.new()
    history.append(tree, "user", "the word xyzzy")
    deletion = history.delete_conversation(tree.conversation.id)
    assert history.conversations() == [] and history.search("xyzzy") == []
    with pytest.raises(Usage):
        history.load(tree.conversation.id)
    history.restore(deletion)
    assert texts(history, tree.conversation.id) == ["the word xyzzy"]
    assert history.search("xyzzy")
    history.purge([history.delete_conversation(tree.conversation.id)])
    assert history.deletions() == []
    history.close()
    for path in history_path.parent.iterdir():
        assert b"xyzzy" not in path.read_bytes(), path


def test_purged_messages_leave_a_whole_branch(history: History) -> None:
    tree = history.new()
    for number in range(6):
        history.append(tree, "user" if number % 2 == 0 else "assistant", str(number))
    path = tree.path()
    deletion = history.delete_messages(tree, path[1:4], leaf=tree.leaf)
    history.purge([deletion])
    assert texts(history, tree.conversation.id) == ["0", "4", "5"]


def test_old_deletions_are_purged_on_the_next_start(history: History, history_path: Path) -> None:
    tree = history.new()
    history.append(tree, "user", "long ago")
    history.delete_conversation(tree.conversation.id)
    with sqlite3.connect(history_path) as raw:
        raw.execute("UPDATE deletion SET created = created - 8 * 86400")
    with History.open(history_path) as again:
        assert again.deletions() == []


def test_two_windows_write_one_conversation_as_two_branches(history: History, history_path: Path) -> None:
    tree = history.new()
    history.append(tree, "user", "shared")
    with History.open(history_path) as other:
        theirs = other.load(tree.conversation.id)
        for number in range(10):
            history.append(tree, "assistant", f"mine {number}")
            other.append(theirs, "assistant", f"theirs {number}")
    found = history.load(tree.conversation.id)
    said = {m.text for m in found.messages.values()}
    assert said == {"shared"} | {f"{who} {n}" for who in ("mine", "theirs") for n in range(10)}
    assert len({m.id for m in found.messages.values()}) == 21
    assert history.refresh(tree) and tree.messages == found.messages


def test_what_another_part_changed_is_not_written_over(history: History) -> None:
    tree = history.new()
    history.append(tree, "user", "question")
    beside = history.load(tree.conversation.id)  # as the sidebar does, or another window
    history.rename(beside, "better title")
    history.pin(beside, True)
    history.append(tree, "assistant", "answer")
    history.save_draft(tree, "next")
    head = history.load(tree.conversation.id).conversation
    assert (head.title, head.pinned, head.renamed, head.draft, head.leaf) == ("better title", True, True, "next", 2)
    assert history.refresh(tree) and tree.conversation.title == "better title"


def test_many_windows_open_a_new_history_at_once(history_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from glmchat.chat.history.history import History\n"
        "h = History.open(Path(sys.argv[1])); t = h.new()\n"
        "for i in range(20): h.append(t, 'user', str(i))\n"
        "print(h.saved, h.note, len(h.load(t.conversation.id).path()))"
    )
    command = [sys.executable, "-P", "-c", code, str(history_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=300)[0] for process in running] == ["True None 20\n"] * 4


def test_without_history_nothing_reaches_the_disk(tmp_path: Path) -> None:
    with History.open(None) as history:
        tree = history.new()
        history.append(tree, "user", "between us")
        assert texts(history, tree.conversation.id) == ["between us"]
        assert not history.saved and history.problem is None
    assert list(tmp_path.iterdir()) == []


def test_a_newer_schema_is_refused_by_name(history: History, history_path: Path) -> None:
    history.close()
    with sqlite3.connect(history_path) as raw:
        raw.execute("PRAGMA user_version = 99")
    with pytest.raises(Failed, match="newer version of glmchat"):
        History.open(history_path)


def test_a_ring_of_parents_in_the_file_does_not_hang(history: History, history_path: Path) -> None:
    tree = history.new()
    history.append(tree, "user", "a")
    history.append(tree, "assistant", "b")
    with sqlite3.connect(history_path) as raw:
        raw.execute("UPDATE message SET parent = 2 WHERE id = 1")
        raw.execute("UPDATE message SET details = 'no json', token_ids = x'01' WHERE id = 2")
    found = history.load(tree.conversation.id)
    assert len(found.path()) == 2
    assert found.tip(found.messages[1]).id in (1, 2)


@pytest.mark.parametrize(
    ("question", "title"),
    [("\n\n  hello  \nmore", "hello"), ("x" * 100, "x" * 59 + "…"), ("a\x1b[31mb", "a␛[31mb"), ("", "")],
)
def test_titles_are_one_short_line(question: str, title: str) -> None:
    assert title_from(question) == title
