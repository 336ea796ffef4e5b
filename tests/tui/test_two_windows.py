"""Two windows on one conversation, each in a pseudo-terminal: neither sends what it does not show, nothing is lost.

Covers tui/talk.py, chat/session.py.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import model_in
from screen import TerminalSession

from glmchat.chat.history.history import History

SLOW = {"pieces": [f"word{n} " for n in range(40)], "seconds_per_token": 0.1}
ELSEWHERE = "another window went on here"


@pytest.fixture
def windows(tmp_path: Path) -> Iterator[tuple[TerminalSession, TerminalSession]]:
    """The first answers at once, the second takes four seconds; both show the same question and answer."""
    model = model_in(tmp_path / "model")
    with TerminalSession("run", model, behaviour={"pieces": ["quick answer"]}) as first:
        first.until_ready()
        first.say("shared question")
        first.until_seen("quick answer")
        with TerminalSession("run", model, "-c", behaviour=SLOW) as second:
            second.until_ready()
            second.until_seen("shared question", "quick answer")
            yield first, second


def path() -> list[tuple[str, str]]:
    with History.default() as history:
        last = history.last()
        assert last is not None
        return [(m.role, m.text) for m in history.load(last.id).path()]


def test_a_question_waits_for_the_answer_of_another_window_and_both_show_everything(
    windows: tuple[TerminalSession, TerminalSession],
) -> None:
    first, second = windows
    second.say("from window two")
    second.until_seen("word1")
    first.say("from window one")
    first.until_seen("in another window")  # what it waits for
    first.until_seen(ELSEWHERE, "from window two", "word39", "from window one")
    first.until(lambda: first.text.count("quick answer") == 2)
    second.until_seen(ELSEWHERE, "from window one")
    assert [text for role, text in path() if role == "user"] == [
        "shared question",
        "from window two",
        "from window one",
    ]
    assert [role for role, _ in path()] == ["user", "assistant"] * 3


@pytest.mark.parametrize(("lang", "said"), [("en", "far-away is finished"), ("zh", "far-away 上的回答")])
def test_a_question_that_waits_for_another_machine_names_it(tmp_path: Path, lang: str, said: str) -> None:
    with History.default() as history:
        tree = history.new()
        question = history.append(tree, "user", "shared question")
        answer = history.begin_answer(tree, parent=question.id)
        far = "UPDATE message SET owner = 'far-away/boot 1 2' WHERE id = ?"  # a home on a network
        history.store.attempt(lambda: history.store.run(far, (answer.id,)))
    with TerminalSession("--lang", lang, "run", model_in(tmp_path / "model"), "-c") as terminal:
        terminal.until_seen("shared question")
        terminal.say("from here")
        terminal.until_seen("◦ from here", said)


def test_of_two_questions_within_a_moment_one_waits_for_the_other(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    with TerminalSession("run", model, behaviour={"echo": True}) as first:
        first.until_ready()
        first.say("shared question")
        first.until(lambda: first.text.count("shared question") >= 3)
        with TerminalSession("run", model, "-c", behaviour={"echo": True}) as second:
            second.until_ready()
            second.until(lambda: second.text.count("shared question") >= 3)
            for number in range(3):
                for window, name in ((first, "alpha"), (second, "bravo")):
                    window.type(f"{name}-{number}")
                    window.until_seen(f"│ {name}-{number}")
                    window.process.send_signal(signal.SIGSTOP)
                    window.type("\r")
                for window in (first, second):
                    window.process.send_signal(signal.SIGCONT)
                for window in (first, second):
                    for name in ("alpha", "bravo"):
                        window.until(lambda w=window, text=f"{name}-{number}": w.text.count(text) == 2)  # type: ignore[misc]
            said = path()
    assert [role for role, _ in said] == ["user", "assistant"] * 7
    assert {text for role, text in said if role == "user"} == {
        "shared question", *(f"{name}-{number}" for name in ("alpha", "bravo") for number in range(3))
    }  # fmt: skip


def test_what_another_window_said_is_shown_before_anything_is_asked_below_it(
    windows: tuple[TerminalSession, TerminalSession],
) -> None:
    first, second = windows
    first.say("one more")
    first.until(lambda: first.text.count("quick answer") == 2)
    second.until_seen(ELSEWHERE, "one more")
    second.type("kept draft")
    second.until_seen("kept draft")
    first.say("/undo")
    first.until_seen("undone")
    second.until(lambda: "one more" not in second.text)
    assert "kept draft" in second.text
    first.say("/delete")
    first.until_seen("the conversation was deleted")
    second.until_seen("another window deleted that conversation", "kept draft")
