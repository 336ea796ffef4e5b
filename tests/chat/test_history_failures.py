"""A bad disk costs the saving, never the conversation; a crash costs at most the last second.

Covers chat/history/database.py, chat/history/owners.py, core/processes.py.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from polling import wait_until
from speakers import LocalSpeaker

from glmchat.chat.history import database, owners
from glmchat.chat.history.database import prepare
from glmchat.chat.history.history import History
from glmchat.chat.history.transcript import add_to_history, read_import
from glmchat.chat.session import ChatSession
from glmchat.core.errors import DoesNotFit, Failed, Usage
from glmchat.core.processes import is_alive, this_process

WRITER = """
import sys, time
from pathlib import Path
from glmchat.chat.history.history import History
from glmchat.chat.session import ChatSession
sys.path[:0] = sys.argv[2:]
from speakers import LocalSpeaker
from glmchat.core.messages import Piece
history = History.open(Path(sys.argv[1]))
session = ChatSession(history, LocalSpeaker(*(f"w{n} " for n in range(100000)), seconds=0.002))
print("ready", flush=True)
for event in session.ask("question"):
    if isinstance(event, Piece):
        print(f"{time.monotonic()} {event.text}", flush=True)
"""


def start_writer(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-c", WRITER, str(path), *map(str, Path(__file__).parents[:2])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str], begin: Sequence[str] = ()) -> tuple[float, list[tuple[float, str]]]:
    """kill -9; returns when, and what had been said by then: `begin`, which was read already, and the rest."""
    process.send_signal(signal.SIGKILL)
    died = time.monotonic()
    assert process.stdout is not None
    whole = "".join(begin) + process.stdout.read()
    lines = [line.split(" ", 1) for line in whole.splitlines() if line.endswith(" ")]
    process.wait()
    process.stdout.close()
    return died, [(float(when), text) for when, text in lines]


def test_kill_9_while_an_answer_streams_loses_at_most_the_last_second(history_path: Path) -> None:
    for attempt in range(3):
        process = start_writer(history_path)
        assert process.stdout is not None
        begin = [process.stdout.readline() for _ in range(random.randrange(100, 600))]  # some 2 ms each
        died, said = kill(process, begin)
        with History.open(history_path) as history:
            head = history.last()
            assert head is not None
            assert history.interrupted() == head
            question, answer = history.load(head.id).path()
            assert question.text == "question" and answer.state == "interrupted" and answer.owner is None
            older = "".join(text for when, text in said if when < died - 1.0)
            assert answer.text.startswith(older), attempt
            assert len(answer.token_ids) == answer.text.count(" ")
            assert answer.can_continue or not answer.text
            assert history.store.rows("PRAGMA integrity_check") == [("ok",)]


def test_an_answer_that_another_living_window_streams_is_left_alone(history_path: Path) -> None:
    process = start_writer(history_path)
    try:
        with History.open(history_path) as history:
            wait_until(lambda: history.last() and history.load(1).path()[-1].state == "streaming")
            tree = history.load(1)
            assert history.interrupted() is None
            owner = history.writer_elsewhere(tree)
            assert owner is not None and f" {process.pid} " in owner
            before = len(tree.path()[-1].text)
            wait_until(lambda: history.refresh(tree))
            assert len(tree.path()[-1].text) > before  # it can be followed from here
    finally:
        kill(process)


def test_a_writer_on_another_machine_blocks_until_it_has_been_silent_for_a_minute(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process cannot be asked: the clocks of two machines differ, so only what is seen to come from it counts."""
    clock = [1000.0]
    monkeypatch.setattr(owners.time, "monotonic", lambda: clock[0])
    tree = history.new()
    history.append(tree, "user", "question")
    answer = history.begin_answer(tree)
    history.add_piece(tree, answer, "begun")
    history.store.attempt(
        lambda: history.store.run("UPDATE message SET owner = 'box/boot 7 1' WHERE id = ?", (answer.id,))
    )
    seen = history.load(tree.conversation.id)
    for _ in range(4):  # it writes nothing but that it lives, over a long prompt
        assert history.writer_elsewhere(seen) == "box/boot 7 1"
        clock[0] += owners.SILENT_SECONDS - 1
        history.store.attempt(lambda: history.store.write_piece(answer.id, "", ()))
    session = ChatSession(history, LocalSpeaker("fine"), seen.conversation.id)
    with pytest.raises(Usage, match="on box") as refused:
        list(session.ask("and now?"))
    assert refused.value.code == "chat.elsewhere"
    clock[0] += owners.SILENT_SECONDS + 1
    assert history.writer_elsewhere(seen) is None
    list(session.ask("and now?"))
    assert [(m.text, m.state) for m in session.tree.path()] == [
        ("question", "complete"), ("begun", "interrupted"), ("and now?", "complete"), ("fine", "complete")
    ]  # fmt: skip


