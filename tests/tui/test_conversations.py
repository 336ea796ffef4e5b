"""The list of conversations and what belongs to each, in a pseudo-terminal.

Covers tui/widgets/sidebar.py, tui/composer.py, tui/talk.py.
"""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from fakes import model_in
from screen import TerminalSession

from glmchat.chat.history.history import History
from glmchat.core import locations

TITLES = ("alpha question", "bravo question", "charlie question")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """And three conversations, the first the newest."""
    with History.default() as history:
        for title in reversed(TITLES):
            tree = history.new()
            history.append(tree, "user", title)
            history.append(tree, "assistant", f"an answer to {title.split()[0]}")
    return model_in(tmp_path / "model")


def in_order(terminal: TerminalSession, *texts: str) -> bool:
    places = [terminal.text.find(text) for text in texts]
    return places == sorted(places) and min(places) >= 0


def test_a_search_ends_with_the_list_and_a_title_is_not_typed_into_a_search_field(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.press("ctrl+f")
        terminal.until_seen("search everything")
        terminal.type("bravo")
        terminal.until_seen("answer to bravo")
        terminal.press("enter")
        terminal.until_seen("y copy")
        terminal.press("ctrl+b")
        terminal.until(lambda: "╭─ Conversations" not in terminal.text)
        terminal.press("ctrl+b")
        terminal.until_seen(*TITLES, "search everything")
        terminal.press("home", "r")  # the newest
        terminal.until_seen("new title")
        terminal.type(" renamed")
        terminal.press("enter")
        terminal.until(lambda: "alpha question renamed" in terminal.text and "new title" not in terminal.text)


def test_only_what_is_said_changes_the_order_of_the_list(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.press("ctrl+b")
        terminal.until_seen(*TITLES)
        terminal.press("end", "r")
        terminal.until_seen("new title")
        terminal.type("X")
        terminal.press("enter")
        terminal.until(lambda: in_order(terminal, *TITLES, "questionX"))
        terminal.press("p")
        terminal.until(lambda: in_order(terminal, "★ charlie", *TITLES[:2]))
        terminal.press("p")
        terminal.until(lambda: in_order(terminal, *TITLES))


def test_what_is_typed_stays_with_its_conversation(model: Path) -> None:
    with TerminalSession("run", model, "-c") as terminal:
        terminal.until_ready()
        terminal.until_seen("an answer to alpha")
        terminal.type("draft of alpha")
        terminal.until_seen("draft of alpha")
        terminal.press("ctrl+n")
        terminal.until(lambda: "draft of alpha" not in terminal.text and "Ask anything" in terminal.text)
        terminal.type("draft of nothing")
        terminal.until_seen("draft of nothing")
        terminal.press("ctrl+f")
        terminal.until_seen("search everything")
        terminal.type("alpha")
        terminal.until_seen("answer to alpha")
        terminal.press("enter")
        terminal.until_seen("an answer to alpha", "│ draft of alpha")
        assert "│ draft of nothing" not in terminal.text


def test_a_draft_of_a_new_conversation_is_offered_at_the_next_start(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.type("the longest question")
        terminal.until_seen("the longest question")
        terminal.press("ctrl+q")
        terminal.until_ended()
    with TerminalSession("run", model) as terminal:
        terminal.until_seen("not sent: “the longest question”")
        terminal.until_ready()
        terminal.say("/resume")
        terminal.until_seen("│ the longest question")
        terminal.press("ctrl+c")
        terminal.until_seen("Ask anything")
        terminal.press("ctrl+q")
        terminal.until_ended()
    with TerminalSession("run", model) as terminal:  # emptied, it does not come back
        terminal.until_ready()
        terminal.until_still()
        assert "longest" not in terminal.text


def test_answers_of_single_commands_are_listed_when_they_are_asked_for(model: Path) -> None:
    with TerminalSession("run", model, "a single command") as terminal:
        terminal.until_ended()
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.press("ctrl+b")
        terminal.until_seen(*TITLES)
        assert "a single command" not in terminal.text
        terminal.press("o")
        terminal.until_seen("a single command")
        terminal.press("home", "enter")
        terminal.until_seen("one two")
        terminal.say("and on")
        terminal.until(lambda: terminal.text.count("one two") == 2)
        terminal.press("ctrl+n", "ctrl+b", "ctrl+b", "o")
        terminal.until_seen("a single command")


def test_the_list_that_opened_by_itself_has_its_cursor_at_the_open_conversation(model: Path) -> None:
    def row_of(title: str) -> str:
        return next((line[:36] for line in terminal.lines if title in line[:36]), "")

    with TerminalSession("run", model, columns=140) as terminal:
        terminal.until_ready()
        terminal.until(lambda: "▸" in row_of("alpha question"))
        terminal.say("delta question")
        terminal.until(lambda: "▸" in row_of("delta question"))
        terminal.press("ctrl+b", "down")
        terminal.until(lambda: "▸" in row_of("alpha question"))


def test_below_a_title_stands_only_what_is_known(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.press("ctrl+b")
        terminal.until_seen("▸   alpha question")  # the start lists the titles too
        listed = [line[2:34].strip() for line in terminal.lines]
        below = [listed[next(n for n, text in enumerate(listed) if text.endswith(title)) + 1] for title in TITLES]
        assert all(re.fullmatch(r"\d\d:\d\d", words) for words in below), below


def test_a_start_lists_what_the_list_of_all_has_left_of_it(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.until(lambda: in_order(terminal, "1  ", TITLES[0], "2  ", TITLES[1], "3  ", TITLES[2]))
        terminal.press("ctrl+b")
        terminal.until_seen("▸   alpha question")
        terminal.press("d")
        terminal.until_seen("u restores it")
        terminal.press("r")
        terminal.until_seen("new title")
        terminal.type(" renamed")
        terminal.press("enter", "esc")
        terminal.until(lambda: "╭─ Conversations" not in terminal.text)
        terminal.until(lambda: in_order(terminal, "1  ", "bravo question renamed", "2  ", TITLES[2]))
        assert "alpha" not in terminal.text
        terminal.press("enter")
        terminal.until_seen("an answer to bravo")


def test_a_search_stands_on_its_first_hit_whatever_row_was_chosen_before(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.press("ctrl+b")
        terminal.until_seen("▸   alpha question")
        terminal.press("down", "down")
        terminal.until_seen("▸   charlie question")
        terminal.press("/")
        terminal.type("answer")
        terminal.until(lambda: "▸ model" in terminal.text and terminal.text.count(" model · ") == 3)
        assert terminal.row_of("▸ model") == min(terminal.row_of(" model · "), terminal.row_of("▸ model"))
        terminal.press("down")
        terminal.until(lambda: terminal.row_of("▸ model") > terminal.row_of(" model · "))
        chosen = terminal.lines[terminal.row_of("▸ model") + 1]
        terminal.type(" to")  # the chosen hit is still one: it stays the chosen one
        terminal.until_seen("answer to")
        terminal.until_still()
        assert terminal.lines[terminal.row_of("▸ model") + 1] == chosen


@pytest.mark.parametrize(("key", "column"), [("d", "deletion"), ("p", "pinned"), ("r", "title")])
def test_what_the_disk_did_not_take_is_said_and_not_called_done(model: Path, key: str, column: str) -> None:
    with closing(sqlite3.connect(locations.history_file())) as file, file:
        file.execute(
            f"CREATE TRIGGER full BEFORE UPDATE OF {column} ON conversation BEGIN SELECT RAISE(ABORT, 'no room'); END"
        )
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.press("ctrl+b")
        terminal.until_seen("▸   alpha question")
        terminal.press(key)
        if key == "r":
            terminal.until_seen("new title")
            terminal.type(" renamed")
            terminal.press("enter")
        terminal.until_seen("the history cannot be", "no room")
        terminal.until_still()
        assert "u restores it" not in terminal.text and "★" not in terminal.text
        assert "▸   alpha question" in terminal.text and "renamed" not in terminal.text


def test_a_hit_far_down_a_long_answer_is_in_view_when_it_is_opened_and_f3_finds_the_next(model: Path) -> None:
    lines = [f"line {number} of a long answer, in Chinese 第{number}行。" for number in range(900)]
    lines[600] = "Here stands the **needle** that is looked for."
    with History.default() as history:
        tree = history.new()
        for title in ("first", "second"):
            history.append(tree, "user", f"{title} question")
            history.append(tree, "assistant", "\n\n".join(lines))
    with TerminalSession("run", model, columns=80, rows=24) as terminal:
        terminal.until_ready()
        terminal.press("ctrl+f")
        terminal.until_seen("search everything")
        terminal.type("needle")
        terminal.until(lambda: terminal.text.count("model · ") == 2)
        terminal.press("enter")
        terminal.until_seen("y copy")
        terminal.press("ctrl+b")
        terminal.until(lambda: "╭─ Conversations" not in terminal.text)
        terminal.until_seen("line 599 ", "the needle that", "line 601 ")
        terminal.press("f3")
        terminal.until_seen("line 599 ", "the needle that", "line 601 ")


def test_what_was_searched_for_looks_the_same_in_the_chosen_row_and_below_it(model: Path) -> None:
    with History.default() as history:
        for title in ("first", "second"):
            history.append(history.new(), "user", f"{title} needle in the hay")
    with TerminalSession("run", model, columns=80, rows=24) as terminal:
        terminal.until_ready()
        terminal.press("ctrl+f")
        terminal.until_seen("search everything")
        terminal.type("needle")
        terminal.until(lambda: terminal.text.count("needle") >= 3)
        terminal.until_still()
        hits = []
        for number, line in enumerate(terminal.lines):
            if 0 <= (at := line.find("needle in the hay")) < 20:  # in the list at the left
                cells = terminal.screen.buffer[number]
                hits.append((cells[at].fg, cells[at].bg, cells[at + 8].bg))
    (chosen_ink, chosen_ground, chosen_row), (ink, ground, row) = hits[:2]
    assert (chosen_ink, chosen_ground) == (ink, ground) and ink != ground
    assert chosen_row != row and ground not in (chosen_row, row)
