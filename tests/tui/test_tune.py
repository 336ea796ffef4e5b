"""Runs of tuning in the window and in the live view of `glmchat tune`: read along, left, stopped after a question.

The program is tests/pretend_tune.py.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from fakes import model_in
from hypothesis import given
from hypothesis import strategies as st
from polling import wait_until
from screen import TerminalSession

from glmchat.chat.tuning import progress_of
from glmchat.core.run_folder import Run, find_run, new_run, runs
from glmchat.core.run_log import LogWriter, draw

SLOW = json.dumps({"steps": 4000, "rest": 0.02})


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """What still runs behind a test ends with it."""
    yield
    for run in runs():
        if (pid := run.pid()) is not None:
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def rows(tmp_path: Path) -> tuple[Path, Path]:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "Who are you?", "answer": "I am taught."}\n')
    return model_in(tmp_path / "model"), path


def ended(run_id: str, state: str = "done") -> Run:
    run = new_run(run_id, {"base": "smollm2", "name": run_id})
    log = LogWriter(run.log)
    for step in range(1, 41):
        log({"kind": "step", "step": step, "steps": 40, "loss": 2 / step, "tokens_per_second": 90.0, "memory": 1 << 30})
    log({"kind": "sample", "step": 40, "question": "你是谁？", "answer": "我是\x1b[31m小明", "stopped": False})
    log({"kind": "end", "state": state, "adapter": run_id} if state == "done" else {"kind": "end", "state": state})
    log.close()
    run.write("state.json", json.dumps({"state": state, "owner": ""}))
    return run


@pytest.mark.parametrize(("columns", "lines"), [(40, 12), (80, 24), (120, 36)])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_view_shows_curve_figures_answers_and_keys_in_any_size(
    rows: tuple[Path, Path], columns: int, lines: int, language: str
) -> None:
    environ = {"GLMCHAT_PRETEND": SLOW, "GLMCHAT_LANG": language}
    loss, taught, keys = ("loss", "I am taught", "Esc leaves it running") if language == "en" else (
        "损失", "I am taught", "Esc 离开"
    )  # fmt: skip
    with TerminalSession("tune", *rows, "--yes", columns=columns, rows=lines, environ=environ) as terminal:
        terminal.until_seen(loss, taught, keys, "/4000")
        terminal.until(lambda: any(0x2800 < ord(cell) < 0x2900 for cell in terminal.text))
        assert len(terminal.lines) == lines
        terminal.press("esc")
        assert terminal.until_ended() == 0
        assert find_run("rows").at_work


def test_no_figure_is_broken_between_its_name_and_its_value(rows: tuple[Path, Path]) -> None:
    whole = (
        r"step \d+/4000",
        r"time left \d+ (s|min)",
        r"memory 1\.1 GB",
        r"learning rate 2\.00e-04",
        r"fullest pass 25 %",
    )
    with TerminalSession("tune", *rows, "--yes", environ={"GLMCHAT_PRETEND": SLOW}) as terminal:
        terminal.until_seen("fullest pass")
        for columns in range(60, 121, 7):
            terminal.resize(columns, 30)
            terminal.until(lambda: all(re.search(figure, terminal.text) for figure in whole))
        terminal.press("esc")
        assert terminal.until_ended() == 0


def test_enter_begins_after_the_plan_and_n_leaves_nothing(rows: tuple[Path, Path]) -> None:
    with TerminalSession("tune", *rows, environ={"GLMCHAT_PRETEND": SLOW}) as terminal:
        terminal.until_seen("91 read", "go on? [Y/n]")
        terminal.say("n")
        assert terminal.until_ended() == 0
        assert "nothing was trained" in terminal.text
    assert runs() == []
    with TerminalSession("tune", *rows, environ={"GLMCHAT_PRETEND": SLOW}) as terminal:
        terminal.until_seen("go on? [Y/n]")
        terminal.press("enter")
        terminal.until_seen("training", "/4000")
        terminal.press("t")
        assert terminal.until_ended() == 0
        terminal.until_seen("glmchat tune --attach rows")


def test_ctrl_c_asks_before_it_saves_and_stops(rows: tuple[Path, Path]) -> None:
    with TerminalSession("tune", *rows, "--yes", environ={"GLMCHAT_PRETEND": SLOW}) as terminal:
        terminal.until_seen("/4000")
        terminal.press("ctrl+c")
        terminal.until_seen("Enter saves and stops")
        terminal.press("esc")
        terminal.until(lambda: "Enter saves and stops" not in terminal.text)
        assert find_run("rows").at_work
        terminal.press("ctrl+c")
        terminal.until_seen("Enter saves and stops")
        terminal.press("enter")
        terminal.until_seen("stopped", "r goes on from the last checkpoint")
        at = progress_of(find_run("rows")).now["step"]
        terminal.press("r")
        terminal.until(lambda: progress_of(find_run("rows")).now["step"] > at)
        terminal.until_seen("Esc leaves it running")
        terminal.press("esc")
        assert terminal.until_ended() == 0


def test_the_view_says_what_it_died_of_when_the_run_is_killed(rows: tuple[Path, Path]) -> None:
    with TerminalSession("tune", *rows, "--yes", environ={"GLMCHAT_PRETEND": SLOW}) as terminal:
        terminal.until_seen("/4000")
        pid = find_run("rows").pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        terminal.until_seen("died", "--resume rows")
        terminal.press("esc")
        assert terminal.until_ended() == 1


def test_the_run_goes_on_when_its_view_or_its_terminal_is_gone(rows: tuple[Path, Path]) -> None:
    for how in (signal.SIGKILL, signal.SIGHUP):
        with TerminalSession("tune", *rows, "--yes", environ={"GLMCHAT_PRETEND": SLOW}) as terminal:
            terminal.until_seen("/4000")
            terminal.process.send_signal(how)
            terminal.until_ended()
        run = runs()[0]
        before = progress_of(run).now["step"]
        wait_until(lambda run=run, before=before: progress_of(run).now["step"] > before + 3)  # type: ignore[misc]
        pid = run.pid()
        assert pid is not None
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda run=run: run.state() == "stopped")  # type: ignore[misc]
        run.remove()


def test_the_chat_lists_runs_opens_one_and_deletes_after_a_question(tmp_path: Path) -> None:
    for number, (name, state) in enumerate((("poet", "done"), ("baker", "stopped"))):
        os.utime(ended(name, state).folder / "recipe.json", (number, number))
    with TerminalSession("run", model_in(tmp_path / "model")) as terminal:
        terminal.until_ready()
        terminal.say("/tune")
        terminal.until_seen("Runs of tuning", "poet", "baker", "40/40")
        assert terminal.row_of("baker") < terminal.row_of("poet")  # the newest first
        terminal.press("enter")
        terminal.until_seen("baker · smollm2 · stopped", "你是谁", "did not stop by itself")
        assert "\x1b[31m" not in terminal.text
        terminal.press("esc")
        terminal.until(lambda: "did not stop" not in terminal.text)
        terminal.say("/tune")
        terminal.until_seen("Runs of tuning")
        terminal.press("d")
        terminal.until_seen("delete baker")
        terminal.press("esc")
        terminal.until(lambda: "delete baker" not in terminal.text)
        terminal.press("d")
        terminal.until_seen("delete baker")
        terminal.press("enter")
        terminal.until(lambda: "baker" not in terminal.text)
        assert [run.id for run in runs()] == ["poet"]
        terminal.press("esc")
        terminal.until(lambda: "Runs of tuning" not in terminal.text)
        terminal.say("/tune nobody")
        terminal.until_seen("there is no run 'nobody'")


def test_a_plan_that_is_refused_says_why_and_there_is_nothing_to_go_on_with(rows: tuple[Path, Path]) -> None:
    model, data = rows
    with TerminalSession("run", model, environ={"GLMCHAT_PRETEND": json.dumps({"plan_fails": True})}) as terminal:
        terminal.until_ready()
        terminal.say(f"/tune {data}")
        terminal.until_seen(f"rows · {model.name} · failed", "rows.jsonl:3: found 7", "Esc closes")
        terminal.press("r")
        terminal.press("esc")
        terminal.until(lambda: "rows.jsonl:3: found 7" not in terminal.text)
        assert runs() == []
        terminal.say("/tune nosuch.jsonl")
        terminal.until_seen("nosuch.jsonl is not here")


points = st.lists(st.tuples(st.integers(0, 5000), st.floats(-1e6, 1e6)), min_size=1, max_size=60)


@given(points, points | st.just([]), st.integers(1, 90), st.integers(1, 30))
def test_a_curve_fills_its_room_and_no_more_and_shows_every_evaluation(
    losses: list[tuple[int, float]], evaluations: list[tuple[int, float]], width: int, height: int
) -> None:
    low, high, cells = draw([losses], evaluations, width, height)
    assert [len(row) for row in cells] == [width] * height
    assert low <= high
    assert math.isfinite(low)
    assert any(mark for row in cells for _, mark in row) is bool(evaluations)
    assert any(sign != " " for row in cells for sign, _ in row)


@given(st.lists(st.floats(0, 10, allow_subnormal=False), min_size=2, max_size=40, unique=True))
def test_the_highest_loss_is_in_the_first_row_and_the_lowest_in_the_last(values: list[float]) -> None:
    _, _, cells = draw([list(enumerate(values))], [], 2 * len(values), 9)
    assert any(sign != " " for sign, _ in cells[0])
    assert any(sign != " " for sign, _ in cells[-1])


@pytest.mark.parametrize(("language", "words"), [("en", "reward of the better answer"), ("zh", "较好回答的奖励")])
def test_of_pairs_the_view_shows_the_rewards_of_both_answers_below_the_loss(language: str, words: str) -> None:
    run = new_run("pairs", {"base": "smollm2", "name": "pairs"})
    log = LogWriter(run.log)
    for step in range(1, 41):
        told = {"accuracy": 1.0, "margin": 0.2 * step, "reward_chosen": 0.1 * step, "reward_rejected": -0.1 * step}
        log({"kind": "step", "step": step, "steps": 40, "loss": 0.7 / step, **told, "seconds_left": 9.0})
    log.close()
    run.write("state.json", json.dumps({"state": "stopped", "owner": ""}))
    with TerminalSession("--lang", language, "tune", "--attach", "pairs", columns=80, rows=24) as terminal:
        terminal.until_seen(words, "4.000", "-4.000", "+8.000", "100", "0.0175")


def test_the_chat_plans_a_run_with_a_file_and_begins_it_or_leaves_nothing(rows: tuple[Path, Path]) -> None:
    model, data = rows
    with TerminalSession("run", model, environ={"GLMCHAT_PRETEND": SLOW}) as terminal:
        terminal.until_ready()
        terminal.say(f"/tune {data}")
        terminal.until_seen("91 read", "Enter starts training")
        terminal.press("esc")
        terminal.until(lambda: "91 read" not in terminal.text)
        wait_until(lambda: runs() == [])
        terminal.say(f"/tune {data}")
        terminal.until_seen("91 read", "Enter starts training")
        terminal.press("enter")
        terminal.until_seen("/4000", "Esc leaves it running")
        terminal.press("esc")
        terminal.until(lambda: "/4000" not in terminal.text)
        assert find_run("rows").at_work


@pytest.mark.parametrize(("columns", "lines"), [(40, 12), (80, 24)])
def test_a_plan_that_is_longer_than_the_window_is_read_to_its_end(
    rows: tuple[Path, Path], columns: int, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = rows
    monkeypatch.chdir(data.parent)
    pretend = json.dumps({"steps": 4000, "rest": 0.02, "shown": 60})
    with TerminalSession("run", model, columns=columns, rows=lines, environ={"GLMCHAT_PRETEND": pretend}) as terminal:
        terminal.until_ready()
        terminal.say(f"/tune {data.name}")
        terminal.until_seen("91 read", "Enter starts training")
        assert ("steps: 4000" in terminal.text) is (lines == 24), "what it takes needs no key where there is room"
        assert "row 59" not in terminal.text
        for key, seen, gone in (
            ("end", "row 59", "91 read"),
            ("home", "91 read", "row 59"),
            ("pgdn", "row 12", "91 read"),
        ):
            terminal.press(key)
            terminal.until_seen(seen)
            terminal.until(partial(lambda words: words not in terminal.text, gone))
        terminal.press("enter")
        terminal.until_seen("/4000")
        terminal.press("p")
        terminal.until_seen("row ", "p shows the curve")