def test_a_writer_that_waits_for_its_first_word_shows_that_it_lives(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glmchat.chat.stream.BEAT_SECONDS", 0.1)
    session = ChatSession(history, LocalSpeaker(silent=True))
    events = session.ask("a long prompt")
    next(events)
    thread = threading.Thread(target=list, args=(events,), daemon=True)
    thread.start()
    wait_until(lambda: history.store.rows("SELECT count(*) FROM piece")[0][0] > 1)
    session.stop()
    thread.join()
    assert session.tree.path()[-1].text == ""


def test_a_process_is_told_from_a_later_one_with_its_number() -> None:
    me = this_process()
    assert is_alive(me) is True
    machine, pid, start = me.split(" ")
    assert is_alive(f"{machine} {pid} {start}9") is False
    assert is_alive(f"{machine} 4194303 1") is False
    assert is_alive(f"elsewhere/other {pid} {start}") is None
    assert is_alive(f"{machine.partition('/')[0]}/an-earlier-boot {pid} {start}") is False
    assert is_alive(None) is False and is_alive("rubbish") is False


def limit_pages(history: History, pages: int) -> None:
    """The real SQLITE_FULL: as if the disk had room for so many more pages."""
    (count,) = history.store.rows("PRAGMA page_count")[0]
    history.store.rows(f"PRAGMA max_page_count = {count + pages}")


def test_a_full_disk_while_an_answer_streams_costs_only_the_saving(history: History, history_path: Path) -> None:
    tree = history.new()
    history.append(tree, "user", "question")
    answer = history.begin_answer(tree)
    history.add_piece(tree, answer, "begun ", (1,))
    assert history.saved
    limit_pages(history, 2)
    big = "x" * 20_000
    for number in range(3):
        history.add_piece(tree, answer, big, (number,))
    assert not history.saved and "full" in (history.problem or "")
    history.finish_answer(tree, answer, "complete")
    extra = history.append(tree, "user", "still talking")
    assert [m.text for m in tree.path()] == ["question", "begun " + 3 * big, "still talking"]
    limit_pages(history, 1000)  # somebody made room
    history.append(tree, "assistant", "saving again")
    assert history.saved
    with History.open(history_path) as again:
        found = again.load(tree.conversation.id)
        assert found.messages == tree.messages
        assert [h.message for h in again.search("still talking")] == [extra.id]
        assert again.store.rows("PRAGMA integrity_check") == [("ok",)]


def test_a_conversation_begun_on_a_full_disk_is_saved_later(history: History, history_path: Path) -> None:
    history.store.rows("PRAGMA query_only = ON")  # every write fails
    tree = history.new()
    history.append(tree, "user", "first")
    history.append(tree, "assistant", "second")
    assert not history.saved
    history.store.rows("PRAGMA query_only = OFF")
    history.append(tree, "user", "third")
    assert history.saved
    other = history.new()
    history.append(other, "user", "a later one")
    with History.open(history_path) as again:
        assert [m.text for m in again.load(tree.conversation.id).path()] == ["first", "second", "third"]
        assert [m.text for m in again.load(other.conversation.id).path()] == ["a later one"]


def test_an_unwritable_home_is_told_and_the_chat_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    with History.open(blocked / "data" / "history.db") as history:
        assert not history.saved and history.problem
        tree = history.new()
        history.append(tree, "user", "hello")
        history.append(tree, "assistant", "hi")
        assert [m.text for m in tree.path()] == ["hello", "hi"]
        assert [c.title for c in history.conversations()] == ["hello"]
        assert not history.saved and history.problem


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_history_can_be_read(history: History, history_path: Path) -> None:
    read_only(history, history_path)


def test_a_history_that_cannot_be_opened_for_writing_can_be_read(
    history: History, history_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(database, "create_private", refuse)
    read_only(history, history_path)


def read_only(history: History, history_path: Path) -> None:
    tree = history.new()
    history.append(tree, "user", "kept")
    history.close()
    history_path.chmod(0o400)
    history_path.parent.chmod(0o500)
    try:
        with History.open(history_path) as again:
            assert not again.saved and again.problem
            found = again.load(tree.conversation.id)
            again.append(found, "assistant", "not saved")
            assert [m.text for m in found.path()] == ["kept", "not saved"]
            assert again.search("kept")
    finally:
        history_path.parent.chmod(0o700)


@pytest.mark.parametrize("damage", ["garbage", "cut", "header"])
def test_a_damaged_history_is_set_aside_and_a_new_one_begun(history: History, history_path: Path, damage: str) -> None:
    tree = history.new()
    for number in range(200):
        history.append(tree, "user", f"message {number} " * 20)
    history.close()
    data = history_path.read_bytes()
    spoilt = {"garbage": b"no database at all " * 500, "cut": data[: len(data) // 3], "header": b"X" * 50 + data[50:]}
    history_path.write_bytes(spoilt[damage])
    with History.open(history_path) as again:
        assert again.saved and again.conversations() == []
        assert again.note is not None and "corrupt-" in again.note
        again.append(again.new(), "user", "a new beginning")
    (aside,) = [p for p in history_path.parent.iterdir() if ".corrupt-" in p.name]
    assert aside.read_bytes() == spoilt[damage]
    with History.open(history_path) as third:
        assert third.note is None and len(third.conversations()) == 1


def test_damage_that_shows_in_the_middle_loses_nothing_of_the_open_conversation(history_path: Path) -> None:
    with History.open(history_path) as history:
        tree = history.new()
        for number in range(300):
            history.append(tree, "user", f"message {number} " * 30)
        history.store.rows("PRAGMA wal_checkpoint(TRUNCATE)")
        size = history_path.stat().st_size
        with history_path.open("r+b") as file:
            file.seek(4096)
            file.write(os.urandom(size - 4096))
        history.store.rows("PRAGMA shrink_memory")
        with sqlite3.connect(history_path) as other:  # makes the first connection drop its cached pages
            other.execute("PRAGMA user_version")
        for number in range(3):
            history.append(tree, "user", f"after {number}")
        assert len(tree.path()) == 303
        if history.note is not None:  # noticed: everything open is in the new file
            assert history.saved
            assert len(history.load(tree.conversation.id).path()) == 303


def test_wal_is_used_here_and_a_rollback_journal_on_a_network_disk(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert history.journal == "wal"
    monkeypatch.setattr(database, "filesystem", lambda path: "nfs4")
    with History.open(tmp_path / "nfs" / "history.db") as remote:
        assert remote.journal == "delete"
        tree = remote.new()
        remote.append(tree, "user", "hello")
        with History.open(tmp_path / "nfs" / "history.db") as second:
            assert [m.text for m in second.load(tree.conversation.id).path()] == ["hello"]


def test_a_lock_that_is_held_too_long_is_told_and_waited_out(
    history: History, history_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history.store.rows("PRAGMA busy_timeout = 50")
    tree = history.new()
    history.append(tree, "user", "before")
    with sqlite3.connect(history_path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        history.append(tree, "assistant", "messages in between")
        assert not history.saved and "locked" in (history.problem or "")
        other.execute("ROLLBACK")
    history.append(tree, "user", "after")
    assert history.saved
    assert [m.text for m in history.load(tree.conversation.id).path()] == ["before", "messages in between", "after"]


@pytest.mark.parametrize("pages", [2, 9])
def test_a_disk_that_is_full_at_the_first_start_is_called_full(tmp_path: Path, pages: int) -> None:
    connection = sqlite3.connect(tmp_path / "history.db", isolation_level=None)
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        prepare(connection)
    connection.close()


def test_what_a_full_disk_did_not_take_is_told_and_not_called_done(history: History) -> None:
    head = history.append(history.new(), "user", "question").conversation
    deletion = history.delete_conversation(head)
    limit_pages(history, 0)
    history.store.rows("PRAGMA query_only = ON")  # as a disk without room for one more page of the log
    history.restore(deletion)
    with pytest.raises(Failed, match="cannot be written"):
        history.require_saved()
    history.store.rows("PRAGMA query_only = OFF")
    history.restore(deletion)
    history.require_saved()
    assert history.find(head) is not None


def test_an_import_that_the_disk_has_no_room_for_leaves_nothing_of_it(history: History) -> None:
    history.append(history.new(), "user", "before")
    incoming = read_import(json.dumps([{"role": "user", "content": "x " * 40_000}]).encode(), "f")
    limit_pages(history, 2)
    with pytest.raises(DoesNotFit) as caught:
        add_to_history(history, incoming)
    assert caught.value.code == "history.unsaved" and "full" in caught.value.message
    limit_pages(history, 10_000)
    assert [c.title for c in history.conversations()] == ["before"]
    (tree,) = add_to_history(history, incoming)
    assert history.saved and history.find(tree.conversation.id) is not None


def test_the_rights_of_what_a_link_leads_to_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_bytes(b"no database")
    (tmp_path / "theirs").chmod(0o644)
    path = tmp_path / "data" / "history.db"
    path.parent.mkdir(mode=0o700)
    path.symlink_to(tmp_path / "theirs")
    with History.open(path) as history:
        assert history.note is not None and "damaged" in history.note
    assert (tmp_path / "theirs").read_bytes() == b"no database"
    assert (tmp_path / "theirs").stat().st_mode & 0o777 == 0o644


INDEX_DAMAGE = {
    "no version": ["DELETE FROM search_config"],
    "nothing in it": ["DELETE FROM search_data"],
    "noise in it": ["UPDATE search_data SET block = randomblob(200)"],
    "noise that claims great lengths": ["UPDATE search_data SET block = x'b12774964e30d397423de886c03e4aab'"],
    "a part is gone": ["DROP TABLE search_idx"],
    "the texts are gone": ["DROP TABLE search_content"],
    "no index": ["DROP TABLE search"],
    "another table": ["DROP TABLE search", "CREATE TABLE search (x)"],
    "a view": ["DROP TABLE search", "CREATE VIEW search AS SELECT 1 AS x"],
}


def damage_index(history_path: Path, damage: str) -> None:
    connection = sqlite3.connect(history_path)
    for statement in INDEX_DAMAGE[damage]:
        connection.execute(statement)
    connection.commit()
    connection.close()


@pytest.mark.parametrize("damage", INDEX_DAMAGE)
def test_a_damaged_index_of_the_search_is_built_anew_and_no_conversation_is_lost(
    history: History, history_path: Path, damage: str
) -> None:
    tree = history.new("m")
    history.append(tree, "user", "量化 quantisation")
    history.rename(tree, "headline")
    history.close()
    damage_index(history_path, damage)
    with History.open(history_path) as again:
        assert [hit.conversation for hit in again.search("量化")] == [tree.conversation.id]
        assert again.count_hits("headline") == 1
        assert again.note == "The index of the search was damaged and was built anew. No conversation is lost."
        assert again.saved and [c.title for c in again.conversations()] == ["headline"]
        history_tree = again.load(tree.conversation.id)
        again.append(history_tree, "assistant", "afterwards")
        assert again.count_hits("afterwards") == 1
    assert not list(history_path.parent.glob("*damaged*"))
    with History.open(history_path) as third:
        assert third.note is None and third.count_hits("afterwards") == 1


@pytest.mark.parametrize("damage", [name for name in INDEX_DAMAGE if name != "no version"])  # read once, when opened
def test_an_index_that_breaks_while_the_history_is_open_is_built_anew(
    history: History, history_path: Path, damage: str
) -> None:
    tree = history.new("m")
    history.append(tree, "user", "before")
    damage_index(history_path, damage)
    history.append(tree, "user", "afterwards")
    assert history.count_hits("before") == history.count_hits("afterwards") == 1
    assert history.saved and history.note and "No conversation is lost" in history.note
    assert [m.text for m in history.load(tree.conversation.id).path()] == ["before", "afterwards"]


def test_a_log_that_is_none_is_kept_and_told_instead_of_being_written_over(history_path: Path) -> None:
    with History.open(history_path) as history:
        history.append(history.new("m"), "user", "in the database")
    log = history_path.with_name(f"{history_path.name}-wal")
    log.write_bytes(b"\xff" * 5000)
    with History.open(history_path) as history:
        assert history.note is not None and f"{log.name}.corrupt-" in history.note
        assert [head.title for head in history.conversations()] == ["in the database"]
        history.append(history.new("m"), "user", "after it")
    (aside,) = history_path.parent.glob(f"{log.name}.corrupt-*")
    assert aside.read_bytes() == b"\xff" * 5000
    with History.open(history_path) as history:
        assert history.note is None and len(history.conversations()) == 2


def test_where_a_file_system_begins_is_told_as_psutil_tells_it() -> None:
    for part in psutil.disk_partitions(all=True):
        if (place := Path(part.mountpoint)).is_dir():
            last = [one.fstype for one in psutil.disk_partitions(all=True) if one.mountpoint == part.mountpoint][-1]
            assert database.filesystem(place) == last, part.mountpoint


def test_what_a_start_loads_asks_the_system_itself() -> None:
    """psutil takes 10 ms of the processor to import, and a start has half a second."""
    code = (
        "import sys, glmchat.chat.connect, glmchat.chat.history.history as h, glmchat.core.processes as o\n"
        "import glmchat.chat.shared_engine as s, os\n"
        "h.History.open(None)\nassert o.this_process() and s._lives(os.getpid())\n"
        "assert 'psutil' not in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
