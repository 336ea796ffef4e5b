"""Evaluations in the window: listed, opened, their rows whole, one followed, one begun, stopped and gone on with.

The answers come from a real model of random weights; the engine of the window is the fake one.

Covers tui/list_screen.py, tui/following.py.
"""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from adapter_builders import write_peft
from engine_builders import write_folder
from polling import wait_until
from screen import TerminalSession

from glmchat.cli.main import run
from glmchat.core import locations
from glmchat.core.eval_folder import Evaluation, evaluations, open_evaluation

HOSTILE = "\x1b[2J\u202eevil"
ROWS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, an adapter and rows whose texts would like to drive the terminal."""
    place = tmp_path_factory.mktemp("made")
    write_folder(place / "tiny")
    write_peft(place / "tiny", place / "poet")
    rows = [{"prompt": f"he {n} 你是谁 {HOSTILE}", "response": f"the {n} 我是小明 {HOSTILE}"} for n in range(ROWS)]
    (place / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture
def tiny(made: Path) -> Path:
    """It is on this machine, and `poet` in the store."""
    assert run(["add", str(made / "tiny")]) == 0
    assert run(["adapters", "add", str(made / "poet")]) == 0
    return made


@pytest.fixture
def evaluated(tiny: Path, made: Path) -> Evaluation:
    """Both candidates, done; computed once."""
    kept = made / "home"
    if not kept.exists():
        data, said = str(made / "dev.jsonl"), made / "said.jsonl"
        assert run(["eval", "tiny", data, "--max-tokens", "8", "--dtype", "float32", "--out", str(said)]) == 0
        favour(made / "dev.jsonl", 3, json.loads(said.read_text().splitlines()[3])["predict"])
        for name in ("evals", "evaluations"):
            shutil.rmtree(locations.data_dir() / name)
        assert run(["eval", "tiny", "+poet", data, "--max-tokens", "8", "--dtype", "float32", "--threads", "1"]) == 0
        for name in ("evals", "evaluations"):
            shutil.copytree(locations.data_dir() / name, kept / name)
    for name in ("evals", "evaluations"):
        shutil.copytree(kept / name, locations.data_dir() / name, dirs_exist_ok=True)
    return evaluations()[0]


def favour(data: Path, number: int, text: str) -> None:
    """What is expected in a row has the words of the first candidate too, so that the second one is behind there."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[number]["response"] += f" {text}"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))


def is_plain(text: str) -> bool:
    return not any(unicodedata.category(sign) in ("Cc", "Cf") for sign in text if sign != "\n")


@pytest.mark.parametrize(("columns", "lines"), [(40, 12), (80, 24), (120, 36)])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_list_the_table_the_rows_and_a_row_fit_any_size_and_text_stays_text(
    evaluated: Evaluation, columns: int, lines: int, language: str
) -> None:
    words = {
        "en": ("Evaluations", "done", "loss per learned token", "expected"),
        "zh": ("评测", "已完成", "每个所学 token 的损失", "期望的回答"),
    }
    head, done, loss, expected = words[language]
    session = TerminalSession("run", "tiny", columns=columns, rows=lines, environ={"GLMCHAT_LANG": language})
    with session as terminal:
        terminal.until(lambda: "tiny" in terminal.text and "╭" in terminal.text)
        terminal.say("/eval")
        terminal.until_seen(head, evaluated.id[:20], done)
        terminal.press("enter")
        terminal.until_seen(f"{evaluated.id} · {done}", "tiny+poet")
        seen = terminal.text
        while "evil" not in terminal.text:
            terminal.press("pgdn")
            terminal.until_still(0.4)
            seen += terminal.text
        plain = " ".join(seen.split())
        assert loss in plain and ("no difference shown" if language == "en" else "未显示出差异") in plain
        terminal.press("enter")
        terminal.until(lambda: terminal.text.count("你是谁") >= min(ROWS, lines - 4))
        assert "▸" in terminal.text
        terminal.press("enter")
        terminal.until_seen(f"1/{ROWS}", expected)
        terminal.until_still(0.4)
        first = terminal.text
        terminal.press("right")
        terminal.until_seen(f"2/{ROWS}")
        assert terminal.text != first
        terminal.press("left")
        terminal.until(lambda: terminal.text == first)
        assert all(is_plain(text) for text in (seen, first)) and len(terminal.lines) == lines
        for sign in ("▸", "tiny+poet"):
            terminal.press("esc")
            terminal.until(lambda sign=sign: sign in terminal.text)  # type: ignore[misc]
        terminal.press("esc")
        terminal.until(lambda: evaluated.id not in terminal.text)


def test_a_row_is_there_whole_with_what_was_asked_expected_and_answered(evaluated: Evaluation) -> None:
    with TerminalSession("run", "tiny", columns=100, rows=40) as terminal:
        terminal.until_ready()
        terminal.say(f"/eval {evaluated.id[:9]}")
        terminal.until_seen("95 % interval", "where 2 is furthest behind 1")
        terminal.press("enter")
        terminal.until_seen("Enter opens a row")
        terminal.press("enter")
        terminal.until_seen("question", "expected", "1  tiny", "2  tiny+poet", "ROUGE-L")
        place = next(line for line in terminal.lines if "dev.jsonl:" in line)
        number = int(place.rpartition(":")[2])
        assert f"he {number - 1} 你是谁" in terminal.text and f"the {number - 1} 我是小明" in terminal.text
        table = evaluated.table()
        assert table is not None and table["shown"]["worst"][0]["place"].endswith(f":{number}")


