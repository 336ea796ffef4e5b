"""What a returning user meets, in a pseudo-terminal: keys are pressed and cells are read.

Covers tui/app.py, tui/widgets/sidebar.py, tui/widgets/rows.py, tui/screens/models.py, tui/composer.py,
tui/comparing.py, core/typed_ahead.py.
"""

from __future__ import annotations

import json
import re
import sqlite3
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from fakes import model_in
from screen import TerminalSession

from glmchat.chat.history.history import History
from glmchat.chat.launch import LaunchOptions

Open = Callable[..., TerminalSession]
TITLES = ("alpha question", "bravo question", "charlie question", "delta question", "echo question")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_in(tmp_path / "model")


@pytest.fixture
def past() -> None:
    """Five conversations of other days; the first lines of the list are the newest."""
    with History.default() as history:
        for title in reversed(TITLES):
            tree = history.new()
            history.append(tree, "user", title)
            history.append(tree, "assistant", f"an answer to {title.split()[0]}")


def listed(terminal: TerminalSession, title: str) -> int:
    """The row of a conversation in the list at the left; 0 where it is not there."""
    return next((number for number, line in enumerate(terminal.lines) if title in line[:36]), 0)


@pytest.mark.usefixtures("past")
def test_conversations_search_and_earlier_questions_are_there_before_the_first_question(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.press("ctrl+b")
        terminal.until_seen(*TITLES)
        terminal.until(lambda: all(listed(terminal, title) for title in TITLES))
        terminal.press("esc", "ctrl+f")
        terminal.until_still()
        terminal.type("bravo")
        terminal.until(lambda: not listed(terminal, "alpha question") and listed(terminal, "bravo question"))
        terminal.until(lambda: listed(terminal, "answer to bravo"))
        terminal.press("esc", "esc", "ctrl+r")
        terminal.until_seen("delta question")


@pytest.mark.usefixtures("past")
@pytest.mark.parametrize("environ", [{}, {"TERM": "screen", "COLORTERM": ""}, {"GLMCHAT_THEME": "light"}])
def test_the_chosen_row_of_a_list_is_seen_over_its_whole_width_and_by_a_mark(
    model: Path, environ: dict[str, str]
) -> None:
    with TerminalSession("run", model, environ=environ) as terminal:
        terminal.until_ready()
        terminal.press("ctrl+b")
        terminal.until(lambda: all(listed(terminal, title) for title in TITLES))
        terminal.press("down", "down")
        terminal.until_still()
        row, other = listed(terminal, TITLES[2]), listed(terminal, TITLES[3])
        width = terminal.lines[row].index("│", 1) - 1  # within the frame of the list
        chosen, usual = terminal.backgrounds(row)[:width], terminal.backgrounds(other)[:width]
        assert "▸" in terminal.lines[row][:3] and "▸" not in terminal.lines[other][:3]
        assert all(one != two for one, two in zip(chosen[2:], usual[2:], strict=True))


@pytest.mark.usefixtures("past")
def test_what_is_pinned_or_renamed_stays_the_chosen_one(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.press("ctrl+b")
        terminal.until(lambda: all(listed(terminal, title) for title in TITLES))
        terminal.press("down", "down", "p")
        terminal.until(lambda: listed(terminal, TITLES[2]) < listed(terminal, TITLES[0]))
        terminal.press("d")
        terminal.until(lambda: not listed(terminal, TITLES[2]))
        assert all(listed(terminal, title) for title in (*TITLES[:2], *TITLES[3:]))


def test_page_keys_scroll_the_conversation_while_the_prompt_has_the_focus(model: Path) -> None:
    with TerminalSession("run", model, rows=20, behaviour={"pieces": [f"line {n}\n\n" for n in range(60)]}) as terminal:
        terminal.until_ready()
        terminal.say("go on")
        terminal.until_seen("line 59")
        terminal.until_still()
        terminal.press("pgup")
        terminal.until(lambda: "line 59" not in terminal.text)
        terminal.press("pgdn")
        terminal.until_seen("line 59")
        terminal.press("ctrl+home")
        terminal.until_seen("go on", "line 1")


def drafts() -> list[str]:
    with History.default() as history:
        path = history.path
    assert path is not None
    with sqlite3.connect(path) as base:
        return [row[0] for row in base.execute("SELECT draft FROM conversation WHERE draft != ''")]


def test_leaving_keeps_the_queue_and_the_draft_and_files_nothing_as_a_failure(model: Path) -> None:
    slow = {"pieces": [f"word{n} " for n in range(2000)], "seconds_per_token": 0.05}
    with TerminalSession("run", model, behaviour=slow) as terminal:
        terminal.until_ready()
        terminal.say("first question")
        terminal.until_seen("word3")
        for text in ("QUEUED-ONE", "QUEUED-TWO"):
            terminal.say(text)
            terminal.until_seen("queued")
        terminal.type("DRAFT-IDLE")
        terminal.until_seen("DRAFT-IDLE")
        terminal.press("ctrl+q")
        assert terminal.until_ended() == 0
    (draft,) = drafts()
    assert all(text in draft for text in ("QUEUED-ONE", "QUEUED-TWO", "DRAFT-IDLE"))
    with History.default() as history:
        answer = history.load(1).path()[-1]
    assert answer.state == "stopped" and answer.text.startswith("word")


def test_a_refused_model_leaves_the_one_that_answers(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.say(f"/model {tmp_path / 'empty'}")
        terminal.until_seen("■")
        terminal.until_still()
        assert "engine stopped" not in terminal.text
        terminal.say("still there?")
        terminal.until_seen("one two")


def test_an_export_has_the_form_of_its_name(model: Path, tmp_path: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.say("hello")
        terminal.until_seen("one two")
        terminal.say(f"/export {tmp_path / 'out.json'}")
        terminal.until(lambda: (tmp_path / "out.json").exists() and (tmp_path / "out.json").read_text())
    json.loads((tmp_path / "out.json").read_text())


@pytest.mark.parametrize("keys", [("esc", "esc"), ("ctrl+c",)])
def test_the_prompt_can_be_emptied_at_once_and_comes_back_with_undo(model: Path, keys: tuple[str, ...]) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.type("one line")
        terminal.press("ctrl+j")
        terminal.type("another line")
        terminal.until_seen("one line", "another line")
        terminal.press(*keys)
        terminal.until(lambda: "another line" not in terminal.text and "Ask anything" in terminal.text)
        terminal.press("\x1f")  # Ctrl+_
        terminal.until_seen("one line", "another line")


def test_the_key_that_opened_a_panel_closes_it_and_changes_nothing(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        for key in ("f2", "f1", "f4", "f7"):
            terminal.until_still()
            before = terminal.text
            terminal.press(key)
            terminal.until(lambda before=before: terminal.text != before)  # type: ignore[misc]
            terminal.until_still()
            terminal.press(key)
            terminal.until_still()
            assert "preset" not in terminal.text and "Ask anything" in terminal.text, key


def test_enter_and_its_other_key_are_told_as_they_are(model: Path) -> None:
    with TerminalSession("run", model, environ={"GLMCHAT_ENTER_SENDS": "false"}) as terminal:
        terminal.until_ready()
        terminal.until_seen("Enter    new line", "F5       send")


def test_an_answer_of_a_comparison_leaves_later_turns_where_they_are(model: Path) -> None:
    with TerminalSession("run", model, columns=120) as terminal:
        terminal.until_ready()
        terminal.say("/compare temp=0 temp=1 -- first?")
        terminal.until_still(1.0)
        terminal.press("enter")
        terminal.until_seen("Ask anything")
        terminal.until_still()
        terminal.say("and later?")
        terminal.until_seen("and later?")
        terminal.until_still()
        terminal.say("/compare")
        terminal.until_still(1.0)
        terminal.press("esc")
        terminal.until_still()
        assert "and later?" in terminal.text


def test_a_draft_that_does_not_fit_is_counted(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.paste("ten chars\n" * 500)
        terminal.until(lambda: re.search(r"5,0\d\d/4,096", terminal.text))


def test_an_adapter_is_forced_for_one_conversation_only(adapters_here: LaunchOptions) -> None:
    with TerminalSession("run", adapters_here.engine.folder) as terminal:
        terminal.until_ready()
        terminal.say("/adapter medical")
        terminal.until_seen("me/Other-7M")
        terminal.say("/adapter medical --force")
        terminal.until_seen("medical (forced)")
        terminal.say("/adapter medical:0.5")  # in this one it stays
        terminal.until_seen("medical:0.5")
        terminal.press("ctrl+n")
        terminal.until(lambda: "medical" not in terminal.lines[-1])
        terminal.say("/adapter medical")
        terminal.until_seen("▲", "me/Other-7M")


@pytest.mark.usefixtures("past")
@pytest.mark.parametrize(("keys", "title"), [(("enter",), TITLES[0]), (("3", "enter"), TITLES[2])])
@pytest.mark.parametrize(("columns", "rows"), [(40, 12), (80, 24), (200, 60)])
def test_a_start_shows_the_last_conversations_which_a_number_or_enter_opens(
    model: Path, keys: tuple[str, ...], title: str, columns: int, rows: int
) -> None:
    with TerminalSession("run", model, columns=columns, rows=rows) as terminal:
        terminal.until_seen(TITLES[0], TITLES[2])
        terminal.until(lambda: columns < 130 or terminal.text.count(TITLES[0]) == 2)  # beside the list at the left too
        terminal.press(*keys)
        terminal.until_seen(f"an answer to {title.split()[0]}")
        terminal.until(lambda: "● glmchat" not in terminal.text)


@pytest.mark.usefixtures("past")
def test_up_brings_back_what_was_asked_in_other_conversations(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_seen(TITLES[4])
        terminal.press("up", "up")
        terminal.until(lambda: any(TITLES[1] in line and "│" in line for line in terminal.lines))


@pytest.mark.usefixtures("past")
def test_conversations_stand_under_their_day_and_hits_say_who_and_when(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_seen(TITLES[4])
        terminal.press("ctrl+b")
        terminal.until_seen("today")
        terminal.press("/")
        terminal.until_still()
        terminal.type("bravo")
        terminal.until(lambda: any("model · " in line and "bravo" in line for line in terminal.lines))


@pytest.mark.usefixtures("past")
def test_a_number_with_a_space_before_it_is_asked_and_the_start_says_so(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.until_seen("open the latest")
        terminal.type("3")
        terminal.until_seen("open 3; with a space before it, 3 is asked")
        terminal.press("backspace", " ", "3")
        terminal.until_seen("open the latest")
        terminal.press("enter")
        terminal.until_seen("one two")
        assert "charlie" not in terminal.text


def test_where_one_conversation_is_listed_there_is_one_number_to_press(model: Path) -> None:
    with History.default() as history:
        tree = history.new()
        history.append(tree, "user", "the only question")
        history.append(tree, "assistant", "the only answer")
    with TerminalSession("run", model) as terminal:
        terminal.until_seen("open that one")
        row = terminal.row_of("open that one")
        assert terminal.lines[row].split() == ["1", "open", "that", "one"]
        terminal.press("1", "enter")
        terminal.until_seen("the only answer")


@pytest.mark.usefixtures("past")
@pytest.mark.parametrize(("keys", "title"), [(("enter",), TITLES[0]), (("3", "f5"), TITLES[2])])
def test_where_enter_breaks_lines_a_start_opens_conversations_too(
    model: Path, keys: tuple[str, ...], title: str
) -> None:
    with TerminalSession("run", model, environ={"GLMCHAT_ENTER_SENDS": "false"}) as terminal:
        terminal.until_seen(TITLES[2])
        terminal.press(*keys)
        terminal.until_seen(f"an answer to {title.split()[0]}")


SPY = """
import os, runpy, sys, termios
switch, sys.argv = termios.tcsetattr, ["glmchat", *sys.argv[5:]]
def noting(*arguments):
    with open(os.environ["NOTES"], "a") as notes:
        print([name for name in ("typer", "httpx2", "textual", "sqlite3") if name in sys.modules], file=notes)
    switch(*arguments)
termios.tcsetattr = noting
runpy.run_module("glmchat", run_name="__main__")
"""


def test_what_is_typed_is_hidden_before_anything_is_loaded(model: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    spy, environ = (sys.executable, "-P", "-c", SPY), {"NOTES": str(notes)}
    with TerminalSession("run", model, inside=spy, environ=environ, real=True) as terminal:
        terminal.until_seen("Ask anything")
    assert notes.read_text().splitlines()[0] == "[]"


@pytest.mark.parametrize("arguments", [("list",), ("run", "nobody"), ("run", "nobody", "a question"), ("--help",)])
def test_a_terminal_is_left_as_it_was(arguments: tuple[str, ...]) -> None:
    with TerminalSession(*arguments, real=True) as terminal:
        before = terminal.settings()
        terminal.until_ended()
        assert terminal.settings() == before and before[3] & termios.ECHO


def test_what_is_typed_before_the_window_is_there_reaches_the_prompt(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.type("typed ahead")  # the interpreter has not begun yet
        terminal.until_seen("│ typed ahead")
        terminal.until_still()
        assert terminal.text.count("typed ahead") == 1
        terminal.press("enter")
        terminal.until_seen("one two")