def test_one_that_another_program_works_on_is_followed_to_its_table(evaluated: Evaluation, made: Path) -> None:
    table = (evaluated.folder / "table.json").read_text()
    keys = ["d" * 24, "e" * 24]
    running = open_evaluation({**evaluated.request(), "keys": keys})
    running.begin(evaluated.rows())
    lines = [
        (locations.evals_dir() / key / "answers.jsonl").read_text().splitlines(keepends=True) for key in evaluated.keys
    ]
    for key in keys:
        locations.private_dir(locations.evals_dir() / key)
    with TerminalSession("run", "tiny") as terminal:
        terminal.until_ready()
        terminal.say(f"/eval {running.id}")
        terminal.until_seen(f"answering 0/{2 * ROWS}", "Esc leaves it at work")
        with (locations.evals_dir() / keys[0] / "answers.jsonl").open("a") as file:
            file.write("".join(lines[0][:5]) + lines[0][5][:20])
        terminal.until_seen(f"answering 5/{2 * ROWS}", f"5/{ROWS}", f"0/{ROWS}")
        terminal.press("enter", "enter")
        terminal.until_seen("expected", "(no answer yet)")
        terminal.press("esc", "esc")
        for key, mine in zip(keys, lines, strict=True):
            (locations.evals_dir() / key / "answers.jsonl").write_text("".join(mine))
        running.write("table.json", table)
        running.note("done")
        terminal.until_seen(f"{running.id} · done", "95 % interval")


def test_the_chat_asks_before_it_evaluates_goes_on_behind_it_and_stops_after_a_question(
    tiny: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"he {n}", "response": f"the {n}"} for n in range(400)]
    data = tmp_path / "many.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def counted() -> int:
        return sum(len(path.read_text().splitlines()) for path in locations.evals_dir().glob("*/answers.jsonl"))

    with TerminalSession("run", "tiny", "--adapter", "poet", columns=90) as terminal:
        terminal.until_ready()
        terminal.say(f"/eval {data}")
        terminal.until_seen("waits for a yes", "1  tiny  (greedy", "2  tiny+poet  (greedy")
        terminal.press("esc")
        terminal.until_seen("Ask anything")
        assert not evaluations()
        terminal.say(f"/eval {data}")
        terminal.until_seen("waits for a yes")
        terminal.press("enter")
        terminal.until_seen("answering", "/800", "Ctrl+C stops")
        terminal.press("esc")
        terminal.until_seen("Ask anything")
        before = counted()
        wait_until(lambda: counted() > before)
        terminal.say(f"/eval {data}")
        terminal.until_seen("an evaluation is at work")
        terminal.say("/eval")
        terminal.until_seen("Evaluations", "answering")
        terminal.press("d")
        terminal.until_seen("it is at work; stop it first")
        terminal.press("enter")
        terminal.until_seen("/800", "Ctrl+C stops")
        terminal.press("ctrl+c")
        terminal.until_seen("Enter stops it")
        terminal.press("esc")
        terminal.until_seen("Ctrl+C stops")
        terminal.press("ctrl+c")
        terminal.until_seen("Enter stops it")
        terminal.press("enter")
        terminal.until_seen("interrupted", "answers are kept", "r goes on with it")
        kept = counted()
        assert 0 < kept < 800
        terminal.press("r")
        terminal.until_seen("answering", "Ctrl+C stops")
        wait_until(lambda: counted() > kept)
    (found,) = evaluations()
    wait_until(lambda: found.state() in ("stopped", "dead"))


def test_what_cannot_be_evaluated_is_said_in_a_line_and_an_evaluation_is_deleted_after_a_question(
    evaluated: Evaluation, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "response": 5}\n')
    with TerminalSession("run", "tiny", columns=90) as terminal:
        terminal.until_ready()
        for words, said in (("nobody", "there is no evaluation"), ("+nobody dev.jsonl", "there is no file"),
                            (f"+nobody {bad}", "nobody"), (f",temp=9 {bad}", "temperature")):  # fmt: skip
            terminal.say(f"/eval {words}")
            terminal.until_seen(said)
        terminal.say(f"/eval {bad}")
        terminal.until_seen("waits for a yes")
        terminal.press("enter")
        terminal.until_seen("failed", "bad.jsonl:1")
        terminal.press("esc")
        terminal.until_seen("Ask anything")
        terminal.say("/eval")
        terminal.until_seen("Evaluations", evaluated.id[:20])
        terminal.press("d")
        terminal.until_seen("delete the table of")
        terminal.press("esc")
        terminal.until(lambda: "delete the table" not in terminal.text)
        terminal.press("d")
        terminal.until_seen("delete the table of")
        terminal.press("enter")
        terminal.until_seen("there are no evaluations yet")
        assert not evaluations() and len(list(locations.evals_dir().iterdir())) == 2


def test_what_a_damaged_folder_holds_never_stops_the_window(evaluated: Evaluation) -> None:
    def with_table(value: Any) -> None:
        evaluated.write("table.json", value if isinstance(value, str) else json.dumps(value))

    with_table("{[")
    with TerminalSession("run", "tiny") as terminal:
        terminal.until_ready()
        terminal.say(f"/eval {evaluated.id}")
        terminal.until_seen("its table cannot be read")
        terminal.press("esc")
        terminal.until_seen("Ask anything")
